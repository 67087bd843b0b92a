"""Read a TCG boot log and replay it into PCR values.

Nothing here says what a log means: that is `boot` and `secureboot`. Types and data of events are
claims; only what replays to a quoted PCR is authentic, and of that only PCR number and digest.

Spec: TCG EFI Protocol Specification, 5; PC Client Platform Firmware Profile, 10.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from spire_hw.errors import (
    AttestationError,
    Finding,
    InvalidInputError,
    LimitError,
)
from spire_hw.tpm import wire

MAX_BYTES: Final = 512 * 1024
MAX_EVENTS: Final = 4096

EV_NO_ACTION: Final = 0x00000003

_SPEC_ID: Final = b"Spec ID Event03\x00"
_LOCALITY: Final = b"StartupLocality"
_LOCALITIES: Final = frozenset({0, 3, 4})
_END_MARKER: Final = 0xFFFFFFFF
_DRTM_PCRS: Final = range(17, 23)
_MAX_ALGORITHMS: Final = 8
_MAX_DIGEST: Final = 64

_OLD_EVENT: Final = struct.Struct("<II20sI")
_HEAD: Final = struct.Struct("<III")
_ALGORITHM: Final = struct.Struct("<HH")
# Platform class, minor, major, errata, size of a native integer, number of algorithms.
_SPEC_FIELDS: Final = struct.Struct("<IBBBBI")


class Event(NamedTuple):
    """One measurement.

    Attributes:
        pcr: PCR number.
        type: TCG event type.
        digests: one per bank of the log, in the order of `Log.banks`.
        data: what firmware says it measured.
    """

    pcr: int
    type: int
    digests: tuple[bytes, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Log:
    """A boot log that parsed.

    Attributes:
        sha256: lower-case hex SHA-256 of the bytes.
        banks: hash names it holds digests for, those we know.
        events: without the header; numbered from 1 in messages.
        locality: where PCR 0 starts, 0 unless a StartupLocality event says otherwise.
        legacy: SHA-1 alone, without a header.
    """

    sha256: str
    banks: tuple[str, ...]
    events: tuple[Event, ...]
    locality: int
    legacy: bool

    def bank_index(self, bank: str) -> int:
        """Return the place of a bank's digest in an event.

        Raises:
            InvalidInputError: the log has no digests of this bank.
        """
        if bank not in self.banks:
            if self.legacy:
                raise InvalidInputError("log: not a crypto-agile log")
            raise InvalidInputError(f"log: no digests of bank {bank}")
        return self.banks.index(bank)


def parse(raw: bytes, *, allow_legacy: bool = False) -> Log:
    """Read a whole log.

    Args:
        raw: the kernel's `binary_bios_measurements`.
        allow_legacy: take the old format that holds SHA-1 alone.

    Raises:
        AttestationError: `log_missing`: there are no bytes.
        InvalidInputError: malformed, or the old format while it is not allowed.
        LimitError: more than `MAX_BYTES` or `MAX_EVENTS`.
    """
    if not raw:
        raise AttestationError([Finding("log_missing", "log: boot log is missing")])
    if len(raw) > MAX_BYTES:
        raise LimitError(f"log: larger than {MAX_BYTES} bytes")
    table = _algorithms(raw)
    if table is None and not allow_legacy:
        raise InvalidInputError("log: not a crypto-agile log")
    events = _read_legacy(raw) if table is None else _read_agile(raw, table)
    return Log(
        sha256=hashlib.sha256(raw).hexdigest(),
        banks=("sha1",) if table is None else table.banks,
        events=tuple(events),
        locality=_locality(events),
        legacy=table is None,
    )


def replay(log: Log, bank: str) -> dict[int, bytes]:
    """Return the value of each of the 24 PCRs after the log.

    Raises:
        InvalidInputError: the log has no digests of this bank.
    """
    index = log.bank_index(bank)
    name, size = wire.HASHES[wire.BANKS[bank]]
    new = getattr(hashlib, name)
    values = [initial(n, size, log.locality) for n in range(wire.PCR_COUNT)]
    for pcr, kind, digests, _ in log.events:
        if kind != EV_NO_ACTION:
            values[pcr] = new(values[pcr] + digests[index]).digest()
    return dict(enumerate(values))


def initial(pcr: int, size: int, locality: int) -> bytes:
    """Return what a PCR of `size` bytes holds before the first measurement."""
    if pcr in _DRTM_PCRS:
        return b"\xff" * size
    return (locality if pcr == 0 else 0).to_bytes(size, "big")


class _Table(NamedTuple):
    """The header event: number and digest size of each algorithm, and where events begin."""

    sizes: tuple[tuple[int, int], ...]
    end: int

    @property
    def banks(self) -> tuple[str, ...]:
        """Return the names of those algorithms we know."""
        return tuple(wire.HASHES[n][0] for n, _ in self.sizes if n in wire.HASHES)


def _algorithms(raw: bytes) -> _Table | None:
    """Read the header event; None when there is none."""
    if len(raw) < _OLD_EVENT.size:
        raise InvalidInputError("log: ends early in event 0")
    pcr, kind, digest, size = _OLD_EVENT.unpack_from(raw)
    if kind != EV_NO_ACTION or not raw.startswith(_SPEC_ID, _OLD_EVENT.size):
        return None
    if pcr or any(digest):
        raise InvalidInputError("log: not a crypto-agile log")
    end = _OLD_EVENT.size + size
    if end > len(raw):
        raise InvalidInputError("log: ends early in event 0")
    malformed = InvalidInputError("log: algorithm table is malformed")
    body = raw[_OLD_EVENT.size + len(_SPEC_ID) : end]
    if len(body) < _SPEC_FIELDS.size:
        raise malformed
    count = _SPEC_FIELDS.unpack_from(body)[-1]
    vendor = _SPEC_FIELDS.size + count * _ALGORITHM.size
    if not 1 <= count <= _MAX_ALGORITHMS or len(body) <= vendor:
        raise malformed
    if len(body) != vendor + 1 + body[vendor]:
        raise malformed
    sizes = tuple(_ALGORITHM.iter_unpack(body[_SPEC_FIELDS.size : vendor]))
    if len(dict(sizes)) != count or not all(_is_size(*entry) for entry in sizes):
        raise malformed
    return _Table(sizes, end)


def _is_size(number: int, size: int) -> bool:
    known = wire.HASHES.get(number)
    return 1 <= size <= _MAX_DIGEST if known is None else size == known[1]


def _read_agile(raw: bytes, table: _Table) -> list[Event]:
    # Nearly every event lists its digests in the order of the header, so it has one fixed head.
    sizes = table.sizes
    head = struct.Struct("<III" + "".join(f"H{size}s" for _, size in sizes) + "I")
    count, numbers = len(sizes), tuple(number for number, _ in sizes)
    keep = [i for i, number in enumerate(numbers) if number in wire.HASHES]
    total, offset = len(raw), table.end
    head_size, last = head.size, total - head.size
    unpack, make = head.unpack_from, tuple.__new__  # the latter takes half the time of Event()
    all_kept = len(keep) == count
    events: list[Event] = []
    while offset < total:
        if offset > last:
            raise _cut(raw, offset, len(events) + 1)
        fields = unpack(raw, offset)
        pcr, kind = fields[0], fields[1]
        digests = fields[4:-1:2]
        if fields[2] != count or fields[3:-1:2] != numbers:
            digests = _reorder(raw, offset, table, len(events) + 1)
        start = offset + head_size
        offset = start + fields[-1]
        if offset > total:
            raise _cut(raw, start - head_size, len(events) + 1)
        if not all_kept:
            digests = tuple(digests[i] for i in keep)
        event = make(Event, (pcr, kind, digests, raw[start:offset]))
        if pcr >= wire.PCR_COUNT or kind == EV_NO_ACTION:
            if _is_end(event, at_end=offset == total):
                break
            _check_odd(event)
        events.append(event)
        if len(events) > MAX_EVENTS:
            raise LimitError(f"log: more than {MAX_EVENTS} events")
    return events


def _reorder(raw: bytes, offset: int, table: _Table, number: int) -> tuple[bytes, ...]:
    """Read the digests of an event that lists them in an order of its own."""
    wrong = InvalidInputError(f"log: event {number} has the wrong digests")
    sizes = dict(table.sizes)
    found: dict[int, bytes] = {}
    _, _, count = _HEAD.unpack_from(raw, offset)
    if offset >= _content_end(raw):
        raise _cut(raw, offset, number)
    if count != len(sizes):
        raise wrong
    offset += _HEAD.size
    for _ in range(count):
        algorithm = int.from_bytes(raw[offset : offset + 2], "little")
        if algorithm not in sizes or algorithm in found:
            raise wrong
        found[algorithm] = raw[offset + 2 : offset + 2 + sizes[algorithm]]
        offset += 2 + sizes[algorithm]
    return tuple(found[algorithm] for algorithm in sizes)


def _read_legacy(raw: bytes) -> list[Event]:
    total, offset, content_end = len(raw), 0, _content_end(raw)
    events: list[Event] = []
    while offset < total:
        if offset + _OLD_EVENT.size > total or offset >= content_end:
            raise _cut(raw, offset, len(events) + 1)
        pcr, kind, digest, size = _OLD_EVENT.unpack_from(raw, offset)
        start = offset + _OLD_EVENT.size
        if start + size > total:
            raise _cut(raw, offset, len(events) + 1)
        offset = start + size
        event = Event(pcr, kind, (digest,), raw[start:offset])
        if pcr >= wire.PCR_COUNT or kind == EV_NO_ACTION:
            if _is_end(event, at_end=offset == total):
                break
            _check_odd(event)
        events.append(event)
        if len(events) > MAX_EVENTS:
            raise LimitError(f"log: more than {MAX_EVENTS} events")
    return events


def _is_end(event: Event, *, at_end: bool) -> bool:
    """Tell whether this is the note that some boot managers close a log with, outside all PCRs."""
    return event.pcr == _END_MARKER and event.type == EV_NO_ACTION and at_end


def _check_odd(event: Event) -> None:
    if event.pcr >= wire.PCR_COUNT:
        raise InvalidInputError(f"log: PCR number {event.pcr} does not exist")
    if any(map(any, event.digests)):
        raise InvalidInputError("log: no-action event with a digest")


def _content_end(raw: bytes) -> int:
    """Return where the padding of a log area begins; no event is all zero or all FF."""
    return min(len(raw.rstrip(b"\x00")), len(raw.rstrip(b"\xff")))


def _cut(raw: bytes, offset: int, number: int) -> InvalidInputError:
    if offset >= _content_end(raw):
        return InvalidInputError(f"log: {len(raw) - offset} bytes after the last event")
    return InvalidInputError(f"log: ends early in event {number}")


def _locality(events: list[Event]) -> int:
    """Return where PCR 0 starts."""
    found = [e for e in events if e.type == EV_NO_ACTION and e.data.startswith(_LOCALITY)]
    if not found:
        return 0
    event, size = found[0], len(_LOCALITY) + 2
    shaped = len(event.data) == size and event.data[-2] == 0 and event.data[-1] in _LOCALITIES
    if len(found) > 1 or event.pcr or not shaped:
        raise InvalidInputError("log: startup locality event is malformed")
    return event.data[-1]
