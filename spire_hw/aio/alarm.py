"""A sleep that somebody can end early."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spire_hw.clock import Clock


class Alarm:
    """One sleeper, woken by time or by `ring`; a ring while it is awake ends its next sleep."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Wake the sleeper."""
        self._rung.set()

    async def sleep(self, seconds: float) -> None:
        """Wait until time has passed or somebody rings."""
        async with asyncio.TaskGroup() as group:
            tasks = {
                group.create_task(self._clock.sleep(seconds)),
                group.create_task(self._rung.wait()),
            }
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
        self._rung.clear()
