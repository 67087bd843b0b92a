"""What others sent is shown to operators as text and never obeyed by their terminals."""

from __future__ import annotations

import json

import pytest

from spire_hw.cli.output import dump, shown, table

STEERING = ["\x1b[2J", "\x9b31m", "a\rb", "a\nSPIFFE ID : forged", "\x07", "\u202e", "\u2028", "\x7f", "\0"]  # fmt: skip


@pytest.mark.parametrize("text", STEERING)
def test_a_table_keeps_to_its_lines(text: str) -> None:
    made = table([("Hint", text), ("Selector", f"unix:path:{text}")], 10)
    assert made.count("\n") == 2
    assert all(line.isprintable() for line in made.split("\n"))


@pytest.mark.parametrize("text", STEERING)
def test_json_is_escaped_and_still_the_same_value(text: str) -> None:
    made = dump({"hint": text})
    assert made.isprintable()
    assert json.loads(made) == {"hint": text}


def test_other_languages_stay_readable() -> None:
    assert shown("Schlüssel 鍵 🔑") == "Schlüssel 鍵 🔑"
    assert dump({"a": "鍵"}) == '{"a":"鍵"}'
