from __future__ import annotations

import pytest

from spire_hw.config.hcl import Block, Body, Integer, Item, expand_env, parse
from spire_hw.errors import ConfigError, InvalidInputError


def test_order_repeats_and_lines_are_kept() -> None:
    body = parse('a = 1\nb "x" { c = true }\n\na = 2\nb "y" {}\n', "f.conf")
    assert [(type(i).__name__, i.line) for i in body.items] == [
        ("Item", 1),
        ("Block", 2),
        ("Item", 4),
        ("Block", 5),
    ]
    assert body.get("A") == 2
    assert [b.keys for b in body.blocks("B")] == [("b", "x"), ("b", "y")]
    assert body.file == "f.conf"


def test_comments_separators_and_keys() -> None:
    body = parse(
        """
        # one
        // two
        /* three
           lines **/ a = 1  b = 2, c = 3 /* more */
        "quoted.key" = 4 dotted.key-x = 5
        """
    )
    assert [i.key for i in body.items if isinstance(i, Item)] == [
        "a",
        "b",
        "c",
        "quoted.key",
        "dotted.key-x",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-7", -7),
        ("0x1F", 31),
        ("017", 15),
        ("1.5", 1.5),
        ("-1.5e3", -1500.0),
        ("1e3", 1000.0),
        ("true", True),
        ("false", False),
        (r'"a\n\t\"\\\a\b\f\r\v"', 'a\n\t"\\\a\b\f\r\v'),
        (r'"\x41\101\u00e9\U0001F600"', "AA\u00e9\U0001f600"),
        (r'"\xc3\xa9"', "\u00e9"),
        ('"a ${ b "c" {d} } e"', 'a ${ b "c" {d} } e'),
        ('"$x $"', "$x $"),
        ("[]", []),
        ('[1, true, "x",]', [1, True, "x"]),
        ("[[1], [2]]", [[1], [2]]),
        ("<<EOF\nhi\n  there\nEOF\n", "hi\n  there\n"),
        ("<<-EOF\n    hi\n      there\n    EOF\n", "hi\n  there\n"),
        ("<<-EOF\n  hi\n    EOF\n", "  hi\n"),
        ("<<E\nEOF\nE\n", "EOF\n"),
    ],
)
def test_values(text: str, value: object) -> None:
    found = parse(f"a = {text}").get("a")
    assert found == value
    assert type(found) is type(value) or isinstance(found, Integer)


def test_a_number_remembers_how_it_was_written() -> None:
    found = parse("a = 0x1F").get("a")
    assert isinstance(found, Integer)
    assert found.text == "0x1F"


SHAPES = [
    'plugins { KeyManager "disk" { plugin_data { a = 1 } } }',
    'plugins = { KeyManager "disk" { plugin_data = { a = 1 } } }',
    "plugins { KeyManager { disk { plugin_data { a = 1 } } } }",
    'plugins { KeyManager = [{ "disk" = { plugin_data = { a = 1 } } }] }',
    '{"plugins": {"KeyManager": [{"disk": {"plugin_data": {"a": 1}}}]}}',
    '{"plugins": [{"KeyManager": [{"disk": [{"plugin_data": [{"a": 1}]}]}]}]}',
]


@pytest.mark.parametrize("text", SHAPES)
def test_all_shapes_of_a_plugin_block_mean_the_same(text: str) -> None:
    body = parse(text)
    (block,) = body.blocks("plugins")[0].body.labelled("KeyManager")
    assert block.keys == ("KeyManager", "disk")
    assert block.body.blocks("plugin_data")[0].body.get("a") == 1


def test_json_has_lines_nulls_and_escapes() -> None:
    body = parse('{\n "a": "x\\u00e9\\/",\n "n": null,\n "b": [1, 2.5, true]\n}')
    assert body.get("a") == "x\u00e9/"
    assert body.get("n") is None
    assert body.get("b") == [1, 2.5, True]
    assert body.line_of("b") == 4


def test_a_list_given_twice_is_joined_and_of_scalars_the_last_wins() -> None:
    body = parse("l = [1]\nl = [2]\ns = 1\nS = 2")
    assert body.get("l") == [1, 2]
    assert body.get("s") == 2


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a = 1\nb =", 2, "too early"),
        ("a {\n b = 1\n", 2, "closing brace"),
        ('a = "x\ny"', 1, "not closed"),
        ("a = 'x'", 1, "double quotes"),
        ("a = foo", 1, "cannot stand here"),
        ("a = 08", 1, "cannot stand here"),
        ("a = <<E\nfoo\n", 1, "heredoc"),
        ("a = /* x", 1, "comment"),
        ('a = "\\q"', 1, "escape"),
        ('a = "\\ud800"', 1, "no character"),
        ('a = "\\777"', 1, "over 255"),
        ('a = "\\xff"', 1, "UTF-8"),
        ("\n\na b = 1", 3, "cannot stand here"),
        ("true = 1", 1, "cannot be a key"),
        ("a = [1 2]", 1, "cannot stand here"),
        ("a = \0", 1, "NUL"),
        ('{"a": "\\ud800"}', 1, "surrogate"),
        ('{"a": 1} x', 1, "cannot stand here"),
        ('{"a": 01}', 1, "cannot stand here"),
        ("a = 1e999", 1, "out of range"),
        ("a = 1" + "0" * 80, 1, "too long"),
    ],
)
def test_faults_name_their_line(text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.conf")
    (fault,) = caught.value.faults
    assert fault.line == line
    assert words in fault.message
    assert caught.value.message.startswith("x.conf:")


def test_printed_text_reads_back_equal_and_never_as_a_template() -> None:
    body = Body.from_dict(
        {
            "a": 'x${y}\n"q"',
            "b": {"c": [1, True, "\u2028\x00"], "d e": 1.0},
            "l": [{"x": 1}, {"x": 2}],
        }
    )
    text = body.to_hcl()
    assert parse(text) == body
    assert "${" not in text


def test_equality_keeps_one_and_true_apart() -> None:
    assert parse("a = 1") != parse("a = true")
    assert parse("a = [1]") != parse("a = [true]")
    assert parse("a = 1") == parse("\n\na = 0x1")
    assert parse("a {}") == Body((Block(("a",), Body()),))


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$A ${A} x$A-y", "1 1 x1-y"),
        ("$UNSET|${UNSET}|", "||"),
        ("$$A $$", "$A $"),
        ("${}x ${", "x "),
        ("$ $% end$", "$ $% end$"),
        ("${$} $1x ${1}", "$ x "),
        ("${A B}", ""),
        ("$Ab_9.", "."),
        ("${A", "A"),
    ],
)
def test_environment_is_expanded_by_the_rules_of_go(text: str, expanded: str) -> None:
    assert expand_env(text, {"A": "1", "1": ""}) == expanded


def test_what_has_no_place_in_hcl_is_refused() -> None:
    with pytest.raises(InvalidInputError):
        Body.from_dict({"a": object()})
    with pytest.raises(InvalidInputError):
        Body.from_dict({"a": float("inf")}).to_hcl()
    with pytest.raises(InvalidInputError):
        Body.from_dict({"a": "\ud800"}).to_hcl()
