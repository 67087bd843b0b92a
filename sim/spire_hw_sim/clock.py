"""Time that a test moves."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from spire_hw.clock import SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.clock import Timer

# Turns of the event loop given to woken tasks between two moments.
_SETTLE_TURNS = 20


class SimClock:
    """A Clock that stands still until `advance` moves it.

    Args:
        start: first moment, aware; the present by default, so that certificates checked by
            OpenSSL against the machine's time hold too.
    """

    def __init__(self, start: datetime | None = None) -> None:
        self._now = start or SystemClock().now().replace(microsecond=0)
        self._monotonic = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def now(self) -> datetime:
        """Return the simulated time."""
        return self._now

    def monotonic(self) -> float:
        """Return simulated seconds since the clock was made."""
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock was moved this far."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._add(seconds, future)
        await future

    def call_after(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call a function when the clock was moved this far; at once when that is no way."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: None if done.cancelled() else function())
        if seconds <= 0:
            future.set_result(None)
        else:
            self._add(seconds, future)
        return future

    def _add(self, seconds: float, future: asyncio.Future[None]) -> None:
        heapq.heappush(self._sleepers, (self._monotonic + seconds, next(self._order), future))
        future.add_done_callback(self._forget)

    def _forget(self, future: asyncio.Future[None]) -> None:
        """Forget a sleeper that was given up: its time may never come."""
        if future.cancelled():
            self._sleepers = [sleeper for sleeper in self._sleepers if sleeper[2] is not future]
            heapq.heapify(self._sleepers)

    async def advance(self, step: timedelta) -> None:
        """Move the clock, waking sleepers in the order of their times."""
        target = self._monotonic + step.total_seconds()
        while self._sleepers and self._sleepers[0][0] <= target:
            at, _, future = heapq.heappop(self._sleepers)
            self._set(at)
            if not future.done():
                future.set_result(None)
            await self._settle()
        self._set(target)
        await self._settle()

    def _set(self, monotonic: float) -> None:
        self._now += timedelta(seconds=monotonic - self._monotonic)
        self._monotonic = monotonic

    async def _settle(self) -> None:
        for _ in range(_SETTLE_TURNS):
            await asyncio.sleep(0)
