"""A connection to the server that ends only when the calls on it have."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.rpc.client import Channel

_GRACE_S = 5.0


class Connection:
    """A channel that lets the calls on it finish before it goes."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def use(self) -> Iterator[Channel]:
        """Hold the channel for one call."""
        self._calls += 1
        self._idle.clear()
        try:
            yield self.channel
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def retire(self) -> None:
        """Wait a while for the calls in progress, then close."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await self._idle.wait()
        await self.channel.close()
