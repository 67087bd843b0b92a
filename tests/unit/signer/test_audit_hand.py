"""The thread that writes the audit log: one thing after the other, and nothing is left of it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from spire_hw_signer.audit.hand import Hand

pytestmark = pytest.mark.asyncio


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_what_came_of_the_work_is_told_in_the_loop() -> None:
    told: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    threads = []

    def work(file: str, data: bytes) -> str:
        threads.append(threading.current_thread().name)
        return f"{file} {data.decode()}"

    def done(result: str) -> None:
        told.put_nowait((result, threading.current_thread().name))

    hand = Hand(work, done)
    hand.start()
    for number in range(50):
        hand.take("file", b"%d" % number)
        assert await told.get() == (f"file {number}", threading.main_thread().name)
    await hand.close()
    assert set(threads) == {"audit log"}


async def test_closing_waits_for_what_is_under_way_and_leaves_nothing() -> None:
    before = descriptors()
    gate = threading.Event()
    told: list[str] = []

    def work(file: str, _data: bytes) -> str:
        gate.wait(30)
        return file

    hand = Hand(work, told.append)
    hand.start()
    hand.take("one", b"")
    closing = asyncio.gather(hand.close())
    await asyncio.sleep(0.01)
    assert (closing.done(), told) == (False, [])
    gate.set()
    await closing
    assert told == ["one"]
    assert descriptors() == before


async def test_one_that_was_not_started_is_closed_as_well() -> None:
    def work(file: str, _data: bytes) -> str:
        return file

    told: list[str] = []
    await Hand(work, told.append).close()
    assert told == []
