from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from spire_hw.aio.alarm import Alarm
from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio


async def test_time_or_a_ring_ends_the_sleep() -> None:
    clock = SimClock()
    alarm = Alarm(clock)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        sleeping = group.create_task(alarm.sleep(60))
        await clock.advance(timedelta())  # it lies down
        await clock.advance(timedelta(seconds=59))
        assert not sleeping.done()
        await clock.advance(timedelta(seconds=1))
        await sleeping
        sleeping = group.create_task(alarm.sleep(60))
        await clock.advance(timedelta(seconds=1))
        alarm.ring()
        await sleeping


async def test_a_ring_while_awake_ends_the_next_sleep_only() -> None:
    clock = SimClock()
    alarm = Alarm(clock)
    alarm.ring()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        await alarm.sleep(60)
        second = group.create_task(alarm.sleep(60))
        await clock.advance(timedelta())  # it lies down
        await clock.advance(timedelta(seconds=59))
        assert not second.done()
        await clock.advance(timedelta(seconds=1))


async def test_a_cancelled_sleep_ends() -> None:
    alarm = Alarm(SimClock())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await alarm.sleep(60)
