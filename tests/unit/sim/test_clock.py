from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from spire_hw.clock import SystemClock
from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio


async def test_calls_are_made_when_the_clock_was_moved_that_far() -> None:
    clock = SimClock()
    made: list[str] = []
    clock.call_after(2, lambda: made.append("second"))
    clock.call_after(1, lambda: made.append("first"))
    clock.call_after(1, lambda: made.append("never")).cancel()
    await clock.advance(timedelta(seconds=0.9))
    assert made == []
    await clock.advance(timedelta(seconds=1.1))
    assert made == ["first", "second"]
    clock.call_after(0, lambda: made.append("now"))
    await asyncio.sleep(0)
    assert made[-1] == "now"


async def test_the_machine_calls_too() -> None:
    called = asyncio.Event()
    SystemClock().call_after(0.01, called.set)
    async with asyncio.timeout(10):
        await called.wait()
