"""What time is it: the only door to the system clock."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Timer(Protocol):
    """A call that is still to be made."""

    def cancel(self) -> object:
        """Make sure it is not made any more."""
        ...


class Clock(Protocol):
    """A source of time that tests can move."""

    def now(self) -> datetime:
        """Return the current time, aware, in UTC."""
        ...

    def monotonic(self) -> float:
        """Return seconds from an arbitrary start that never go back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait at least `seconds` seconds of this clock."""
        ...

    def call_after(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call a function in the running event loop, at least `seconds` seconds from now."""
        ...


class SystemClock:
    """The machine's own time."""

    def now(self) -> datetime:
        """Return the current time, aware, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Return seconds from an arbitrary start that never go back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait at least `seconds` seconds."""
        await asyncio.sleep(max(0.0, seconds))

    def call_after(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call a function in the running event loop, at least `seconds` seconds from now."""
        return asyncio.get_running_loop().call_later(max(0.0, seconds), function)


class Jumps:
    """Tells how far a clock was set, by hand or by the network, since this was made."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._before = self._offset()

    @property
    def seconds(self) -> float:
        """Return how far the time is from where it would be had it gone on; never below 0."""
        return abs(self._offset() - self._before)

    def _offset(self) -> float:
        """Return what does not change while the clock goes as it should."""
        return self._clock.now().timestamp() - self._clock.monotonic()
