"""Time that nobody turns."""

from __future__ import annotations

from datetime import timedelta

import pytest

from spire_hw_signer.steady import MAX_SKEW_S, SteadyTime
from spire_hw_sim.clock import SimClock


class Wall(SimClock):
    """A clock whose wall time can be set."""

    def set(self, by: timedelta) -> None:
        self._now += by


@pytest.mark.asyncio
async def test_it_goes_on_whatever_the_wall_clock_does() -> None:
    clock = Wall()
    steady = SteadyTime(clock)
    began = steady.now()
    assert began == clock.now().timestamp()
    clock.set(timedelta(days=-400))
    await clock.advance(timedelta(seconds=5))
    assert steady.now() == began + 5
    assert not steady.is_sane()
    clock.set(timedelta(days=400))
    assert steady.is_sane()


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_little_skew_is_borne(sign: int) -> None:
    clock = Wall()
    steady = SteadyTime(clock)
    clock.set(timedelta(seconds=sign * MAX_SKEW_S))
    assert steady.is_sane()
    clock.set(timedelta(seconds=sign))
    assert not steady.is_sane()
    steady.anchor()
    assert steady.is_sane()


def test_a_wall_clock_before_what_was_noted_is_not_believed() -> None:
    clock = Wall()
    steady = SteadyTime(clock)
    noted = clock.now().timestamp() + 3600
    steady.anchor(noted)
    assert steady.now() == noted
    assert not steady.is_sane()
