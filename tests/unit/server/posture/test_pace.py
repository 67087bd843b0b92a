from __future__ import annotations

from datetime import timedelta

import pytest

from spire_hw.aio.tasks import Tasks
from spire_hw_server.posture.pace import Pace, Sleeper, spread
from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio


async def test_sleepers_are_woken_in_time_and_not_before() -> None:
    clock = SimClock()
    pace, tasks = Pace(clock), Tasks(on_failure=lambda name, error: None)
    tasks.start("pace", pace.run())
    sleepers = [Sleeper() for _ in range(3)]
    for sleeper, seconds in zip(sleepers, (30, 10, 20), strict=True):
        pace.set(sleeper, seconds)
    waiting = [sleeper.waiting() for sleeper in sleepers]
    await clock.advance(timedelta(seconds=9))
    assert [w.done() for w in waiting] == [False, False, False]
    await clock.advance(timedelta(seconds=1))
    assert [w.done() for w in waiting] == [False, True, False]
    pace.set(sleepers[0], 1)
    pace.drop(sleepers[2])
    await clock.advance(timedelta(seconds=60))
    assert [w.done() for w in waiting] == [True, True, False]
    assert [s.is_due for s in sleepers] == [True, True, False]
    assert not any(s.happened for s in sleepers)
    await tasks.close()


async def test_what_happens_while_nobody_waits_is_kept() -> None:
    sleeper = Sleeper()
    sleeper.wake()
    assert sleeper.waiting().done()
    sleeper.happened = False
    again = sleeper.waiting()
    assert not again.done()
    sleeper.wake()
    sleeper.wake()
    assert again.done()


async def test_places_that_were_overtaken_do_not_pile_up() -> None:
    clock = SimClock()
    pace, tasks = Pace(clock), Tasks(on_failure=lambda name, error: None)
    sleepers = [Sleeper() for _ in range(10)]
    for number in range(20_000):
        pace.set(sleepers[number % 10], 86_400 + number)
    assert pace.places < 3000
    tasks.start("pace", pace.run())
    await clock.advance(timedelta(seconds=200_000))
    assert all(s.is_due for s in sleepers)
    assert pace.places == 0
    await tasks.close()


async def test_spread_stays_within_its_share() -> None:
    found = [spread(60, 0.1) for _ in range(2000)]
    assert min(found) >= 54
    assert max(found) <= 66
    assert len(set(found)) > 100
