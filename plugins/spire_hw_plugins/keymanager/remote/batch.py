"""Signatures asked for at the same time go to the signer together.

What is asked for in one turn of the event loop leaves at its end, so that nobody waits for company. While
as many batches or signatures are under way as are allowed, the rest waits and goes together with the next:
what is urgent in batches of its own, before the others, and keys in turn, so that one busy key does not
starve another. What the signer had no room for waits again.

Where nothing is under way, many go in two halves: one is verified here while the other is signed there.
Where the one before was alone, the next goes at once, and its caller makes the call itself.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from spire_hw.aio.queues import Queues
from spire_hw.aio.tasks import Tasks
from spire_hw.errors import LimitError, SpireHwError, UnavailableError
from spire_hw_plugins.keymanager.remote.room import Room
from spire_hw_plugins.keymanager.remote.wire import IN_FLIGHT, MAX_ITEMS, Refused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import KeySignature
    from spire_hw_plugins.keymanager.remote.wire import Item

MAX_BATCH_BYTES: Final = 56 * 1024  # signers take requests of 64 KiB
MAX_WAITING: Final = 1024
MAX_UNDER_WAY: Final = 8
MAX_URGENT_UNDER_WAY: Final = 2  # besides those
_HALF: Final = 4  # fewer are not worth a call of their own
_SOON_S: Final = 0.1


class _Waiting:
    """Something to sign.

    Attributes:
        item: what.
        told: what became of it.
        until: when nobody waits for it any more, in the loop's time.
        sent_until: when the call ends that it is under way in, 0 while it waits.
        refused: why it waits again.
    """

    __slots__ = ("is_urgent", "item", "lane", "refused", "sent_until", "told", "until")

    def __init__(self, item: Item, told: asyncio.Future[KeySignature], until: float) -> None:
        self.item = item
        self.told = told
        self.until = until
        self.sent_until = 0.0
        self.refused: SpireHwError | None = None
        self.lane = item.key_id
        self.is_urgent = item.options.urgent

    @property
    def is_over(self) -> bool:
        return self.told.done()


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
        self._queues: Queues[_Waiting] = Queues()
        # In the order of their deadlines, but for what was refused; one timer serves them all.
        self._open: dict[_Waiting, None] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._opening: asyncio.TimerHandle | None = None
        self._room = Room()
        self._calls = {True: 0, False: 0}  # of what is urgent, of the rest
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
            LimitError: too much is waiting, or there is no room at the signer until it is too late.
            SpireHwError: why it was not signed.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._timeout_s
        refused = None
        if self._is_calm and self._is_idle():
            result = await self._sign_alone(item)
            if not isinstance(result, Refused):
                return result
            if result.reason != IN_FLIGHT:
                raise result.error
            refused = result
        if self._closed:
            raise UnavailableError("the key manager is closed")
        one = _Waiting(item, loop.create_future(), until)
        self._open[one] = None
        if refused is not None:
            self._wait_again([(one, refused)], 1)
        elif gone := self._queues.admit(one, MAX_WAITING):
            _fail(gone, LimitError("too many signatures wait for the signer; try again later"))
        if self._sweep is None:
            self._sweep = loop.call_at(until, self._tell_late)
        if not self._is_flush_due:
            self._is_flush_due = True
            loop.call_soon(self._flush)
        try:
            return await one.told
        finally:
            del self._open[one]

    async def close(self) -> None:
        """Fail what waits and what is under way."""
        self._closed = True
        for timer in (self._sweep, self._opening):
            if timer is not None:
                timer.cancel()
        if self._alone is not None:
            loop = asyncio.get_running_loop()
            self._alone.reschedule(loop.time())
            self._hung_up = loop.create_future()
            await self._hung_up
        await self._tasks.close()
        for one in self._open:
            _fail(one, UnavailableError("the key manager was closed"))

    def _is_idle(self) -> bool:
        return not self._room.under_way and not len(self._queues) and not self._closed

    async def _sign_alone(self, item: Item) -> KeySignature | Refused:
        """Have the only one signed that is asked for, in its caller's own task."""
        self._room.under_way += 1
        self._calls[False] += 1
        try:
            async with asyncio.timeout(None) as self._alone:
                (result,) = await self._send([item], self._timeout_s)
        except TimeoutError:
            raise UnavailableError("the key manager was closed") from None
        finally:
            self._alone = None
            self._room.under_way -= 1
            self._calls[False] -= 1
            if self._hung_up is not None and not self._hung_up.done():
                self._hung_up.set_result(None)
            self._flush()
        return result

    def _flush(self) -> None:
        self._is_flush_due = False
        if len(self._queues) and not self._closed:
            now = asyncio.get_running_loop().time()
            self._send_off(now, MAX_URGENT_UNDER_WAY, urgent=True)
            self._send_off(now, MAX_UNDER_WAY, urgent=False)

    def _send_off(self, now: float, calls: int, *, urgent: bool) -> None:
        most, waiting = MAX_ITEMS, self._queues.waiting(urgent=urgent)
        if waiting >= 2 * _HALF and not self._room.under_way:
            most = min(MAX_ITEMS, (waiting + 1) // 2)
        while waiting and self._calls[urgent] < calls:
            batch = self._next(min(most, self._room.left(now, urgent=urgent)), urgent=urgent)
            if not batch:
                return
            self._is_calm = len(batch) == 1
            self._calls[urgent] += 1
            self._room.under_way += len(batch)
            until = max([one.until for one in batch])
            for one in batch:
                one.sent_until = until
            self._tasks.start("sign", self._run(batch, self._room.under_way, until - now))
            waiting = self._queues.waiting(urgent=urgent)

    def _next(self, most: int, *, urgent: bool) -> list[_Waiting]:
        """Take as many as fit into one request, those that nobody waits for any more left out."""
        batch: list[_Waiting] = []
        size = 0
        while len(batch) < most and self._queues.waiting(urgent=urgent):
            taken = self._queues.take_of(most - len(batch), urgent=urgent)
            for number, one in enumerate(taken):
                size += one.item.size
                if batch and size > MAX_BATCH_BYTES:
                    self._put_back(taken[number:])
                    return batch
                batch.append(one)
        return batch

    def _put_back(self, taken: list[_Waiting]) -> None:
        for one in reversed(taken):
            self._queues.push(one, first=True)

    async def _run(self, batch: list[_Waiting], under_way: int, left_s: float) -> None:
        """Have a batch signed that is under way with so many signatures, itself included."""
        try:
            results = await self._send([one.item for one in batch], left_s)
        except SpireHwError as e:
            for one in batch:
                _fail(one, e)
        else:
            again = []
            for one, result in zip(batch, results, strict=True):
                if isinstance(result, Refused) and result.reason == IN_FLIGHT:
                    again.append((one, result))
                else:
                    _settle(one, result)
            if again:
                self._wait_again(again, under_way)
        finally:
            self._room.under_way -= len(batch)
            self._calls[batch[0].is_urgent] -= 1
            for one in batch:
                if one.sent_until and not one.told.done():
                    _fail(one, UnavailableError("the key manager was closed"))
            self._flush()

    def _wait_again(self, refused: list[tuple[_Waiting, Refused]], under_way: int) -> None:
        """Put back what the signer had no room for when so many were under way, itself included."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        wait_s = max(why.retry_after_s for _, why in refused)
        urgent = refused[0][0].is_urgent
        self._room.refused(len(refused), under_way, wait_s, now, urgent=urgent)
        for one, why in refused:
            one.refused, one.sent_until = why.error, 0.0
        self._put_back([one for one, _ in refused])
        if self._room.opens_at > now:
            if self._opening is not None:
                self._opening.cancel()
            self._opening = loop.call_at(self._room.opens_at, self._flush)

    def _tell_late(self) -> None:
        """Fail what has waited for its turn until its time was over."""
        self._sweep = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        for one in self._open:
            if one.until > now:
                self._sweep = loop.call_at(one.until, self._tell_late)
                break
            # A call that ends with it says why by itself.
            if not one.sent_until or one.sent_until > one.until + _SOON_S:
                _fail(one, one.refused or self._late())
        self._queues.drop_over()

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
