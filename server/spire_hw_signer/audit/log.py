"""The audit log as the signer uses it: no signature leaves before what it is for is on the disk.

Records get their place in the chain in the event loop; one thread writes them, everything that came
together in one go (group commit). Intents wait for the disk. Outcomes, refusals and notes do not:
they go with the next batch, a moment later at the latest. A head that is handed out is always that
of records on the disk, so nobody can have witnessed one that a power cut takes back.

While the disk has no room or takes nothing, intents are refused and nothing is signed. What already
has its place in the chain is kept and written, the same to the byte, as soon as that is possible again.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

from spire_hw.bootid import read_boot_id
from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw_signer.audit.chain import OPENED, RECENT, Chain, LogHead
from spire_hw_signer.audit.folder import Folder
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
from spire_hw_signer.audit.start import Found, find, find_hash
from spire_hw_signer.audit.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from spire_hw.clock import Clock
    from spire_hw.log import Logger

__all__ = ["AuditLog", "AuditSettings", "Begun", "Intent", "LogHead", "Outcome", "Refused"]

_MAX_WAITING: Final = 16 * 1024 * 1024
_LOG_ID_BYTES: Final = 16
# No intent takes more: a client's name is cut at 512, a key id at 255, and both are ASCII.
_MOST_BYTES: Final = 2048
_SOON: Final = timedelta(seconds=1)


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
        count: of requests like this that the record stands for.
    """

    intent: Intent
    reason: str
    denial_class: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class Begun:
    """Intents that are being written down.

    Attributes:
        seqs: their numbers.
        written: settled once that is done, or cannot be done; None when there are none.
    """

    seqs: list[int]
    written: asyncio.Future[str] | None


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
        self._writer = Writer(self._folder, clock=clock, log=log, again=self._available_again)
        self._writer.trouble = "it is not open"
        self._chain = Chain()
        self._file = ""
        self._file_bytes = 0
        self._file_since: datetime = clock.now()
        self._lost = 0
        self._reserved = 0
        self._many: tuple[int, Callable[[], None]] | None = None
        self._checkpoint_seq = 0
        self._opened = False

    @property
    def head(self) -> LogHead:
        """Return the end of what is on the disk."""
        return self._writer.durable

    @property
    def log_id(self) -> str:
        """Return what tells this log from others."""
        return self._chain.log_id

    @property
    def trouble(self) -> str:
        """Return why nothing can be written now, "" while all is well."""
        return self._writer.trouble

    @property
    def boot(self) -> str:
        """Return the id of this boot as records have it."""
        return self._boot

    @property
    def directory(self) -> Path:
        """Return where its files are."""
        return self._settings.directory

    def is_used(self, nonce: str) -> bool:
        """Tell whether an order was carried out."""
        return nonce in self._chain.orders

    async def open(self) -> Found:
        """Read the end of the log, repair what a crash left, and be ready to write.

        Returns:
            The end as it was found.

        Raises:
            NotReadyError: the directory cannot be used, or another process has it.
            BrokenLogError: the chain does not hold.
            UnavailableError: nothing can be written.
        """
        if self._opened:
            raise NotReadyError("this audit log was opened before")
        self._opened = True
        found = await asyncio.to_thread(self._find)
        self._writer.trouble = ""
        self._resume(found)
        self._writer.start()
        await self._writer.write()
        return found

    def _find(self) -> Found:
        self._folder.hold()
        try:
            return find(self._folder)
        except BaseException:
            self._folder.release()
            raise

    def _resume(self, found: Found) -> None:
        self._chain = found.chain
        self._writer.durable = found.chain.head
        self._checkpoint_seq = found.chain.head.seq
        self._file, self._file_bytes = self._folder.name, self._folder.size
        if found.first is None:
            self._begin_file(Kind.START, {"log": secrets.token_hex(_LOG_ID_BYTES)})
        else:
            self._file_since = found.first.at()
        self._add(Kind.NOTE, {"event": OPENED, "fields": {}})
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
        return await self.on_disk(self.begin(intents))

    def reserve(self, intents: int) -> bool:
        """Keep room for intents, where the disk has set it aside; `begin` has to be told.

        What they are about may be done before they are written down then, as long as nothing of it
        leaves before they are on the disk.
        """
        size = intents * _MOST_BYTES
        now = self._clock.now()
        if self._is_full(now + _SOON, self._reserved + size):
            return False
        if not self._writer.has_room(self._file, self._reserved + size):
            return False
        self._reserved += size
        return True

    def begin(self, intents: Sequence[Intent], *, reserved: bool = False) -> Begun:
        """Begin to write down what is about to be done; `on_disk` tells when that may be.

        Args:
            intents: what.
            reserved: room was kept for as many.

        Raises:
            UnavailableError: the log cannot be written: do nothing.
        """
        if reserved:
            self._reserved -= len(intents) * _MOST_BYTES
        trouble = self.trouble
        if trouble and not (reserved and self._writer.is_open):
            raise self._writer.unavailable(trouble)
        seqs = [self._add(Kind.INTENT, _request(intent)) for intent in intents]
        if trouble:
            # It came after the room was kept: a device that has a log of its own may show them.
            self._give_up(seqs, "audit log unavailable")
            raise self._writer.unavailable(trouble)
        return Begun(seqs, self._writer.written() if seqs else None)

    async def on_disk(self, begun: Begun) -> list[int]:
        """Wait until intents are on the disk; to be called once, results as of `intend`."""
        seqs, written = begun.seqs, begun.written
        try:
            reason = "" if written is None else await written
        except asyncio.CancelledError:
            self._give_up(seqs, "the caller went away")
            raise
        if reason:
            self._give_up(seqs, "audit log unavailable")
            raise self._writer.unavailable(reason)
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
        self._writer.write_soon()
        return self.head

    def refuse(self, refusals: Sequence[Refused]) -> LogHead:
        """Write down what was refused; while the log cannot be written it is only counted.

        Returns:
            The end of what is on the disk.
        """
        if self.trouble:
            self._lost += sum(refused.count for refused in refusals)
            return self.head
        for refused in refusals:
            body = _request(refused.intent)
            body["reason"] = cut(refused.reason)
            body["class"] = refused.denial_class
            body["count"] = refused.count
            self._add(Kind.REFUSAL, body)
        self._writer.write_soon()
        return self.head

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
        if event == OPENED:
            raise InvalidInputError(f"event {event} is the log's own")
        body = {
            "event": check_word(event, "event"),
            "fields": {check_word(k, "field"): cut(v) for k, v in fields.items()},
        }
        if self._writer.waiting_bytes > _MAX_WAITING:
            self._lost += 1
        else:
            self._add(Kind.NOTE, body)
            self._writer.write_soon()
        return self.head

    async def record(self, kind: Kind, body: Mapping[str, Any]) -> bytes:
        """Write down a record of any kind; it is on the disk once this returns.

        Returns:
            Its line.

        Raises:
            UnavailableError: the log cannot be written.
        """
        if self.trouble:
            raise self._writer.unavailable(self.trouble)
        line = self._append(kind, body)
        if kind is Kind.CHECKPOINT:
            self._checkpoint_seq = self._chain.head.seq
        await self._writer.write()
        return line

    async def hash_at(self, seq: int) -> bytes | None:
        """Return the chain value of a record, None when there is no such record here.

        Raises:
            NotReadyError: a file cannot be read.
        """
        recent = self._chain.recent_hash(seq)
        if recent is not None or seq > self.head.seq:
            return recent
        return await asyncio.to_thread(find_hash, self._settings.directory, seq)

    def can_vouch(self, seq: int) -> bool:
        """Tell whether readers can compare a checkpoint for a record, were it written now."""
        return self._chain.head.seq + 1 - seq < RECENT  # a new file may begin before it

    def watch(self, every: int, ring: Callable[[], None]) -> None:
        """Have something called whenever so many records have come since the last checkpoint."""
        self._many = (every, ring)

    async def close(self) -> None:
        """Write what waits, as far as the disk takes it, and let go of the files."""
        await self._writer.close()

    def _available_again(self, trouble: str) -> None:
        self._log.warning("Audit log is available again", lost=self._lost)
        lost, self._lost = self._lost, 0
        self.note("log_available", {"error": trouble, "lost": str(lost)})

    def _add(self, kind: Kind, body: Mapping[str, Any]) -> int:
        """Give a record its place in the chain and in what is written next."""
        self._append(kind, body)
        seq = self._chain.head.seq
        if self._many is not None and seq - self._checkpoint_seq >= self._many[0]:
            self._many[1]()
        return seq

    def _append(self, kind: Kind, body: Mapping[str, Any]) -> bytes:
        now = self._clock.now()
        if self._file_bytes and self._is_full(now):
            self._rotate(now)
        return self._place(kind, body, now)

    def _is_full(self, at: datetime, more: int = 0) -> bool:
        """Tell whether a new file begins with what comes, or after so many bytes more."""
        settings = self._settings
        is_old = at - self._file_since >= settings.max_age
        return is_old or self._file_bytes + more >= settings.max_bytes

    def _rotate(self, now: datetime) -> None:
        live = time_text(now)
        body = {
            "log": self._chain.log_id,
            "file": self._file,
            "open": list(self._chain.open),
            "orders": {n: e for n, e in self._chain.orders.items() if e >= live},
        }
        self._begin_file(Kind.ROTATION, body)

    def _begin_file(self, kind: Kind, body: Mapping[str, Any]) -> None:
        self._file = file_name(self._chain.head.seq + 1)
        self._file_bytes = 0
        self._file_since = self._clock.now()
        self._place(kind, body, self._file_since)

    def _place(self, kind: Kind, body: Mapping[str, Any], now: datetime) -> bytes:
        mono = micro(self._clock.monotonic())
        if self._boot and self._boot == self._chain.boot:
            mono = max(mono, self._chain.mono)
        head = self._chain.head
        record = Record(head.seq + 1, time_text(now), mono, self._boot, kind, head.hash, body)
        line = encode(record)
        self._chain.take(record, line)
        self._file_bytes += len(line) + 1
        self._writer.add(self._file, line, self._chain.head)
        return line


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
