"""Signatures asked for at the same time go to the signer together.

What is asked for in one turn of the event loop leaves at its end, so that nobody waits for company. While
as many batches are under way as are allowed, the rest waits and goes together with the next.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import LimitError, SpireHwError, UnavailableError
from spire_hw_plugins.keymanager.remote.wire import MAX_ITEMS, Refused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import KeySignature
    from spire_hw_plugins.keymanager.remote.wire import Item

MAX_BATCH_BYTES: Final = 56 * 1024  # signers take requests of 64 KiB
MAX_WAITING: Final = 1024
MAX_UNDER_WAY: Final = 8


class Batcher:
    """Collects signatures into batches and hands out what becomes of each."""

    def __init__(
        self,
        send: Callable[[list[Item]], Awaitable[list[KeySignature | Refused]]],
        log: Logger,
    ) -> None:
        """Describe it.

        Args:
            send: has a batch signed; an error is that of all its items.
            log: where unexpected errors go.
        """
        self._send = send
        self._waiting: deque[tuple[Item, asyncio.Future[KeySignature]]] = deque()
        self._under_way = 0
        self._is_flush_due = False
        self._closed = False
        self._log = log
        self._tasks = Tasks(self._failed)

    async def sign(self, item: Item) -> KeySignature:
        """Have one thing signed.

        Raises:
            LimitError: too much is waiting.
            SpireHwError: why it was not signed.
        """
        if self._closed:
            raise UnavailableError("the key manager is closed")
        if len(self._waiting) >= MAX_WAITING:
            raise LimitError("too many signatures wait for the signer; try again later")
        loop = asyncio.get_running_loop()
        told: asyncio.Future[KeySignature] = loop.create_future()
        self._waiting.append((item, told))
        if not self._is_flush_due:
            self._is_flush_due = True
            loop.call_soon(self._flush)
        return await told

    async def close(self) -> None:
        """Fail what waits and what is under way."""
        self._closed = True
        await self._tasks.close()
        while self._waiting:
            _, told = self._waiting.popleft()
            if not told.done():
                told.set_exception(UnavailableError("the key manager was closed"))

    def _flush(self) -> None:
        self._is_flush_due = False
        while self._under_way < MAX_UNDER_WAY and not self._closed:
            batch = self._next()
            if not batch:
                return
            self._under_way += 1
            self._tasks.start("sign", self._run(batch))

    def _next(self) -> list[tuple[Item, asyncio.Future[KeySignature]]]:
        """Take as many as fit into one request, those that nobody waits for any more left out."""
        batch: list[tuple[Item, asyncio.Future[KeySignature]]] = []
        size = 0
        while self._waiting and len(batch) < MAX_ITEMS:
            item, told = self._waiting[0]
            if not told.done():
                size += item.size
                if batch and size > MAX_BATCH_BYTES:
                    break
                batch.append((item, told))
            self._waiting.popleft()
        return batch

    async def _run(self, batch: list[tuple[Item, asyncio.Future[KeySignature]]]) -> None:
        try:
            results = await self._send([item for item, _ in batch])
        except SpireHwError as e:
            for _, told in batch:
                if not told.done():
                    told.set_exception(e)
        else:
            for (_, told), result in zip(batch, results, strict=True):
                _settle(told, result)
        finally:
            self._under_way -= 1
            for _, told in batch:
                if not told.done():
                    told.set_exception(UnavailableError("the key manager was closed"))
            self._flush()

    def _failed(self, name: str, error: BaseException) -> None:
        self._log.error("task failed", task=name, exc_info=error)


def _settle(told: asyncio.Future[KeySignature], result: KeySignature | Refused) -> None:
    if told.done():
        return
    if isinstance(result, Refused):
        told.set_exception(result.error)
    else:
        told.set_result(result)
