"""The workers of one token: signatures queue up and go out in batches, the rest is asked one by one.

One worker is kept for slow work (listing, generating, destroying), so that a key generation of some
seconds holds no signature up; the others sign. The queue is bounded and takes keys in turn, so that
one busy key does not starve another.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import EncodingError, ErrorKind, LimitError, SpireHwError, UnavailableError
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.seat import Opening, Seat, TokenFacts
from spire_hw.pkcs11.wire import (
    MAX_BATCH,
    Kind,
    SignItem,
    decode_json,
    decode_results,
    encode_items,
    encode_json,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.log import Logger
    from spire_hw.pkcs11.keys import SignRequest
    from spire_hw.pkcs11.process import Finish

_DRAIN_S: Final = 5.0
_ADMIN_WAIT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a pool.

    Attributes:
        workers: signing workers.
        queue: signatures waiting for a worker.
        start_s: seconds that the token may be away at start.
        sign_s: seconds a batch may take in the token before the worker is killed.
        wait_s: seconds a caller waits at most.
        generate_s: seconds a key generation may take.
        control_s: seconds any other request may take.
    """

    workers: int = 1
    queue: int = 1024
    start_s: float = 30.0
    sign_s: float = 10.0
    wait_s: float = 30.0
    generate_s: float = 120.0
    control_s: float = 30.0


@dataclass(slots=True, eq=False)
class _Job:
    item: SignItem
    finish: Finish
    future: asyncio.Future[bytes]
    retried: bool = False


class Pool:
    """Workers logged in to one token."""

    def __init__(self, opening: Opening, limits: Limits, log: Logger) -> None:
        self._limits = limits
        self._log = log
        turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._admin = Seat("admin", opening, turn, self._on_change, log)
        self._seats = [
            Seat(f"sign-{n}", opening, turn, self._on_change, log) for n in range(limits.workers)
        ]
        self._tasks = Tasks(self._on_task_failure)
        self._checkers = ThreadPoolExecutor(limits.workers, thread_name_prefix="hsm-check")
        self._queues: OrderedDict[bytes, deque[_Job]] = OrderedDict()
        self._queued = 0
        self._flushing = False
        self._open_jobs: set[_Job] = set()
        self._closed = False

    @property
    def facts(self) -> TokenFacts:
        """Return what is known about the token.

        Raises:
            UnavailableError: it was never opened.
        """
        if self._admin.facts is None:
            raise UnavailableError("token was never opened")
        return self._admin.facts

    @property
    def limits(self) -> Limits:
        """Return the bounds."""
        return self._limits

    @property
    def worker_pids(self) -> list[int]:
        """Return the process ids of the workers that run, the admin worker first."""
        return [s.worker.pid for s in (self._admin, *self._seats) if s.worker is not None]

    async def start(self) -> TokenFacts:
        """Start all workers, one after the other: the first login decides about the rest.

        Raises:
            TokenError: what stands against it; nothing is left running.
        """
        try:
            for seat in (self._admin, *self._seats):
                self._tasks.start(f"hsm-{seat.name}", seat.run())
                await self._until_ready(seat)
        except BaseException:
            await self.close()
            raise
        return self.facts

    async def _until_ready(self, seat: Seat) -> None:
        try:
            async with asyncio.timeout(self._limits.start_s):
                while not seat.is_ready:
                    if seat.problem is not None and seat.problem.cure is not Cure.RESTART:
                        raise seat.problem
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise seat.problem or self._no_worker("open token") from None

    async def sign(self, key: bytes, request: SignRequest, finish: Finish) -> bytes:
        """Sign with a key and return what `finish` makes of the token's output.

        Args:
            key: CKA_ID.
            request: mechanism and data.
            finish: turns raw output into a checked signature; runs in a thread.

        Raises:
            LimitError: the queue is full.
            TokenError: the token failed; `DEADLINE_EXCEEDED` when it hung.
            SpireHwError: what `finish` raises.
        """
        if self._closed:
            raise UnavailableError("pkcs11 key manager is closed")
        self._check_usable()
        if self._queued >= self._limits.queue:
            raise LimitError(f"signing queue full ({self._limits.queue})")
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        job = _Job(SignItem(key, request), finish, future)
        self._open_jobs.add(job)
        self._push(job)
        try:
            async with asyncio.timeout(self._limits.wait_s):
                return await future
        except TimeoutError as e:
            raise TokenError(
                f"no signature within {self._limits.wait_s:g} s",
                reason="hsm.deadline",
                operation="sign",
                kind=ErrorKind.DEADLINE_EXCEEDED,
            ) from e
        finally:
            self._open_jobs.discard(job)

    async def ask(
        self, kind: Kind, fields: dict[str, Any], *, what: str, limit_s: float = 0.0
    ) -> dict[str, Any]:
        """Have the admin worker do something.

        A listing is repeated once on a fresh worker; nothing else is, see `TokenError.cure`.

        Raises:
            TokenError: it could not be done.
        """
        limit = limit_s or self._limits.control_s
        try:
            return await self._ask_once(kind, fields, what, limit)
        except TokenError as e:
            if kind is not Kind.LIST or e.cure is not Cure.RESTART:
                raise
        return await self._ask_once(kind, fields, what, limit)

    async def _ask_once(
        self, kind: Kind, fields: dict[str, Any], what: str, limit_s: float
    ) -> dict[str, Any]:
        seat = self._admin
        try:
            async with asyncio.timeout(_ADMIN_WAIT_S):
                while not seat.is_ready:
                    if self._closed or (seat.is_broken and seat.problem is not None):
                        raise seat.problem or self._no_worker(what)
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise seat.problem or self._no_worker(what) from None
        worker = seat.worker
        if worker is None:
            raise self._no_worker(what)
        try:
            answer = await worker.ask(kind, encode_json(fields), limit_s=limit_s, what=what)
            return decode_json(answer)
        except TokenError as e:
            if e.cure is Cure.RESTART:
                worker.kill(e)
            raise

    def recycle(self) -> None:
        """Replace the signing workers: some libraries never see objects made by another process."""
        for seat in self._seats:
            if seat.worker is not None:
                seat.worker.kill()

    async def close(self) -> None:
        """Take no new work, let what is queued finish for a while, end every worker."""
        if self._closed:
            return
        self._closed = True
        waiting = [job.future for job in self._open_jobs]
        if waiting and any(seat.is_ready for seat in self._seats):
            await asyncio.wait(waiting, timeout=_DRAIN_S)
        gone = UnavailableError("pkcs11 key manager is closed")
        for job in list(self._open_jobs):
            _settle(job.future, gone)
        workers = [seat.release() for seat in (self._admin, *self._seats)]
        await asyncio.gather(*(w.close(_DRAIN_S) for w in workers if w is not None))
        await self._tasks.close()
        self._changed.set()
        self._checkers.shutdown(wait=False, cancel_futures=True)

    def _on_change(self) -> None:
        self._changed.set()
        if all(seat.is_broken for seat in self._seats):
            # Nobody is left to serve the queue: tell the callers now, not when they give up.
            problem = next((s.problem for s in self._seats if s.problem is not None), None)
            for job in self._take(self._queued):
                _settle(job.future, problem or self._no_worker("sign"))
        self._schedule()

    def _on_task_failure(self, name: str, error: BaseException) -> None:
        self._log.error("hsm.supervisor_failed", task=name, error=type(error).__name__)

    def _no_worker(self, what: str) -> TokenError:
        return TokenError(
            "no hsm worker is ready",
            reason="hsm.no_worker",
            operation=what,
            cure=Cure.RESTART,
            kind=ErrorKind.UNAVAILABLE,
        )

    def _check_usable(self) -> None:
        if all(seat.is_broken for seat in self._seats):
            raise self._seats[0].problem or self._no_worker("sign")

    def _push(self, job: _Job, *, first: bool = False) -> None:
        queue = self._queues.setdefault(job.item.key, deque())
        if first:
            queue.appendleft(job)
        else:
            queue.append(job)
        self._queued += 1
        self._schedule()

    def _schedule(self) -> None:
        # Later in this turn of the loop, so that callers that run now end up in one batch.
        if not self._flushing and self._queued:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        while self._queued:
            ready = [seat for seat in self._seats if seat.has_room]
            if not ready:
                return
            seat = min(ready, key=lambda s: s.worker.depth if s.worker is not None else 0)
            share = -(-self._queued // len(ready))
            batch = self._take(min(share, seat.batch_limit(MAX_BATCH)))
            if batch:
                self._send(seat, batch)

    def _take(self, most: int) -> list[_Job]:
        batch: list[_Job] = []
        while self._queues and len(batch) < most:
            key, queue = next(iter(self._queues.items()))
            job = queue.popleft()
            self._queued -= 1
            if queue:
                self._queues.move_to_end(key)
            else:
                del self._queues[key]
            if not job.future.done():
                batch.append(job)
        return batch

    def _send(self, seat: Seat, batch: list[_Job]) -> None:
        if seat.worker is None:
            raise self._no_worker("sign")
        answer = seat.worker.ask(
            Kind.SIGN,
            encode_items([job.item for job in batch]),
            limit_s=self._limits.sign_s,
            what="sign",
        )
        now = asyncio.get_running_loop().time()
        answer.add_done_callback(partial(self._answered, seat, batch, now))

    def _answered(
        self, seat: Seat, batch: list[_Job], sent_at: float, answer: asyncio.Future[bytes]
    ) -> None:
        error = answer.exception()
        results: Sequence[bytes | TokenError]
        if error is not None:
            failure = error if isinstance(error, TokenError) else TokenError.of(error, "sign")
            results = [failure] * len(batch)
        else:
            loop = asyncio.get_running_loop()
            seat.measured(sent_at, loop.time(), len(batch))
            try:
                results = decode_results(answer.result(), len(batch))
            except EncodingError as e:
                results = [TokenError.of(e, "sign")] * len(batch)
                self._discard(seat, None)
        lost = next((r for r in results if isinstance(r, TokenError) and _is_lost(r)), None)
        if lost is not None:
            self._discard(seat, lost)
        good: list[tuple[_Job, bytes]] = []
        for job, result in zip(batch, results, strict=True):
            if isinstance(result, bytes):
                good.append((job, result))
            else:
                self._failed(job, result)
        self._schedule()
        if good and not self._closed:
            self._check(seat, good)
        elif good:
            for job, _ in good:
                _settle(job.future, UnavailableError("pkcs11 key manager is closed"))

    def _check(self, seat: Seat, good: list[tuple[_Job, bytes]]) -> None:
        finished = asyncio.get_running_loop().run_in_executor(self._checkers, _finish_all, good)
        finished.add_done_callback(partial(self._checked, seat, [job for job, _ in good]))

    def _checked(
        self,
        seat: Seat,
        jobs: list[_Job],
        finished: asyncio.Future[list[bytes | SpireHwError]],
    ) -> None:
        if finished.cancelled():
            return
        wrong = False
        for job, result in zip(jobs, finished.result(), strict=True):
            _settle(job.future, result)
            wrong = wrong or not isinstance(result, bytes)
        if wrong:
            # A token or worker that made one wrong signature is not asked again as it is.
            self._log.error("hsm.bad_signature", worker=seat.name)
            self._discard(seat, None)

    def _failed(self, job: _Job, error: TokenError) -> None:
        if _is_lost(error) and not job.retried and not self._closed and not job.future.done():
            job.retried = True
            self._push(job, first=True)
            return
        _settle(job.future, error)

    def _discard(self, seat: Seat, why: TokenError | None) -> None:
        if seat.worker is not None and seat.worker.is_alive:
            seat.worker.kill(why)


def _is_lost(error: TokenError) -> bool:
    return error.cure in {Cure.RESTART, Cure.SESSION, Cure.KEY}


def _settle(future: asyncio.Future[bytes], result: bytes | SpireHwError) -> None:
    if future.done():
        return
    if isinstance(result, bytes):
        future.set_result(result)
    else:
        future.set_exception(result)


def _finish_all(good: list[tuple[_Job, bytes]]) -> list[bytes | SpireHwError]:
    results: list[bytes | SpireHwError] = []
    for job, raw in good:
        try:
            results.append(job.finish(raw))
        except SpireHwError as e:
            results.append(e)
        except Exception as e:  # noqa: BLE001 - one odd signature must not fail its neighbours
            results.append(TokenError.of(e, "check signature"))
    return results
