from __future__ import annotations

from datetime import timedelta

import pytest

from spire_hw.logsample import Sampler
from spire_hw_sim.clock import SimClock


@pytest.mark.asyncio
async def test_some_lines_then_their_number() -> None:
    clock = SimClock()
    sampler = Sampler(clock, burst=2, period_s=60.0)
    assert [sampler.admit("a") for _ in range(5)] == [0, 0, None, None, None]
    await clock.advance(timedelta(seconds=60))
    assert [sampler.admit("a") for _ in range(3)] == [3, 0, None]


def test_one_key_does_not_silence_another() -> None:
    sampler = Sampler(SimClock(), burst=1)
    assert [sampler.admit(key) for key in "aab"] == [0, None, 0]


@pytest.mark.asyncio
async def test_memory_is_bounded_and_ended_periods_make_room() -> None:
    clock = SimClock()
    sampler = Sampler(clock, burst=1, period_s=60.0, max_keys=2)
    assert [sampler.admit(key) for key in "abcd"] == [0, 0, 0, None]
    await clock.advance(timedelta(seconds=60))
    assert [sampler.admit(key) for key in "efg"] == [0, 0, 0]
