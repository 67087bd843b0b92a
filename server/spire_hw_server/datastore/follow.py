"""Keeps a cache in step with the store: local writes at once, those of other servers by polling.

Changes are numbered without gaps, so whoever applied all up to a number has missed nothing; when
numbers were pruned before they were read, or run backwards because a backup was restored,
everything is loaded again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

from spire_hw.aio.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.records import Change

_PAGE: Final = 1000


class Cache(Protocol):
    """What is kept in step."""

    async def load(self) -> None:
        """Read everything anew."""
        ...

    async def apply(self, changes: Sequence[Change]) -> None:
        """Read what changed; applying a change twice does no harm."""
        ...


class Follower:
    """Drives one cache; its owner starts and closes it.

    Args:
        datastore: what is followed.
        cache: what is kept in step.
        name: for tasks and log.
        clock: time.
        log: where a store that does not answer is reported.
        poll_s: seconds between looks at what other servers did.
        full_reload_s: seconds after which everything is read anew.
    """

    def __init__(
        self,
        datastore: Datastore,
        cache: Cache,
        *,
        name: str,
        clock: Clock,
        log: Logger,
        poll_s: float,
        full_reload_s: float,
    ) -> None:
        self._datastore = datastore
        self._cache = cache
        self._name = name
        self._clock = clock
        self._log = log
        self._poll_s = poll_s
        self._full_reload_s = full_reload_s
        self._after = 0
        self._loaded_at = 0.0
        self._failing = False
        self._lock = asyncio.Lock()
        self._tasks = Tasks(self._failed)

    async def start(self) -> None:
        """Load everything, then follow in the background.

        Raises:
            SpireHwError: the store cannot be read.
        """
        async with self._lock:
            await self._load()
        self._tasks.start(f"{self._name} poll", self._poll())
        self._tasks.start(f"{self._name} local", self._follow_local())

    async def refresh(self) -> None:
        """Catch up with everything that was committed before the call.

        Raises:
            SpireHwError: the store cannot be read.
        """
        async with self._lock:
            if self._clock.monotonic() - self._loaded_at >= self._full_reload_s:
                await self._load()
                return
            while await self._step():
                pass

    async def refresh_own(self) -> None:
        """Catch up with what was written through this store object before the call.

        From memory where nothing was written elsewhere meanwhile.

        Raises:
            SpireHwError: the store cannot be read.
        """
        wanted = self._datastore.changed.value
        if self._after >= wanted:
            return
        async with self._lock:
            while self._after < wanted:
                changes = self._datastore.recent_changes(self._after)
                if changes:
                    await self._cache.apply(changes)
                    self._after = changes[-1].event_id
                elif not await self._step():
                    break

    async def close(self) -> None:
        """Stop following."""
        await self._tasks.close()

    async def _step(self) -> bool:
        """Apply one page of changes; tell whether there may be more."""
        changes = await self._datastore.list_changes(self._after, _PAGE)
        if not changes:
            last = await self._datastore.last_change()
            if last == self._after:
                return False
            changes = await self._datastore.list_changes(self._after, _PAGE)
        if not changes or changes[0].event_id != self._after + 1:
            self._log.info(
                "Changes were pruned or rolled back, loading everything", cache=self._name
            )
            await self._load()
            return False
        await self._cache.apply(changes)
        self._after = changes[-1].event_id
        return len(changes) == _PAGE

    async def _load(self) -> None:
        mark = await self._datastore.last_change()
        await self._cache.load()
        self._after = mark
        self._loaded_at = self._clock.monotonic()

    async def _poll(self) -> None:
        while True:
            await self._clock.sleep(self._poll_s)
            await self._try(self.refresh)

    async def _follow_local(self) -> None:
        changed = self._datastore.changed
        seen = changed.version
        while True:
            _, seen = await changed.wait(seen)
            if changed.value > self._after:
                await self._try(self.refresh_own)

    async def _try(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as e:  # noqa: BLE001 - a cache that stopped following would be worse
            if not self._failing:
                self._log.error("Cannot follow the datastore", cache=self._name, error=str(e))
            self._failing = True
        else:
            if self._failing:
                self._log.info("Following the datastore again", cache=self._name)
            self._failing = False

    def _failed(self, task: str, error: BaseException) -> None:
        self._log.error("Task ended unexpectedly", task=task, error=str(error))
