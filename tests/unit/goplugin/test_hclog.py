"""Log lines of plugins, in the only form that Go hosts read."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.goplugin.hclog import MAX_LINE_CHARS, HclogStream, render
from spire_hw.log import Level, render_json

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
LEVELS = {"trace", "debug", "info", "warn", "error"}


@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("micros", [0, 5, 120000, 999999])
def test_our_records_become_lines_that_hosts_parse(level: Level, micros: int) -> None:
    moment = datetime(2026, 11, 22, 8, 9, 10, micros, tzinfo=UTC)
    record = json.loads(render_json(level, moment, "words", {"subsystem_name": "km", "n": 7}))
    line = json.loads(render(record))
    assert line["@timestamp"] == f"2026-11-22T08:09:10.{micros:06d}Z"
    assert line["@level"] in LEVELS
    assert (line["@message"], line["@module"], line["n"]) == ("words", "km", 7)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_KEYS = st.sampled_from(["time", "level", "msg", "@level", "@message", "@x", "a"]) | st.text()


@given(st.dictionaries(_KEYS, _JSON, max_size=8))
def test_whatever_is_logged_the_reserved_keys_are_text(record: dict[str, Any]) -> None:
    text = render(record)
    line = json.loads(text)
    assert "\n" not in text
    assert line["@level"] in LEVELS
    assert TIME.fullmatch(line["@timestamp"])
    assert all(type(line[key]) is str for key in line if key.startswith("@"))
    assert {key for key in line if key.startswith("@")} == {
        "@level",
        "@message",
        "@timestamp",
        "@module",
    }


def test_a_line_too_long_for_hosts_keeps_its_head() -> None:
    text = render({"msg": "m" * 70_000, "level": "error", "stack": "s" * 70_000})
    assert len(text) < MAX_LINE_CHARS
    line = json.loads(text)
    assert (line["@level"], line["truncated"]) == ("error", True)
    assert line["@message"].startswith("mmm")


def test_lines_that_are_no_records_are_messages() -> None:
    reading, writing = os.pipe()
    stream = HclogStream(writing)
    assert stream.writable()
    stream.write('{"msg": "a", "level": "info"}\nplain words\n[1]\n')
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = [json.loads(line) for line in pipe]
    assert [line["@message"] for line in lines] == ["a", "plain words", "[1]"]
