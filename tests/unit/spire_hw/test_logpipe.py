from __future__ import annotations

import io
import os
import socket
from typing import TYPE_CHECKING

import pytest

from spire_hw.log import LogSettings, Output
from spire_hw.logpipe import LinePipe, may_block

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def drain(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    found = b""
    try:
        while data := os.read(descriptor, 1 << 20):
            found += data
    except BlockingIOError:
        return found
    return found


def test_lines_of_any_size_arrive_whole(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    line = b"x" * 20_000 + b"\n"
    assert LinePipe(writing).write(line)
    assert drain(reading) == line


def test_a_reader_that_stopped_costs_lines_and_no_more(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    lines = LinePipe(writing, patience_ms=1)
    count = 0
    while lines.write(b"%06d %s\n" % (count, b"x" * 1500)):
        count += 1
    assert not lines.write(b"lost\n")
    held = drain(reading)
    assert lines.write(b"again\n")
    rest = drain(reading)
    found = [line.split(b" ")[0] for line in held.splitlines()]
    assert found[:count] == [b"%06d" % n for n in range(count)]
    assert rest.endswith(b"\nagain\n" if len(found) > count else b"again\n")
    assert b"lost" not in held + rest


def test_nobody_reads_any_more() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        LinePipe(writing).write(b"line\n")
    os.close(writing)


def test_what_may_block(pipe: tuple[int, int], tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, (tmp_path / "file").open("wb") as file:
        assert may_block(pipe[1])
        assert may_block(ours.fileno())
        assert not may_block(file.fileno())


def test_lost_lines_are_counted_once_the_reader_goes_on(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with io.TextIOWrapper(os.fdopen(os.dup(writing), "wb")) as stream:
        output = Output(LogSettings(), stream=stream)
        log = output.logger("test")
        for _ in range(200):
            log.info("x" * 1000)
        held = drain(reading)
        log.info("after")
        rest = drain(reading).decode()
    arrived = held.decode().count("\n")
    assert arrived < 200
    told = next(line for line in rest.splitlines() if "Log lines were lost" in line)
    assert f"count={200 - arrived}" in told
    assert "msg=after" in rest
