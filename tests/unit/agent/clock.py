"""A clock that knows who slept how long."""

from __future__ import annotations

from typing_extensions import override

from spire_hw_sim.clock import SimClock


class WatchedClock(SimClock):
    """Simulated time; `slept` are the seconds asked for, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    @override
    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await super().sleep(seconds)
