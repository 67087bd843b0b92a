"""When heartbeats are due: one timer for all streams."""

from __future__ import annotations

import asyncio
import heapq
import secrets
from typing import TYPE_CHECKING, Final

from spire_hw.aio.alarm import Alarm

if TYPE_CHECKING:
    from spire_hw.clock import Clock

_IDLE_S: Final = 3600.0
_STEPS: Final = 1000
# Entries that were overtaken are swept out when there are so many.
_LEAST_SWEEP: Final = 1024


def spread(seconds: float, share: float) -> float:
    """Return a time that lies evenly within a share of it, up or down."""
    return seconds * (1 + share * (2 * secrets.randbelow(_STEPS + 1) / _STEPS - 1))


class Sleeper:
    """One stream that waits; woken when it is due, or because something happened.

    Attributes:
        is_due: its time has come, since it was set last.
        happened: somebody else woke it; taken back by who looked what it was.
    """

    __slots__ = ("_waiting", "due", "happened", "is_due")

    def __init__(self) -> None:
        self.due: float | None = None
        self.is_due = False
        self.happened = False
        self._waiting: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """End the wait; what happens while nobody waits is kept."""
        self.happened = True
        self.tell()

    def tell(self) -> None:
        """Let who waits look again."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def waiting(self) -> asyncio.Future[None]:
        """Return what ends when the sleeper is due or woken."""
        self._waiting = asyncio.get_running_loop().create_future()
        if self.happened or self.is_due:
            self._waiting.set_result(None)
        return self._waiting


class Pace:
    """Wakes sleepers; `run` belongs to a task of its own."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._alarm = Alarm(clock)
        self._queue: list[tuple[float, int, Sleeper]] = []
        self._count = 0
        self._sweep_at = _LEAST_SWEEP

    @property
    def places(self) -> int:
        """Return how many entries there are, those that were overtaken among them."""
        return len(self._queue)

    async def run(self) -> None:
        """Wake whoever is due; ends only when cancelled."""
        while True:
            now = self._clock.monotonic()
            while self._queue and self._queue[0][0] <= now:
                due, _, sleeper = heapq.heappop(self._queue)
                if sleeper.due == due:
                    sleeper.due = None
                    sleeper.is_due = True
                    sleeper.tell()
            await self._alarm.sleep(self._queue[0][0] - now if self._queue else _IDLE_S)

    def set(self, sleeper: Sleeper, seconds: float) -> None:
        """Wake a sleeper after some time, instead of when it was to be woken before."""
        self._count += 1
        sleeper.is_due = False
        sleeper.due = self._clock.monotonic() + seconds
        if len(self._queue) >= self._sweep_at:
            self._queue = [entry for entry in self._queue if entry[2].due == entry[0]]
            heapq.heapify(self._queue)
            self._sweep_at = max(_LEAST_SWEEP, 2 * len(self._queue))
        heapq.heappush(self._queue, (sleeper.due, self._count, sleeper))
        if self._queue[0][2] is sleeper:
            self._alarm.ring()

    def drop(self, sleeper: Sleeper) -> None:
        """Forget a sleeper; its place goes when its time comes."""
        sleeper.due = None
        sleeper.is_due = False
