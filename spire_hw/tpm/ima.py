"""Read the kernel's list of measured files and replay it into PCR 10.

What is in an entry counts because PCR 10 was extended with it: the list itself is a claim. Names
are bytes and compared as such.

Spec: Linux kernel, security/integrity/ima (templates, violations, boot aggregate).
"""

from __future__ import annotations

import hashlib
from operator import attrgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from spire_hw.errors import AttestationError, ErrorKind, Finding, LimitError
from spire_hw.posture.evidence import ImaEntry, ImaFacts, ImaState
from spire_hw.tpm import imalist, wire

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spire_hw.posture.evidence import PcrValues

AGGREGATE: Final = b"boot_aggregate"

_path_of = attrgetter("path")
_FIRMWARE_PCRS: Final = range(8)
_LOADER_PCRS: Final = (8, 9)


def replay(
    parts: Sequence[bytes],
    start: ImaState | None,
    pcrs: PcrValues,
    bank: str,
    *,
    logged: PcrValues | None = None,
    known: ImaState | None = None,
    allow_padded_sha1: bool = False,
) -> ImaFacts:
    """Replay a list, or the part of it after `start`, up to the quoted PCR 10.

    Entries after the one that reaches the quoted value are ignored: the list grows after a quote.

    Args:
        parts: the list, each part as `imalist.read` takes it; together within its bounds.
        start: where the part begins; None, or a state without entries, for a list from the first
            entry.
        pcrs: verified values; PCR 10 of `bank` must be among them, and PCR 0 to 7 for a list from
            the first entry.
        bank: which PCR 10.
        logged: replayed values of a verified boot log, for the PCRs of the boot aggregate that were
            not quoted or have moved on since.
        known: an earlier state of the same boot that the list must pass through.
        allow_padded_sha1: accept kernels before 5.8, which extend SHA-1 into larger banks.

    Raises:
        AttestationError: codes `ima_missing`, `ima_hash`, `ima_replay`, `boot_aggregate`, and
            denied `ima_rollback`, `ima_padded_sha1`.
        InvalidInputError: an entry is malformed.
        LimitError: a bound of `imalist` is exceeded.
    """
    if (bank, imalist.PCR) not in pcrs:
        raise ValueError("an IMA list needs a quoted PCR 10")
    size = wire.HASHES[wire.BANKS[bank]][1]
    begin = start or ImaState(0, bytes(size), bytes(hashlib.sha256().digest_size))
    is_whole = begin.count == 0
    if is_whole and not any(parts):
        raise _refusal("ima_missing", "list is missing")
    if sum(map(len, parts)) > imalist.MAX_BYTES:
        raise LimitError(f"ima: larger than {imalist.MAX_BYTES} bytes")
    part, padded = _replayed(parts, begin, bank, pcrs[bank, imalist.PCR])
    if padded and not allow_padded_sha1:
        text = f"kernel extends SHA-1 into the {bank.replace('sha', 'SHA-')} bank"
        raise _denial("ima_padded_sha1", text)
    _check_aggregate(part, pcrs, logged or {}, is_whole=is_whole)
    if known is not None and not _passes(part, begin, known, bank):
        raise _denial("ima_rollback", "list was rewritten")
    return ImaFacts(
        start=begin.count,
        state=part.state(begin),
        entries=tuple(part.entries[1:] if is_whole else part.entries),
        violations=len(part.extended) - len(part.entries),
        padded_sha1=padded,
    )


class _Part(NamedTuple):
    """A part of the list as far as it was replayed.

    Attributes:
        pcr: PCR 10 at its end, as quoted.
        extended: what PCR 10 was extended with.
        entries: without violations.
    """

    pcr: bytes
    extended: list[bytes]
    entries: list[ImaEntry]

    def state(self, begin: ImaState) -> ImaState:
        """Return where the part ends."""
        running = hashlib.sha256(begin.sha256 + b"".join(self.extended)).digest()
        return ImaState(begin.count + len(self.extended), self.pcr, running)


def _replayed(
    parts: Sequence[bytes], begin: ImaState, bank: str, quoted: bytes
) -> tuple[_Part, bool]:
    """Return what reaches the quoted value, and whether the kernel pads SHA-1.

    Each part is read once: what a kernel that pads would have extended is tried on what was read.
    """
    new, pcr = getattr(hashlib, bank), begin.pcr
    records: list[imalist.Record] = []
    if pcr == quoted:
        return _part(pcr, records), False
    for data in parts:
        for record in imalist.read(data, begin.count + len(records), bank):
            pcr = new(pcr + record.digest).digest()
            records.append(record)
            if pcr == quoted:
                return _part(pcr, records), False
        if len(records) > imalist.MAX_ENTRIES:
            raise LimitError(f"ima: more than {imalist.MAX_ENTRIES} entries")
    if bank != "sha1":
        pcr, size = begin.pcr, len(begin.pcr)
        padded = [r if r.entry is None else _padded(r, size) for r in records]
        for count, record in enumerate(padded, 1):
            pcr = new(pcr + record.digest).digest()
            if pcr == quoted:
                return _part(pcr, padded[:count]), True
    raise _refusal("ima_replay", "list does not replay to PCR 10")


def _padded(record: imalist.Record, size: int) -> imalist.Record:
    return record._replace(digest=record.sha1.ljust(size, b"\x00"))


def _part(pcr: bytes, records: list[imalist.Record]) -> _Part:
    entries = [record.entry for record in records if record.entry is not None]
    return _Part(pcr, [record.digest for record in records], entries)


def _passes(part: _Part, begin: ImaState, known: ImaState, bank: str) -> bool:
    """Tell whether the list was at an earlier state once."""
    count, pcr = known.count - begin.count, begin.pcr
    if not 0 <= count <= len(part.extended):
        return False
    for digest in part.extended[:count]:
        pcr = hashlib.new(bank, pcr + digest).digest()
    return pcr == known.pcr


def _check_aggregate(part: _Part, pcrs: PcrValues, logged: PcrValues, *, is_whole: bool) -> None:
    """Tie the list to this boot: its first entry, and no other, is a digest over PCRs."""
    wrong = _refusal("boot_aggregate", "boot aggregate does not match")
    later = part.entries[1:] if is_whole else part.entries
    if AGGREGATE in map(_path_of, later):
        raise wrong
    if not is_whole:
        return
    # A violation in front is not among the entries.
    if not part.entries or part.extended[0] == b"\xff" * len(part.pcr):
        raise wrong
    first = part.entries[0]
    allowed = _aggregates(first.algorithm, pcrs, logged)
    if first.path != AGGREGATE or first.digest not in allowed:
        raise wrong


def _aggregates(bank: str, pcrs: PcrValues, logged: PcrValues) -> Iterator[bytes]:
    """Yield the values the aggregate may have.

    Kernels from 5.8 on include what boot loaders measured, unless the bank is SHA-1. Their PCRs
    may have moved on since, so the log's values count as well.
    """
    firmware = [pcrs.get((bank, n), logged.get((bank, n))) for n in _FIRMWARE_PCRS]
    if bank not in wire.BANKS or None in firmware:
        return
    head = b"".join(value for value in firmware if value is not None)
    yield hashlib.new(bank, head).digest()
    if bank == "sha1":
        return
    nothing = bytes(wire.HASHES[wire.BANKS[bank]][1])
    eight, nine = (
        {source.get((bank, n), nothing) for source in (pcrs, logged)} for n in _LOADER_PCRS
    )
    for a in eight:
        for b in nine:
            yield hashlib.new(bank, head + a + b).digest()


def _refusal(code: str, text: str) -> AttestationError:
    return AttestationError([Finding(code, f"ima: {text}")])


def _denial(code: str, text: str) -> AttestationError:
    return AttestationError([Finding(code, f"ima: {text}", ErrorKind.PERMISSION_DENIED)])
