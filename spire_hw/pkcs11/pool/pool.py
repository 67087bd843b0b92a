"""The workers of one token: signatures queue up and go out in batches, the rest is asked one by one.

One worker is kept for slow work (listing, generating, destroying), so that a key generation of some
seconds holds no signature up; the others sign. The queue is bounded, takes what is urgent first and
then keys in turn, so that one busy key does not starve another. What the token made is verified
before anybody gets it, and not by the process that holds the token's library.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.pool.backlog import Backlog, Job
from spire_hw.pkcs11.pool.breaker import Breaker
from spire_hw.pkcs11.pool.pin import BY_HAND_S
from spire_hw.pkcs11.pool.seat import Opening, Seat, TokenFacts
from spire_hw.pkcs11.pool.verifying import Verifying
from spire_hw.pkcs11.wire import (
    MAX_BATCH,
    Kind,
    SignItem,
    decode_json,
    decode_results,
    encode_items,
    encode_json,
)
from spire_hw.telemetry.metrics import NO_METRICS, count_fault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.log import Logger
    from spire_hw.pkcs11.profile import Profile
    from spire_hw.telemetry.metrics import Metrics

_DRAIN_S: Final = 5.0
_ADMIN_WAIT_S: Final = 10.0
_PROBE_EVERY_S: Final = 1.0
_SHOW_EVERY_S: Final = 1.0
# Faults of a worker, not of the token it holds.
_OF_WORKER: Final = frozenset({"hsm.worker_died", "hsm.worker_hung", "hsm.worker_replaced"})
_HUNG: Final = "hsm.worker_hung"
_NO_SESSION: Final = "hsm.session_count"


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
        probe_s: seconds between two tries with a token that fails whenever it is used.
    """

    workers: int = 1
    queue: int = 1024
    start_s: float = 30.0
    sign_s: float = 10.0
    wait_s: float = 30.0
    generate_s: float = 120.0
    control_s: float = 30.0
    probe_s: float = 30.0


class Pool:
    """Workers logged in to one token.

    Attributes:
        metrics: takes what is measured of the token.
    """

    def __init__(
        self, opening: Opening, limits: Limits, log: Logger, metrics: Metrics = NO_METRICS
    ) -> None:
        self.metrics = metrics
        self._limits = limits
        self._log = log
        self._start_s = limits.start_s + (BY_HAND_S if opening.guard.by_hand else 0.0)
        self._guard = opening.guard
        turn = opening.guard.turn
        if "pkcs11-spy" in str(opening.token["module"]):
            log.warning(
                "hsm.traced", remedy="pkcs11-spy writes the PIN down: not where keys matter"
            )
        if opening.ignored:
            log.warning("hsm.uri_ignored", attributes=", ".join(opening.ignored))
        self._changed = asyncio.Event()
        self._breaker = Breaker(limits.probe_s)
        self._admin = Seat("admin", opening, turn, self._on_change, log)
        self._seats = [
            Seat(f"sign-{n}", opening, turn, self._on_change, log, breaker=self._breaker)
            for n in range(limits.workers)
        ]
        # Verifying may take longer than signing: two workers can keep three busy.
        self._verifying = Verifying(opening.launch, limits.workers + 1, log)
        self._tasks = Tasks(self._on_task_failure)
        self._backlog = Backlog(limits.queue, limits.wait_s)
        self._flushing = False
        self._is_calm = True  # the last batch was of one
        # In the order of their deadlines; one timer serves them all.
        self._open_jobs: dict[Job, None] = {}
        self._sweeping: asyncio.TimerHandle | None = None
        self._broken: TokenError | None = None
        self._ready = 0
        self._next_probe = 0.0
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
    def broken(self) -> TokenError | None:
        """Return why nothing can be signed, None while a worker is there or on its way."""
        return self._broken

    @property
    def admin_problem(self) -> TokenError | None:
        """Return why nothing can be listed or generated, None while that is not known."""
        return self._admin.problem if self._admin.is_broken else None

    @property
    def worker_pids(self) -> list[int]:
        """Return the process ids of the token's workers that run, the admin worker first."""
        return [s.worker.pid for s in (self._admin, *self._seats) if s.worker is not None]

    async def start(self) -> TokenFacts:
        """Start all workers, one after the other: the first login decides about the rest.

        Raises:
            TokenError: what stands against it; nothing is left running.
        """
        try:
            # Before anything counts how long a start takes: it may be somebody who enters it.
            await self._guard.ready()
            await self._begin(self._admin, others=False)
            self._keep_to(self.facts.profile)
            for number, seat in enumerate(self._seats):
                await self._begin(seat, others=number > 0)
            if self.metrics is not NO_METRICS:
                self._tasks.start("hsm-gauges", self._show_for_ever())
        except BaseException:
            await self.close()
            raise
        return self.facts

    def _keep_to(self, profile: Profile) -> None:
        """Give up workers that this kind of token cannot serve; one that signs stays."""
        most = max(1, profile.max_workers - 1)
        if len(self._seats) > most:
            self._log.warning("hsm.fewer_workers", profile=profile.name, workers=most)
        del self._seats[most:]

    async def _begin(self, seat: Seat, *, others: bool) -> None:
        self._tasks.start(f"hsm-{seat.name}", seat.run())
        await self._until_ready(seat, others=others)

    async def _until_ready(self, seat: Seat, *, others: bool) -> None:
        """Wait for a seat's first worker; others that sign already make a full token bearable."""
        try:
            async with asyncio.timeout(self._start_s):
                while not seat.is_ready:
                    if others and seat.problem is not None and seat.problem.reason == _NO_SESSION:
                        self._log.warning("hsm.fewer_workers", worker=seat.name)
                        return
                    if seat.problem is not None and seat.problem.cure is not Cure.RESTART:
                        raise seat.problem
                    self._changed.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_PROBE_EVERY_S):
                            await self._changed.wait()
                    self._probe(seat)
        except TimeoutError:
            raise seat.problem or self._no_worker("open token") from None

    async def sign(self, item: SignItem) -> bytes:
        """Have a worker sign and verify what it signed.

        Returns:
            DER ECDSA-Sig-Value, or the RSA signature at modulus length.

        Raises:
            LimitError: the queue is full, or the token too slow for all that wait.
            TokenError: the token failed; `DEADLINE_EXCEEDED` when it hung, reason
                `hsm.bad_signature` when what it signed does not verify.
        """
        if self._closed:
            raise UnavailableError("pkcs11 key manager is closed")
        if self._broken is not None:
            self._probe(*self._seats)
            raise self._broken.with_traceback(None)
        loop = asyncio.get_running_loop()
        job = Job(item, loop.create_future(), loop.time() + self._limits.wait_s)
        self._backlog.add(job)
        self._open_jobs[job] = None
        if self._sweeping is None:
            self._sweeping = loop.call_at(job.deadline, self._sweep)
        try:
            if self._is_calm and len(self._open_jobs) == 1:
                self._flush()  # nobody is likely to come along
            else:
                self._schedule()
            return await job.future
        finally:
            del self._open_jobs[job]

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
        self._probe(seat)
        try:
            async with asyncio.timeout(_ADMIN_WAIT_S):
                while not seat.is_ready:
                    if self._closed or (seat.is_broken and not seat.is_trying):
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
            # A pair that cannot be destroyed is no reason to keep others from what they want.
            if e.cure is Cure.RESTART and (kind is not Kind.DESTROY or e.operation == "session"):
                worker.kill(e)
            raise

    def recycle_admin(self) -> None:
        """Replace the admin worker: a library may go on showing what it saw when a token left."""
        self._admin.recycle()

    def recycle(self) -> None:
        """Replace the signing workers: some libraries never see objects made by another process."""
        for seat in self._seats:
            seat.recycle()

    async def close(self) -> None:
        """Take no new work, let what is queued finish for a while, end every worker."""
        if self._closed:
            return
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        waiting = [job.future for job in self._open_jobs]
        if waiting and any(seat.is_ready for seat in self._seats):
            await asyncio.wait(waiting, timeout=_DRAIN_S)
        gone = UnavailableError("pkcs11 key manager is closed")
        for job in list(self._open_jobs):
            job.settle(gone)
        workers = [seat.release() for seat in (self._admin, *self._seats)]
        closing = (worker.close(_DRAIN_S) for worker in workers if worker is not None)
        await asyncio.gather(*closing, self._verifying.close())
        await self._tasks.close()
        self._show()
        self._changed.set()

    def _probe(self, *seats: Seat) -> None:
        """Look for the token now if it was away, on behalf of somebody who needs it."""
        now = asyncio.get_running_loop().time()
        if now >= self._next_probe and any(seat.wake() for seat in seats):
            self._next_probe = now + _PROBE_EVERY_S

    def _on_change(self) -> None:
        self._changed.set()
        ready = sum(seat.is_ready for seat in (self._admin, *self._seats))
        if ready > self._ready:
            # One worker has found the token: the others need not wait for their turn.
            for seat in (self._admin, *self._seats):
                seat.wake()
        self._ready = ready
        self._broken = None
        if all(seat.is_broken for seat in self._seats):
            # Nobody is left to serve the queue: tell the callers now, not when they give up.
            problem = next((s.problem for s in self._seats if s.problem is not None), None)
            self._broken = problem or self._no_worker("sign")
            self._backlog.refuse_all(self._broken)
        self._schedule()

    async def _show_for_ever(self) -> None:
        """Keep the gauges as they are; told anew though nothing changed, for a pool closed since."""
        while True:
            self._show()
            await asyncio.sleep(_SHOW_EVERY_S)

    def _show(self) -> None:
        if self._admin.facts is None:
            return
        labels = {"hsm": self._admin.facts.device}
        workers = sum(seat.is_ready for seat in self._seats)
        self.metrics.gauge(("hsm", "queue"), len(self._backlog), labels)
        self.metrics.gauge(("hsm", "workers"), workers, labels)

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

    def _sweep(self) -> None:
        self._sweeping = None
        loop = asyncio.get_running_loop()
        for job in self._open_jobs:
            if job.deadline > loop.time():
                self._sweeping = loop.call_at(job.deadline, self._sweep)
                break
            late = TokenError(
                f"no signature within {self._limits.wait_s:g} s",
                reason="hsm.deadline",
                operation="sign",
                kind=ErrorKind.DEADLINE_EXCEEDED,
            )
            job.settle(late)
        self._backlog.drop_over()

    def _schedule(self) -> None:
        # Later in this turn of the loop, so that callers that run now end up in one batch.
        if self._flushing:
            return
        if len(self._backlog):
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        while len(self._backlog):
            ready = [seat for seat in self._seats if seat.has_room]
            if not ready:
                return
            seat = min(ready, key=lambda s: s.worker.depth if s.worker is not None else 0)
            share = -(-len(self._backlog) // len(ready))
            batch = self._backlog.take(min(share, seat.pace.batch_limit(MAX_BATCH)))
            if batch:
                self._send(seat, batch)

    def _send(self, seat: Seat, batch: list[Job]) -> None:
        if seat.worker is None:
            raise self._no_worker("sign")
        self._is_calm = len(batch) == 1
        items = encode_items([job.item for job in batch])
        answer = seat.worker.ask(Kind.SIGN, items, limit_s=self._limits.sign_s, what="sign")
        now = asyncio.get_running_loop().time()
        answer.add_done_callback(partial(self._answered, seat, batch, items, now))

    def _answered(
        self,
        seat: Seat,
        batch: list[Job],
        items: bytes,
        sent_at: float,
        answer: asyncio.Future[bytes],
    ) -> None:
        error = answer.exception()
        if error is not None:
            failure = error if isinstance(error, TokenError) else TokenError.of(error, "sign")
            if failure.reason == _HUNG:
                seat.pace.forget()
            self._conclude(seat, batch, [failure] * len(batch))
            return
        seat.pace.measured(sent_at, asyncio.get_running_loop().time(), len(batch))
        self._backlog.learn([s.pace.settled_s for s in self._seats if s.is_ready])
        self._schedule()
        done = partial(self._verified, seat, batch)
        self._verifying.verify(items, answer.result(), len(batch), done)

    def _verified(self, seat: Seat, batch: list[Job], body: bytes | SpireHwError) -> None:
        results: Sequence[bytes | TokenError]
        try:
            if isinstance(body, SpireHwError):
                raise body
            results = decode_results(body, len(batch))
        except SpireHwError as e:
            results = [TokenError.of(e, "sign")] * len(batch)
            self._discard(seat, _replaced())
        self._conclude(seat, batch, results)

    def _conclude(
        self, seat: Seat, batch: list[Job], results: Sequence[bytes | TokenError]
    ) -> None:
        bad = next((r for r in results if isinstance(r, TokenError) and _is_fatal(r)), None)
        if bad is not None and _is_lost(bad):
            if bad.reason not in _OF_WORKER:
                seat.failed()
                self._log.error(bad.reason, worker=seat.name, error=bad.message)
                count_fault(self.metrics, bad.reason)
            self._discard(seat, bad)
        elif bad is not None:
            # A token or worker that made one wrong signature is not asked again as it is; what
            # others want of it has nothing to do with that.
            self._discard(seat, _replaced())
        elif any(isinstance(r, bytes) for r in results):
            seat.signed()
        for job, result in zip(batch, results, strict=True):
            if isinstance(result, bytes):
                job.settle(result)
            else:
                self._failed(job, result)
        self._schedule()

    def _failed(self, job: Job, error: TokenError) -> None:
        if _is_lost(error) and not job.retried and not self._closed and not job.future.done():
            job.retried = True
            self._backlog.again(job)
            self._schedule()
            return
        job.settle(error)

    def _discard(self, seat: Seat, why: TokenError) -> None:
        if seat.worker is not None and seat.worker.is_alive:
            seat.worker.kill(why)


def _replaced() -> TokenError:
    return TokenError(
        "hsm worker was replaced",
        reason="hsm.worker_replaced",
        operation="run",
        cure=Cure.RESTART,
        kind=ErrorKind.UNAVAILABLE,
    )


def _is_lost(error: TokenError) -> bool:
    return error.cure in {Cure.RESTART, Cure.SESSION, Cure.KEY}


def _is_fatal(error: TokenError) -> bool:
    return _is_lost(error) or error.reason == "hsm.bad_signature"
