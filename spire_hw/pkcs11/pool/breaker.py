"""A token that failed is tried by one worker at a time, and not all the time.

Closed while signatures are made. The first failure opens it: one worker may start anew at once and
has to sign something; while it fails it may try again only every so often, and the others wait. So
a device that is down gets one initialisation and one login in that time, whatever the number of
workers and callers.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Breaker:
    """Decides which worker may start, and when.

    Args:
        every_s: seconds between two tries while the token fails.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._is_open = False
        self._prober = ""
        self._next = 0.0
        self._changed = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Tell whether the token failed and has signed nothing since."""
        return self._is_open

    def failed(self, name: str) -> None:
        """Note that a worker's token failed, or that the worker ended before it signed."""
        now = asyncio.get_running_loop().time()
        if not self._is_open:
            self._is_open, self._prober, self._next = True, "", now
        elif name == self._prober:
            self._next = now + self._every_s

    def signed(self) -> None:
        """Note that a worker's token has signed."""
        if self._is_open:
            self._is_open, self._prober = False, ""
            self._wake()

    def must_wait(self, name: str) -> bool:
        """Tell whether a worker that asked for permission would not get it now."""
        if not self._is_open or self._prober == "":
            return False
        return name != self._prober or self._next > asyncio.get_running_loop().time()

    async def permit(self, name: str) -> None:
        """Return when a worker may start."""
        while self._is_open:
            if self._prober in {"", name}:
                self._prober = name
                left = self._next - asyncio.get_running_loop().time()
                if left <= 0.0:
                    return
                await self._wait(left)
            else:
                await self._wait(None)

    async def _wait(self, limit_s: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
