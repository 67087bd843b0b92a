"""The latest value of something, to many readers; readers see each change, not each value."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

T = TypeVar("T")


class Watch(Generic[T]):
    """A value with a version; all use is on one event loop."""

    def __init__(self, value: T) -> None:
        self._value = value
        self._version = 0
        self._waiting: dict[asyncio.Future[None], None] = {}

    @property
    def value(self) -> T:
        """Return the latest value."""
        return self._value

    @property
    def version(self) -> int:
        """Return how often the value was set."""
        return self._version

    def set(self, value: T) -> None:
        """Put a new value and wake every reader."""
        self._value = value
        self._version += 1
        waiting, self._waiting = self._waiting, {}
        for one in waiting:
            if not one.done():
                one.set_result(None)

    async def wait(self, seen: int) -> tuple[T, int]:
        """Return (value, version) as soon as the version is past `seen`."""
        while self._version == seen:
            change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[change] = None
            try:
                await change
            finally:
                self._waiting.pop(change, None)
        return self._value, self._version

    async def __aiter__(self) -> AsyncIterator[T]:
        """Yield the value now and after every change."""
        seen = self._version
        yield self._value
        while True:
            value, seen = await self.wait(seen)
            yield value
