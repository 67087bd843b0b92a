from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spire_hw.config.hcl import Body, Item, Value, parse
from spire_hw.errors import ConfigError

CASES = json.loads((Path(__file__).parents[3] / "vectors" / "hcl" / "cases.json").read_text())

# Upstream's reader takes these, ours does not: cut-off text, text after the end of a JSON file,
# bytes that are no text, and numbers run together with what follows.
STRICTER = {
    "a =", "a=1b=2", "a=.5", '{"a":1,}', '{"a":1}x', 'a="\\377"', 'a="\\xff"', 'a="\\uD800"',
    "a=[[1][2]]",
}  # fmt: skip
# Ours takes these: an editor's byte order mark, null in JSON (nothing), a number for later checks.
LOOSER = {"\ufeffa=1", '{"a":[1,"x",true,null]}', "a = 99999999999999999999"}
DIFFERENT = {'{"a":null}'}


def as_go(body: Body) -> dict[str, Any]:
    """Return a tree in the shape of a Go map: each block a list of objects."""
    found: dict[str, Any] = {}
    for item in body.items:
        if isinstance(item, Item):
            found[item.key] = value_as_go(item.value)
            continue
        inner = as_go(item.body)
        for key in reversed(item.keys[1:]):
            inner = {key: [inner]}
        before = found.get(item.keys[0])
        found[item.keys[0]] = [*before, inner] if isinstance(before, list) else [inner]
    return found


def value_as_go(value: Value) -> Any:
    if isinstance(value, list):
        return [as_go(v) if isinstance(v, Body) else value_as_go(v) for v in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_what_upstreams_reader_makes_of_it(case: dict[str, Any]) -> None:
    text, expected = case["text"], case["value"]
    try:
        found = as_go(parse(text))
    except ConfigError:
        assert expected is None or text in STRICTER
        return
    if text in LOOSER | DIFFERENT:
        return
    assert found == expected
