"""Lines of a plugin's standard error: what they mean, and what they cannot do."""

from __future__ import annotations

import asyncio
import io
import json
import os
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.clock import SystemClock
from spire_hw.goplugin.stderr import (
    LOGGED_LINES,
    MAX_LINE_BYTES,
    Interpreter,
    LineLog,
    LinePipe,
)
from spire_hw.log import Level, LogSettings, Output
from spire_hw_sim.clock import SimClock


def read(*lines: str) -> list[Any]:
    interpreter = Interpreter()
    return [interpreter.read(line.encode()) for line in lines]


def hclog(**values: Any) -> str:
    return json.dumps({f"@{k}" if k in {"level", "message"} else k: v for k, v in values.items()})


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("trace", Level.TRACE),
        ("DEBUG", Level.DEBUG),
        ("info", Level.INFO),
        ("warn", Level.WARN),
        ("warning", Level.WARN),
        ("Error", Level.ERROR),
        ("critical", Level.ERROR),
        ("whatever", Level.DEBUG),
    ],
)
def test_levels_of_hclog(name: str, level: Level) -> None:
    (line,) = read(hclog(level=name, message="m", a=1))
    assert (line.level, line.message, line.fields) == (level, "m", {"a": 1})


def test_fields_keep_their_names_unless_those_are_taken() -> None:
    names = ("event", "exc_info", "subsystem_name", "_level", "plugin_name", "level", "x y", "ok")
    (line,) = read(hclog(message="m", **dict.fromkeys(names, "v")))
    assert line.fields.pop("ok") == "v"
    assert all(key.startswith("field.") for key in line.fields)
    (line,) = read('{"@message": "m", "@timestamp": "t", "@module": "core", "@caller": "a.go:1"}')
    assert line.fields == {"plugin_timestamp": "t", "module": "core", "caller": "a.go:1"}


@pytest.mark.parametrize(
    "text",
    [
        '{"@level": 1, "@message": "m"}',
        '{"@level": "info", "@message": null}',
        '{"@message": "m", "@timestamp": []}',
        '{"other": "json"}',
        '{"@message": ',
        "{" * 100_000,
        '{"@message": ' + "[" * 100_000,
        "[]",
    ],
)
def test_what_is_not_quite_hclog_is_text(text: str) -> None:
    (line,) = read(text)
    assert (line.level, line.message, line.fields) == (Level.DEBUG, text, {})


def test_plain_lines_and_crashes() -> None:
    found = read("[WARN]  careful", "note", "panic: oh", "goroutine 1:", "[INFO] up again", "note")
    assert [(line.level, line.message) for line in found] == [
        (Level.WARN, "careful"),
        (Level.DEBUG, "note"),
        (Level.ERROR, "panic: oh"),
        (Level.ERROR, "goroutine 1:"),
        (Level.INFO, "up again"),
        (Level.DEBUG, "note"),
    ]


@given(st.lists(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode))))
def test_anything_can_be_logged_and_forges_no_line(lines: list[bytes]) -> None:
    stream = io.StringIO()
    output = Output(LogSettings(level=Level.DEBUG), stream=stream)
    log = LineLog(output.logger("plugin"), SystemClock())
    for line in lines:
        log.write(line)
    written = stream.getvalue().splitlines()
    assert len(written) <= len(lines)
    assert all(line.startswith('time="') for line in written)


@given(st.dictionaries(st.text(max_size=12), st.recursive(st.text(), st.lists, max_leaves=8)))
def test_any_object_can_be_logged(values: dict[str, Any]) -> None:
    stream = io.StringIO()
    output = Output(LogSettings(level=Level.DEBUG), stream=stream)
    log = LineLog(output.logger("plugin"), SystemClock())
    log.write(json.dumps({"@message": "m", **values}).encode())
    assert stream.getvalue().count("\n") == 1


@pytest.mark.asyncio
async def test_too_many_lines_are_counted_not_written() -> None:
    stream, clock = io.StringIO(), SimClock()
    log = LineLog(Output(LogSettings(level=Level.DEBUG), stream=stream).logger("p"), clock)
    for _ in range(LOGGED_LINES + 7):
        log.write(b"x")
    assert stream.getvalue().count("msg=x") == LOGGED_LINES
    await clock.advance(timedelta(seconds=2))
    log.write(b"y")
    assert "count=7" in stream.getvalue()
    assert "msg=y" in stream.getvalue()


def test_last_words_are_fit_to_be_shown() -> None:
    log = LineLog(Output(stream=io.StringIO()).logger("p"), SystemClock())
    assert log.last_words == ""
    for text in ("one", "two", "three\x1b[2J", "four"):
        log.write(text.encode())
    assert log.last_words == "two | three\\x1b[2J | four"
    log.write(b"y" * 10_000)
    assert len(log.last_words) <= 300


@pytest.mark.asyncio
async def test_a_pipe_is_cut_into_lines_and_long_ones_into_pieces() -> None:
    taken: list[bytes] = []
    reading, writing = os.pipe()
    loop = asyncio.get_running_loop()
    _, pipe = await loop.connect_read_pipe(lambda: LinePipe(taken.append), os.fdopen(reading, "rb"))
    long = b"z" * (MAX_LINE_BYTES + 5)

    def write() -> None:
        with os.fdopen(writing, "wb") as file:
            file.write(b"a\n\nb\n" + long + b"\nlast")

    await asyncio.to_thread(write)
    await pipe.ended
    assert taken[:3] == [b"a", b"", b"b"]
    assert taken[-1] == b"last"
    assert b"".join(taken[3:-1]) == long
    assert max(map(len, taken)) == MAX_LINE_BYTES
