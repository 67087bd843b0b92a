"""The audit log as the signer uses it: what is about to be signed is on the disk before it is.

Records get their place in the chain in the event loop; one thread writes them, everything that came
together in one go (group commit). Intents wait for the disk. Outcomes, refusals and notes do not:
they go with the next batch, a moment later at the latest. A head that is handed out is always that
of records on the disk, so nobody can have witnessed one that a power cut takes back.

While the disk takes nothing, intents are refused and nothing is signed. What already has its place
in the chain is kept and written, the same to the byte, as soon as that is possible again.
"""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

from spire_hw.aio.tasks import Tasks
from spire_hw.bootid import read_boot_id
from spire_hw.errors import InvalidInputError, NotReadyError, UnavailableError
from spire_hw_signer.audit.chain import Chain, LogHead
from spire_hw_signer.audit.folder import Folder, ForeignHandError, reason_of
from spire_hw_signer.audit.record import (
    Kind,
    Record,
    Result,
    check_word,
    cut,
    encode,
    file_name,
    micro,
    time_text,
)
from spire_hw_signer.audit.start import Found, find

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from spire_hw.clock import Clock
    from spire_hw.log import Logger

__all__ = ["AuditLog", "AuditSettings", "Intent", "LogHead", "Outcome", "Refused"]

_FLUSH_S: Final = 0.02
_RETRY_S: Final = 1.0
_COMMIT_S: Final = 10.0
_MAX_BATCH: Final = 4 * 1024 * 1024
_MAX_WAITING: Final = 16 * 1024 * 1024
_MIN_FILE: Final = 4096
_LOG_ID_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """Where the log is and when a new file begins.

    Attributes:
        directory: of its files.
        max_bytes: a file that would grow beyond is followed by a new one.
        max_age: likewise, counted from its first record.
    """

    directory: Path
    max_bytes: int = 64 * 1024 * 1024
    max_age: timedelta = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Intent:
    """What is about to be done for a client; texts that do not apply are "".

    Attributes:
        client: name of the client in the policy, or what it called itself.
        cert_hash: SHA-256 of its certificate, hexadecimal.
        peer: its address, or `unix:uid=...`.
        method: of the service, such as `Sign`.
        request_id: hexadecimal.
        key_id: as the client names it.
        generation: of the key, 0 when none is meant yet.
        fingerprint: of the key, hexadecimal.
        hash_alg: such as `sha256`.
        digest_sha256: SHA-256 of the digest that is signed, hexadecimal.
        policy_hash: SHA-256 of the policy that allowed it, hexadecimal.
    """

    client: str
    cert_hash: str
    peer: str
    method: str
    request_id: str
    key_id: str
    generation: int
    fingerprint: str
    hash_alg: str
    digest_sha256: str
    policy_hash: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an intent.

    Attributes:
        seq: of the intent.
        result: it was done, or failed.
        reason: why it failed, for operators.
        latency_s: how long it took.
        generation: of the key that was made, 0 for none.
        fingerprint: of the key that was made, "" for none.
    """

    seq: int
    result: Literal["done", "failed"]
    reason: str = ""
    latency_s: float = 0.0
    generation: int = 0
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that was refused.

    Attributes:
        intent: what was asked for, as far as it was understood.
        reason: stable word, such as `tbs_policy`.
        denial_class: number of the check that refused it.
    """

    intent: Intent
    reason: str
    denial_class: int


@dataclass(slots=True)
class _Batch:
    """Records that are written in one go.

    Attributes:
        file: the file they go to.
        head: the end of the log with them.
        done: settled with "" once they are on the disk, or with the reason why they are not.
    """

    file: str
    head: LogHead = field(default_factory=LogHead)
    data: bytearray = field(default_factory=bytearray)
    done: asyncio.Future[str] | None = None
    closed: bool = False


class AuditLog:
    """One log with one writer.

    Args:
        settings: the operator's.
        clock: both times of a record.
        log: where trouble with the log is told.
        boot: id of this boot; the kernel's without it.
    """

    def __init__(
        self, settings: AuditSettings, *, clock: Clock, log: Logger, boot: str | None = None
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._log = log
        self._boot = (read_boot_id() or "") if boot is None else boot
        self._folder = Folder(settings.directory)
        self._chain = Chain()
        self._durable = LogHead()
        self._file = ""
        self._file_bytes = 0
        self._file_since: datetime = clock.now()
        self._batches: list[_Batch] = []
        self._waiting_bytes = 0
        self._lost = 0
        self._trouble = "it is not open"
        self._more = asyncio.Event()
        self._flush: asyncio.TimerHandle | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit log")
        self._tasks = Tasks(self._task_failed)
        self._writer: asyncio.Task[None] | None = None

    @property
    def head(self) -> LogHead:
        """Return the end of what is on the disk."""
        return self._durable

    @property
    def log_id(self) -> str:
        """Return what tells this log from others."""
        return self._chain.log_id

    @property
    def trouble(self) -> str:
        """Return why nothing can be written now, "" while all is well."""
        return self._trouble

    async def open(self) -> None:
        """Read the end of the log, repair what a crash left, and be ready to write.

        Raises:
            NotReadyError: the directory cannot be used, or another process has it.
            BrokenLogError: the chain does not hold.
            UnavailableError: nothing can be written.
        """
        if self._writer is not None:
            raise NotReadyError("this audit log was opened before")
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, self._find)
        self._trouble = ""
        self._resume(found)
        self._writer = self._tasks.spawn("audit log", self._run())
        if self._batches:
            self._more.set()
            await self._wait(self._batches[-1])

    def _find(self) -> Found:
        self._folder.hold()
        try:
            return find(self._folder)
        except BaseException:
            self._folder.release()
            raise

    def _resume(self, found: Found) -> None:
        self._chain = found.chain
        self._durable = found.chain.head
        self._file, self._file_bytes = self._folder.name, self._folder.size
        if found.since is None:
            log_id = secrets.token_hex(_LOG_ID_BYTES)
            self._begin_file(Kind.START, {"log": log_id})
        else:
            self._file_since = found.since.at()
        if found.torn is not None:
            self._log.warning("Audit log had a torn last record", bytes=found.torn["bytes"])
            self._add(Kind.RECOVERY, found.torn)
        if self._chain.open:
            self._log.warning("Outcomes of requests are unknown", count=len(self._chain.open))
        for seq in list(self._chain.open):
            self._add(Kind.OUTCOME, _outcome(seq, Result.UNKNOWN, "the signer ended before it"))

    async def intend(self, intents: Sequence[Intent]) -> list[int]:
        """Write down what is about to be done; it is on the disk once this returns.

        Every number has to be concluded, whatever happens.

        Returns:
            The numbers of the records, one for each intent.

        Raises:
            UnavailableError: the log cannot be written: do nothing.
        """
        if self._trouble:
            raise self._unavailable(self._trouble)
        if not intents:
            return []
        seqs = [self._add(Kind.INTENT, _request(intent)) for intent in intents]
        self._more.set()
        try:
            await self._wait(self._batches[-1])
        except UnavailableError:
            self._give_up(seqs, "audit log unavailable")
            raise
        except asyncio.CancelledError:
            self._give_up(seqs, "the caller went away")
            raise
        return seqs

    def _give_up(self, seqs: list[int], reason: str) -> None:
        self.conclude([Outcome(seq, "failed", reason) for seq in seqs])

    def conclude(self, outcomes: Sequence[Outcome]) -> LogHead:
        """Write down what became of intents.

        Returns:
            The end of what is on the disk: the intents at least.

        Raises:
            InvalidInputError: a number is that of no open intent.
        """
        for outcome in outcomes:
            if outcome.seq not in self._chain.open:
                raise InvalidInputError(f"record {outcome.seq} is no open intent")
            body = _outcome(
                outcome.seq,
                Result(outcome.result),
                outcome.reason,
                micro(outcome.latency_s),
                (outcome.generation, outcome.fingerprint),
            )
            self._add(Kind.OUTCOME, body)
        self._soon()
        return self._durable

    def refuse(self, refusals: Sequence[Refused]) -> LogHead:
        """Write down what was refused; while the log cannot be written it is only counted.

        Returns:
            The end of what is on the disk.
        """
        if self._trouble:
            self._lost += len(refusals)
            return self._durable
        for refused in refusals:
            body = _request(refused.intent)
            body |= {"reason": cut(refused.reason), "class": refused.denial_class, "count": 1}
            self._add(Kind.REFUSAL, body)
        self._soon()
        return self._durable

    def note(self, event: str, fields: Mapping[str, str]) -> LogHead:
        """Write down what happened to the signer itself.

        Args:
            event: a word, such as `policy_loaded`.
            fields: texts by words.

        Returns:
            The end of what is on the disk.

        Raises:
            InvalidInputError: an event or name that is no word.
        """
        body = {
            "event": check_word(event, "event"),
            "fields": {check_word(k, "field"): cut(v) for k, v in fields.items()},
        }
        if self._waiting_bytes > _MAX_WAITING:
            self._lost += 1
        else:
            self._add(Kind.NOTE, body)
            self._more.set()
        return self._durable

    async def close(self) -> None:
        """Write what waits, as far as the disk takes it, and let go of the files."""
        if self._writer is None:
            self._thread.shutdown(wait=False)
            return
        last = self._batches[-1] if self._batches else None
        self._more.set()
        if last is not None:
            try:
                await self._wait(last)
            except UnavailableError as e:
                self._log.error("Audit log lacks its last records", error=e.message)
        self._trouble = "it is closed"
        if self._flush is not None:
            self._flush.cancel()
        await self._tasks.close()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._folder.release)
        self._thread.shutdown(wait=False)

    def _add(self, kind: Kind, body: Mapping[str, Any]) -> int:
        """Give a record its place in the chain and in what is written next."""
        batch = self._batch()
        seq = self._append(batch, kind, body)
        if batch.head.seq != seq:
            raise NotReadyError("audit log lost its order")
        return seq

    def _append(self, batch: _Batch, kind: Kind, body: Mapping[str, Any]) -> int:
        now, mono = self._clock.now(), micro(self._clock.monotonic())
        if self._boot and self._boot == self._chain.boot:
            mono = max(mono, self._chain.mono)
        head = self._chain.head
        record = Record(head.seq + 1, time_text(now), mono, self._boot, kind, head.hash, body)
        line = encode(record)
        self._chain.take(record, line)
        batch.data += line
        batch.data += b"\n"
        batch.head = self._chain.head
        self._file_bytes += len(line) + 1
        self._waiting_bytes += len(line) + 1
        return record.seq

    def _batch(self) -> _Batch:
        if self._batches:
            last = self._batches[-1]
            if self._file_bytes < self._settings.max_bytes:
                if not last.closed and len(last.data) < _MAX_BATCH:
                    return last
                return self._new_batch()
        old = self._clock.now() - self._file_since > self._settings.max_age
        if self._file_bytes >= max(self._settings.max_bytes, _MIN_FILE) or old:
            live = time_text(self._clock.now())
            body = {
                "log": self._chain.log_id,
                "file": self._file,
                "open": list(self._chain.open),
                "orders": {n: e for n, e in self._chain.orders.items() if e >= live},
            }
            self._begin_file(Kind.ROTATION, body)
            return self._batches[-1]
        return self._new_batch()

    def _begin_file(self, kind: Kind, body: Mapping[str, Any]) -> None:
        self._file = file_name(self._chain.head.seq + 1)
        self._file_bytes = 0
        self._file_since = self._clock.now()
        self._append(self._new_batch(), kind, body)

    def _new_batch(self) -> _Batch:
        batch = _Batch(self._file)
        self._batches.append(batch)
        return batch

    def _soon(self) -> None:
        """Write what waits in a moment, unless an intent comes first."""
        if self._flush is None and self._batches:
            loop = asyncio.get_running_loop()
            self._flush = loop.call_later(_FLUSH_S, self._more.set)

    async def _wait(self, batch: _Batch) -> None:
        if batch.done is None:
            batch.done = asyncio.get_running_loop().create_future()
        trouble = await asyncio.shield(batch.done)
        if trouble:
            raise self._unavailable(trouble)

    def _unavailable(self, reason: str) -> UnavailableError:
        return UnavailableError(f"audit log unavailable: {reason}")

    async def _run(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            if self._flush is not None:
                self._flush.cancel()
                self._flush = None
            while self._batches:
                self._batches[0].closed = True
                if await self._commit(self._batches[0]):
                    self._written(self._batches.pop(0))
                else:
                    await self._clock.sleep(_RETRY_S)

    async def _commit(self, batch: _Batch) -> bool:
        """Write a batch; tell those who wait for it when that fails or takes too long."""
        loop = asyncio.get_running_loop()
        data = bytes(batch.data)
        future = loop.run_in_executor(self._thread, self._folder.append, batch.file, data)
        if not (await asyncio.wait({future}, timeout=_COMMIT_S))[0]:
            self._fail(batch, f"the disk does not answer within {_COMMIT_S:g} s")
        try:
            await future
        except (OSError, ForeignHandError) as e:
            self._fail(batch, reason_of(e))
        else:
            return True
        return False

    def _fail(self, batch: _Batch, reason: str) -> None:
        if reason != self._trouble:
            self._log.error("Audit log unavailable: nothing is signed", error=reason)
        self._trouble = reason
        for one in (batch, *self._batches):
            if one.done is not None:
                one.done.set_result(reason)
                one.done = None

    def _written(self, batch: _Batch) -> None:
        self._durable = batch.head
        self._waiting_bytes -= len(batch.data)
        if batch.done is not None:
            batch.done.set_result("")
        if self._trouble and not self._batches:
            self._log.warning("Audit log is available again", lost=self._lost)
            trouble, self._trouble = self._trouble, ""
            fields = {"error": cut(trouble), "lost": str(self._lost)}
            self._lost = 0
            self.note("log_available", fields)

    def _task_failed(self, name: str, error: BaseException) -> None:
        self._trouble = f"its writer ended: {type(error).__name__}"
        self._log.error("Audit log writer ended", task=name, exc_info=error)
        for batch in self._batches:
            if batch.done is not None and not batch.done.done():
                batch.done.set_result(self._trouble)


def _request(intent: Intent) -> dict[str, Any]:
    return {
        "client": cut(intent.client),
        "cert": intent.cert_hash,
        "peer": cut(intent.peer),
        "method": intent.method,
        "request": cut(intent.request_id),
        "key": cut(intent.key_id),
        "generation": intent.generation,
        "fingerprint": intent.fingerprint,
        "hash": intent.hash_alg,
        "digest": intent.digest_sha256,
        "policy": intent.policy_hash,
    }


def _outcome(
    seq: int, result: Result, reason: str, latency: int = 0, made: tuple[int, str] = (0, "")
) -> dict[str, Any]:
    return {
        "intent": seq,
        "result": result.value,
        "reason": cut(reason),
        "latency": latency,
        "made_generation": made[0],
        "made_fingerprint": made[1],
    }
