from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError

from spire_hw.config.hcl import Body, parse
from spire_hw.config.schema import GoDuration, Model, at_least, decode, faults, parsed
from spire_hw.errors import ConfigError
from spire_hw.spiffeid import SpiffeId


class Inner(Model):
    path: str
    number: int = 3


class Loose(Model):
    tolerant: ClassVar[bool] = True

    flag: bool = False


class Outer(Model):
    unsupported: ClassVar[Mapping[str, object]] = {
        "profiling": False,
        "names": [],
        "block": Body.empty(),
        "never": None,
    }

    trust_domain: str
    port: Annotated[int, Field(ge=0, le=65535)] = 8081
    ratio: float = 0.5
    ttl: Annotated[GoDuration, at_least(timedelta(seconds=1))] | None = None
    level: Literal["debug", "info"] = "info"
    ids: list[str] = Field(default_factory=list)
    owners: list[Annotated[SpiffeId, parsed(SpiffeId.parse)]] = Field(default_factory=list)
    inner: Inner | None = None
    many: list[Inner] = Field(default_factory=list)
    named: dict[str, Inner] = Field(default_factory=dict)
    raw: Body = Body.empty()
    loose: Loose = Loose()


def messages(text: str) -> list[str]:
    return [f"{f.line}: {f.message}" for f in faults(parse(text), Outer)]


def test_a_good_body_becomes_a_frozen_value() -> None:
    text = """TRUST_DOMAIN = "x"
    port = "0x10"
    ratio = 2
    ttl = "1h"
    ids = ["a", 1]
    ids = ["b"]
    owners = ["spiffe://x/y"]
    inner { path = "p" }
    many { path = 8 }
    many { path = "b" }
    named "x" { path = "1" }
    named { y { path = "2" } }
    raw { anything { goes = 1 } }
    """
    made = decode(parse(text), Outer)
    assert (made.trust_domain, made.port, made.ratio) == ("x", 16, 2.0)
    assert made.ttl == timedelta(hours=1)
    assert made.ids == ["a", "1", "b"]
    assert made.owners == [SpiffeId.parse("spiffe://x/y")]
    assert [m.path for m in made.many] == ["8", "b"]
    assert {k: v.path for k, v in made.named.items()} == {"x": "1", "y": "2"}
    assert made.raw.blocks("anything")
    assert made.line("port") == 2
    assert made.line("level") == 1
    assert made.given("port")
    assert not made.given("level")
    with pytest.raises(ValidationError):
        made.port = 3


def test_all_faults_come_at_once_with_their_lines() -> None:
    text = """port = "99999"
ttl = "1x"
ids = "a"
level = "debgu"
inner { number = "x" q = 1 }
many { }
named "x" { path = true }
named { stray = 1 }
loose { flag = "true" }
trust_domian = 1
raw = 3
level { }
owners = ["spiffe://x/y", "z"]
named "x" { path = "twice" }
"""
    found = messages(text)
    assert [f.split(":")[0] for f in found] == sorted((f.split(":")[0] for f in found), key=int)
    expected = [
        '"port": must be at most 65535',
        '"ttl": "1x" is not a duration',
        '"ids": expected a list: [ ... ], found text',
        '"number": expected a whole number, found text',
        'unknown key "q"',
        '"path": is required',
        '"path": expected text, found a boolean',
        '"named" needs a label',
        '"flag": expected true or false without quotes, found text',
        'unknown key "trust_domian"; did you mean "trust_domain"?',
        '"raw" is a block',
        '"level" is a value, not a block',
        '"owners"[1]: SPIFFE ID',
        '"named" "x" is given twice',
        '"trust_domain": is required',
    ]
    for words in expected:
        assert any(words in f for f in found), words
    assert len(found) == len(expected) + 1  # path is missing in two blocks


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('port = "8081"', True),
        ("port = 8081", True),
        ('port = "010"', True),
        ("port = 1.5", False),
        ('port = "08"', False),
        ('port = "1_0"', True),
        ('port = "_10"', False),
        ("port = true", False),
        ("trust_domain = 8081", True),
        ("trust_domain = 1.5", False),
        ("trust_domain = true", False),
        ("loose { flag = 1 }", False),
        ("loose { flag = true }", True),
        ("ids = [[1]]", False),
        ("ids = []", True),
        ("many = []", True),
        ('level = "debug"', True),
        ('level = "nope"', False),
        ('ttl = "1s"', True),
        ('ttl = "1ms"', False),
        ("ttl = 5", False),
    ],
)
def test_types_are_as_strict_as_hcl_makes_them(text: str, good: bool) -> None:
    assert (messages(f'trust_domain = "x"\n{text}') == []) is good


def test_the_nearest_literal_is_named() -> None:
    assert messages('trust_domain = "x" level = "debgu"') == [
        '1: "level": must be one of debug, info; did you mean "debug"?'
    ]


def test_a_literal_that_is_empty_unless_set_is_not_offered() -> None:
    class Modes(Model):
        mode: Literal["", "one", "two"] = ""

    (fault,) = faults(parse('mode = "three"'), Modes)
    assert fault.message == '"mode": must be one of one, two'


def test_keys_that_are_not_supported_yet_are_refused_by_name_unless_they_ask_for_nothing() -> None:
    harmless = 'trust_domain = "x" profiling = false names = [] block {}'
    assert messages(harmless) == []
    found = messages(
        'trust_domain = "x"\nprofiling = true\nnames = [1]\nblock { a = 1 }\nnever = 0'
    )
    assert len(found) == 4
    assert all("is not supported by this release yet" in f for f in found)


def test_a_tolerant_block_notes_unknown_keys() -> None:
    made = decode(parse('trust_domain = "x"\nloose { new_thing = 1 }'), Outer)
    assert made.loose.ignored() == ("new_thing",)


def test_blocks_given_twice_for_one_field_count_as_one() -> None:
    made = decode(
        parse('trust_domain="x" inner { path = "a" } inner { path = "b" number = 4 }'), Outer
    )
    assert made.inner is not None
    assert (made.inner.path, made.inner.number) == ("b", 4)


def test_labels_where_none_belong() -> None:
    assert '"inner" takes no label' in messages('trust_domain="x" inner "l" { path = "a" }')[0]
    assert '"named" takes one label' in messages('trust_domain="x" named "a" "b" { path = "a" }')[0]


def test_the_error_names_the_file() -> None:
    with pytest.raises(ConfigError, match=r"^s\.conf:1: "):
        decode(parse("port = true", "s.conf"), Outer)
