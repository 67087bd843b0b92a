"""Signatures asked for at the same time go to the signer together.

What is asked for in one turn of the event loop leaves at its end, so that nobody waits for company. While
as many batches are under way as are allowed, the rest waits and goes together with the next. Where
nothing is under way, many go in two halves: one is verified here while the other is signed there. Where
the one before was alone, the next goes at once, and its caller makes the call itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
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
_HALF: Final = 4  # fewer are not worth a call of their own


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Something to sign.

    Attributes:
        item: what.
        told: what became of it.
        until: when nobody waits for it any more, in the loop's time.
    """

    item: Item
    told: asyncio.Future[KeySignature]
    until: float


class Batcher:
    """Collects signatures into batches and hands out what becomes of each."""

    def __init__(
        self,
        send: Callable[[list[Item], float], Awaitable[list[KeySignature | Refused]]],
        late: Callable[[], SpireHwError],
        *,
        timeout_s: float,
        log: Logger,
    ) -> None:
        """Describe it.

        Args:
            send: has a batch signed within some seconds; an error is that of all its items.
            late: makes the error of what was not sent in time.
            timeout_s: for each signature, from when it is asked for.
            log: where unexpected errors go.
        """
        self._send = send
        self._late = late
        self._timeout_s = timeout_s
        self._waiting: deque[_Waiting] = deque()
        self._sweep: asyncio.TimerHandle | None = None
        self._under_way = 0
        self._is_flush_due = False
        self._is_calm = True  # the last to leave was alone
        self._alone: asyncio.Timeout | None = None  # of its caller: ends the call at once
        self._hung_up: asyncio.Future[None] | None = None
        self._closed = False
        self._log = log
        self._tasks = Tasks(self._failed)

    async def sign(self, item: Item) -> KeySignature:
        """Have one thing signed.

        Raises:
            LimitError: too much is waiting.
            SpireHwError: why it was not signed.
        """
        if self._is_calm and self._is_idle():
            return await self._sign_alone(item)
        if self._closed:
            raise UnavailableError("the key manager is closed")
        if len(self._waiting) >= MAX_WAITING:
            raise LimitError("too many signatures wait for the signer; try again later")
        loop = asyncio.get_running_loop()
        told: asyncio.Future[KeySignature] = loop.create_future()
        self._waiting.append(_Waiting(item, told, loop.time() + self._timeout_s))
        if not self._is_flush_due:
            self._is_flush_due = True
            loop.call_soon(self._flush)
        return await told

    async def close(self) -> None:
        """Fail what waits and what is under way."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        if self._alone is not None:
            loop = asyncio.get_running_loop()
            self._alone.reschedule(loop.time())
            self._hung_up = loop.create_future()
            await self._hung_up
        await self._tasks.close()
        while self._waiting:
            _fail(self._waiting.popleft(), UnavailableError("the key manager was closed"))

    def _is_idle(self) -> bool:
        return not self._under_way and not self._waiting and not self._closed

    async def _sign_alone(self, item: Item) -> KeySignature:
        """Have the only one signed that is asked for, in its caller's own task."""
        self._under_way += 1
        try:
            async with asyncio.timeout(None) as self._alone:
                (result,) = await self._send([item], self._timeout_s)
        except TimeoutError:
            raise UnavailableError("the key manager was closed") from None
        finally:
            self._alone = None
            self._under_way -= 1
            if self._hung_up is not None and not self._hung_up.done():
                self._hung_up.set_result(None)
            self._flush()
        if isinstance(result, Refused):
            raise result.error
        return result

    def _flush(self) -> None:
        self._is_flush_due = False
        loop = asyncio.get_running_loop()
        most = MAX_ITEMS
        if not self._under_way and len(self._waiting) >= 2 * _HALF:
            most = min(MAX_ITEMS, (len(self._waiting) + 1) // 2)
        while self._under_way < MAX_UNDER_WAY and not self._closed:
            batch = self._next(most)
            if not batch:
                return
            self._is_calm = len(batch) == 1
            self._under_way += 1
            self._tasks.start("sign", self._run(batch, batch[0].until - loop.time()))
        if self._waiting and self._sweep is None and not self._closed:
            self._sweep = loop.call_at(self._waiting[0].until, self._drop_late)

    def _drop_late(self) -> None:
        """Fail what has waited for its turn until its time was over."""
        self._sweep = None
        now = asyncio.get_running_loop().time()
        while self._waiting and self._waiting[0].until <= now:
            _fail(self._waiting.popleft(), self._late())
        self._flush()

    def _next(self, most: int) -> list[_Waiting]:
        """Take as many as fit into one request, those that nobody waits for any more left out."""
        batch: list[_Waiting] = []
        size = 0
        while self._waiting and len(batch) < most:
            first = self._waiting[0]
            if not first.told.done():
                size += first.item.size
                if batch and size > MAX_BATCH_BYTES:
                    break
                batch.append(first)
            self._waiting.popleft()
        return batch

    async def _run(self, batch: list[_Waiting], left_s: float) -> None:
        try:
            results = await self._send([one.item for one in batch], left_s)
        except SpireHwError as e:
            for one in batch:
                _fail(one, e)
        else:
            for one, result in zip(batch, results, strict=True):
                _settle(one, result)
        finally:
            self._under_way -= 1
            for one in batch:
                if not one.told.done():
                    _fail(one, UnavailableError("the key manager was closed"))
            self._flush()

    def _failed(self, name: str, error: BaseException) -> None:
        self._log.error("task failed", task=name, exc_info=error)


def _settle(one: _Waiting, result: KeySignature | Refused) -> None:
    if isinstance(result, Refused):
        _fail(one, result.error)
    elif not one.told.done():
        one.told.set_result(result)


def _fail(one: _Waiting, error: SpireHwError) -> None:
    if not one.told.done():
        one.told.set_exception(error)
