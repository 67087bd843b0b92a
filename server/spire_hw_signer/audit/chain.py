"""The chain of an audit log: which record may follow which, and what a log says in sum.

`h_n = SHA-256(h_{n-1} || record_n)`, where a record is its line without the line feed and h_0 is 32
zero bytes. The writer, the start and the verify tool all move one `Chain` record by record.

This module is pure.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from spire_hw.errors import VerificationError
from spire_hw_signer.audit.record import NO_HEAD, Kind, Record, Result

if TYPE_CHECKING:
    from collections.abc import Callable

# How many records may be written while a checkpoint is signed.
RECENT: Final = 16_384
# Event of the note that a signer writes first when it has opened a log.
OPENED: Final = "opened"
# The kinds that only stand first in a file.
FIRST: Final = frozenset({Kind.START, Kind.ROTATION, Kind.SEAL})


class ChainError(VerificationError):
    """A record that cannot stand where it stands.

    Attributes:
        code: stable word for machines, such as `edited`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class LogHead:
    """The end of a log.

    Attributes:
        seq: number of the last record, 0 when there is none.
        hash: its chain value, 32 bytes.
    """

    seq: int = 0
    hash: bytes = NO_HEAD

    @override
    def __str__(self) -> str:
        return f"{self.seq}:{self.hash.hex()}"


def next_hash(head: bytes, line: bytes) -> bytes:
    """Return the chain value of a record.

    Args:
        head: that of the record before.
        line: the record, without its line feed.
    """
    return hashlib.sha256(head + line).digest()


@dataclass(slots=True)
class Chain:
    """What has been read or written of a log so far.

    Attributes:
        head: its end.
        log_id: 16 bytes in hexadecimal that tell logs apart, "" before the first record.
        open: numbers of intents without outcome, oldest first.
        orders: nonces of orders that were carried out, with their expiry.
        boot: id of the boot the last record was made in.
        mono: monotonic clock of the last record, microseconds.
        unknown: how many intents ended with an unknown outcome.
        recent: chain values of the last records, `head` last.
        starting: a signer has opened the log and is still telling what it found; None when what
            came before is not known.
    """

    head: LogHead = field(default_factory=LogHead)
    log_id: str = ""
    open: dict[int, None] = field(default_factory=dict)
    orders: dict[str, str] = field(default_factory=dict)
    boot: str = ""
    mono: int = 0
    unknown: int = 0
    recent: deque[bytes] = field(default_factory=lambda: deque(maxlen=RECENT))
    starting: bool | None = False

    def recent_hash(self, seq: int) -> bytes | None:
        """Return the chain value of one of the last records, None for one that is not kept."""
        back = self.head.seq - seq
        return self.recent[-1 - back] if 0 <= back < len(self.recent) else None

    def check(self, record: Record, *, first_in_file: bool) -> None:
        """Make sure that a record may come next.

        Args:
            record: what was read.
            first_in_file: it is the first record of its file.

        Raises:
            ChainError: it may not.
        """
        if (record.kind in FIRST) != first_in_file:
            place = "first" if first_in_file else "inside"
            raise ChainError("misplaced", f"a {record.kind.value} record stands {place} in a file")
        if record.kind is Kind.SEAL:
            self._check_seal(record)
        elif record.seq != self.head.seq + 1:
            code = "gap" if record.seq > self.head.seq else "reordered"
            raise ChainError(code, f"record {record.seq} follows record {self.head.seq}")
        if record.prev != self.head.hash:
            raise ChainError(
                "edited", f"record {record.seq} does not continue record {self.head.seq}"
            )
        if (record.kind is Kind.START) != (record.seq == 1):
            raise ChainError("misplaced", f"record {record.seq} is a {record.kind.value} record")
        self._check_time(record)
        self._check_start(record)
        _CHECKS.get(record.kind, _fine)(self, record)

    def _check_seal(self, record: Record) -> None:
        if record.body["good"] != self.head.seq or record.seq <= self.head.seq:
            raise ChainError(
                "seal",
                f"seal {record.seq} says that record {record.body['good']} is the last good one,"
                f" it is {self.head.seq}",
            )

    def _check_time(self, record: Record) -> None:
        if record.boot and record.boot == self.boot and record.mono < self.mono:
            raise ChainError(
                "clock", f"the monotonic clock of record {record.seq} is behind the one before"
            )

    def _check_start(self, record: Record) -> None:
        """Make sure that what a start repairs is repaired there, and only there."""
        repairs = _repairs(record)
        if repairs and self.starting is False:
            raise ChainError(
                "recovery", f"record {record.seq} repairs something, but no start came before it"
            )
        if self.starting and self.open and not repairs and record.kind not in FIRST:
            raise ChainError(
                "recovery", f"record {record.seq} follows a start that left intents without outcome"
            )

    def take(self, record: Record, line: bytes) -> None:
        """Go on by a record that was checked, or that the writer made."""
        if record.kind is Kind.SEAL:
            self.recent.clear()  # the numbers before it are others
        self.head = LogHead(record.seq, next_hash(self.head.hash, line))
        self.recent.append(self.head.hash)
        self.boot, self.mono = record.boot, record.mono
        if record.kind is Kind.NOTE and record.body["event"] == OPENED:
            self.starting = True
        elif not _repairs(record) and record.kind not in FIRST:
            self.starting = False
        match record.kind:
            case Kind.INTENT:
                self.open[record.seq] = None
            case Kind.OUTCOME:
                self.open.pop(record.body["intent"], None)
                self.unknown += record.body["result"] == Result.UNKNOWN.value
            case Kind.ORDER:
                if record.body["accepted"]:
                    self.orders[record.body["nonce"]] = record.body["expires"]
            case Kind.START:
                self.log_id = record.body["log"]
            case Kind.ROTATION | Kind.SEAL:
                self.log_id = record.body["log"]
                self.orders = dict(record.body["orders"])
                self.open = dict.fromkeys(record.body["open"])
            case _:
                pass

    @classmethod
    def before(cls, first: Record) -> Chain:
        """Return the chain as the first record of a file says it was, when nothing older is known.

        Raises:
            ChainError: a file cannot start with that record.
        """
        if first.kind not in FIRST:
            raise ChainError("misplaced", f"a {first.kind.value} record stands first in a file")
        if first.kind is Kind.START:
            return cls()
        seq = first.body["good"] if first.kind is Kind.SEAL else first.seq - 1
        return cls(
            head=LogHead(seq, first.prev),
            log_id=first.body["log"],
            open=dict.fromkeys(first.body["open"]),
            orders=dict(first.body["orders"]),
            starting=None,
        )


def _repairs(record: Record) -> bool:
    unknown = Result.UNKNOWN.value
    return record.kind is Kind.RECOVERY or (
        record.kind is Kind.OUTCOME and record.body["result"] == unknown
    )


def _fine(_chain: Chain, _record: Record) -> None:
    """Accept a record whose kind asks for nothing more."""


def _check_outcome(chain: Chain, record: Record) -> None:
    if record.body["intent"] not in chain.open:
        raise ChainError(
            "outcome",
            f"record {record.seq} tells the outcome of {record.body['intent']},"
            " which is no open intent",
        )


def _check_order(chain: Chain, record: Record) -> None:
    if record.body["accepted"] and record.body["nonce"] in chain.orders:
        raise ChainError("order", f"record {record.seq} carries out an order for the second time")


def _check_log(chain: Chain, record: Record) -> None:
    if chain.log_id and record.body["log"] != chain.log_id:
        raise ChainError("log", f"record {record.seq} belongs to another log")


def _check_checkpoint(chain: Chain, record: Record) -> None:
    _check_log(chain, record)
    at = record.body["at"]
    known = chain.recent_hash(at)
    if known is None:
        # Records of an older file are not at hand when a log is read from a later one.
        fits = at <= chain.head.seq and len(chain.recent) < RECENT
    else:
        fits = known.hex() == record.body["head"]
    if not fits:
        raise ChainError("checkpoint", f"checkpoint {record.seq} names another head for {at}")


def _check_carried(chain: Chain, record: Record) -> None:
    _check_log(chain, record)
    if record.body["open"] != list(chain.open):
        raise ChainError("carried", f"record {record.seq} names other intents as open")
    live = record.body["orders"]
    if any(chain.orders.get(nonce) != expiry for nonce, expiry in live.items()):
        raise ChainError("carried", f"record {record.seq} names orders that were not carried out")
    dropped = set(chain.orders) - set(live)
    if any(chain.orders[nonce] >= record.time for nonce in dropped):
        raise ChainError("carried", f"record {record.seq} forgets an order that is still valid")


_CHECKS: Final[dict[Kind, Callable[[Chain, Record], None]]] = {
    Kind.OUTCOME: _check_outcome,
    Kind.ORDER: _check_order,
    Kind.CHECKPOINT: _check_checkpoint,
    Kind.ROTATION: _check_carried,
    Kind.SEAL: _check_carried,
}
