from __future__ import annotations

import random

import pytest

from spire_hw.config.hcl import MAX_CHARS, MAX_DEPTH, parse
from spire_hw.errors import ConfigError

DEEP = 20_000


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * DEEP,
        "a = " + "[" * DEEP + "]" * DEEP,
        "a {" * DEEP + "}" * DEEP,
        "a = {" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP,
        '{"a":' + "[" * DEEP + "]" * DEEP + "}",
        'a = "' + "${" * DEEP + '"',
        'a = "' + "\\" * (2 * DEEP + 1) + '"',
        "a = <<X\n" * DEEP,
        "a = /*" + "*" * DEEP,
        "a = " + "-" * DEEP,
        "a = 0x" + "f" * DEEP,
        "a = " + "9" * DEEP,
        "a = 1e" + "9" * 40,
        '"' * DEEP,
        "a " * DEEP,
        "," * DEEP,
        "\x00",
        "\ud800",
        "a = 1" + " " * MAX_CHARS,
    ],
    ids=range(20),
)
def test_nothing_but_a_config_error_escapes(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


def test_depth_up_to_the_cap_is_read() -> None:
    depth = MAX_DEPTH - 1
    text = "a {" * depth + "}" * depth
    assert parse(parse(text).to_hcl()) == parse(text)
    with pytest.raises(ConfigError, match="deeper"):
        parse("a {" * (depth + 1) + "}" * (depth + 1))


def test_mutations_of_a_real_file_are_read_or_refused() -> None:
    good = (
        'server { trust_domain = "x" ttl = "1h" l = [1, "a", true] }\n'
        'plugins { KeyManager "disk" { plugin_data { a = <<-E\n  x\n  E\n b = 0x1 } } }\n'
    )
    parse(good)
    chance = random.Random(7)  # noqa: S311 - repeatable, not secret
    letters = '{}[]"=,\\\n <-E#/*$1.\x00\u2028'
    for _ in range(400):
        text = list(good)
        for _ in range(chance.randint(1, 4)):
            text[chance.randrange(len(text))] = chance.choice(letters)
        try:
            parse("".join(text))
        except ConfigError as e:
            assert e.faults  # noqa: PT017
