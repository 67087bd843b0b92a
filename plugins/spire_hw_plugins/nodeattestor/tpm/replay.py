"""The boot log and the IMA list of a node: unpacked within bounds, replayed into what was quoted."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from spire_hw.errors import (
    AttestationError,
    ErrorKind,
    LimitError,
    NotReadyError,
    SpireHwError,
)
from spire_hw.tpm import boot, eventlog, ima, imalist
from spire_hw.tpm.boot import BootRules
from spire_hw.tpm.inflate import inflate
from spire_hw.tpm.wire import BANKS, HASHES
from spire_hw_plugins.nodeattestor.tpm.statements import refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.errors import Finding
    from spire_hw.posture.evidence import BootFacts, ImaFacts, PcrValues
    from spire_hw.posture.judge import EvidenceRequest
    from spire_hw.tpm.wire import PcrSelection

FIRMWARE_PCRS: Final = tuple(range(8))
# The kernel's aggregate covers two more than firmware extends.
AGGREGATE_PCRS: Final = tuple(range(10))
# More than this is replayed in a thread: it takes long enough for others to wait for.
_SHORT_BYTES: Final = 256 * 1024
_ROLLBACK: Final = "ima_rollback"
_NOT_ANNOUNCED: Final = "log: boot log is not the one announced"


@dataclass(frozen=True, slots=True)
class Logs:
    """What a node sent besides its quotes, unpacked.

    Attributes:
        boot: firmware's log, None when not asked for.
        boot_sha256: lower-case hex digest it was announced with, None when it was not.
        ima: the kernel's list in parts of whole lines, None when not asked for.
        ima_from: number of the first of them.
    """

    boot: bytes | None = None
    boot_sha256: str | None = None
    ima: tuple[bytes, ...] | None = None
    ima_from: int = 0


@dataclass(frozen=True, slots=True)
class Proved:
    """What the quotes said that logs are held against.

    Attributes:
        pcrs: verified values.
        reset_count: true count of resets; None when the key that signed hides the counters.
    """

    pcrs: PcrValues
    reset_count: int | None


@dataclass(frozen=True, slots=True)
class Replayed:
    """What the logs tell.

    Attributes:
        boot: of the boot log, None without one.
        ima: of the list, None without one.
        findings: `ima_rollback`, when the list contradicts what is known of this boot.
    """

    boot: BootFacts | None = None
    ima: ImaFacts | None = None
    findings: tuple[Finding, ...] = ()


def unpack_log(data: bytes | None, announced: int | None = None) -> bytes:
    """Return a boot log that was asked for.

    Args:
        data: zlib, as it came.
        announced: size it has to have.

    Raises:
        LimitError: too large.
        InvalidInputError: not zlib.
        AttestationError: `log_missing`, `log_announced`.
    """
    raw = inflate(data, eventlog.MAX_BYTES, "log") if data else b""
    if not raw:
        raise refusal("log_missing", "log: boot log is missing")
    if announced not in {None, len(raw)}:
        raise refusal("log_announced", _NOT_ANNOUNCED)
    return raw


def unpack_ima(data: bytes | None, before: int = 0) -> bytes:
    """Return a part of an IMA list that was asked for.

    Args:
        data: zlib, as it came; an empty stream when nothing was measured since.
        before: bytes of the parts in front of it.

    Raises:
        LimitError: too large, or too large together.
        InvalidInputError: not zlib.
        AttestationError: `ima_missing`.
    """
    if data is None:
        raise refusal("ima_missing", "ima: list is missing")
    room = imalist.MAX_BYTES - before
    try:
        return inflate(data, min(room, imalist.PART_BYTES), "ima")
    except LimitError as e:
        if room >= imalist.PART_BYTES:
            raise LimitError(f"ima: part larger than {imalist.PART_BYTES} bytes") from e
        raise LimitError(f"ima: larger than {imalist.MAX_BYTES} bytes") from e


async def replay_logs(
    wanted: EvidenceRequest,
    asked: Sequence[PcrSelection],
    logs: Logs,
    proved: Proved,
) -> Replayed:
    """Return what a node's logs prove, given what it quoted.

    Args:
        wanted: what the host asked for.
        asked: what was quoted for it.
        logs: what came.
        proved: what the quotes said.

    Raises:
        AttestationError: a log that does not replay.
        InvalidInputError: a log that does not parse.
        LimitError: too many events or entries.
    """
    size = len(logs.boot or b"") + sum(map(len, logs.ima or ()))
    if size <= _SHORT_BYTES:
        return _replay(wanted, asked, logs, proved)
    return await asyncio.to_thread(_replay, wanted, asked, logs, proved)


def _replay(
    wanted: EvidenceRequest,
    asked: Sequence[PcrSelection],
    logs: Logs,
    proved: Proved,
) -> Replayed:
    bank = log_bank(wanted, asked)
    if any((bank, n) not in proved.pcrs for n in needed_pcrs(wanted)):
        raise NotReadyError("policy: asks for a log, but not for the PCRs it is replayed into")
    found, logged = None, None
    if logs.boot is not None:
        log = _parse(logs.boot, logs.boot_sha256, "sha1_log" in wanted.tolerate)
        rules = BootRules(
            empty_secure_boot="empty_secure_boot" in wanted.tolerate,
            early_authority="early_authority" in wanted.tolerate,
        )
        found = boot.facts(log, proved.pcrs, bank, rules)
        if logs.ima is not None:
            logged = {(bank, n): value for n, value in eventlog.replay(log, bank).items()}
    if logs.ima is None:
        return Replayed(found)
    try:
        return Replayed(found, _replay_ima(wanted, bank, logs, proved, logged))
    except AttestationError as e:
        if [finding.code for finding in e.findings] != [_ROLLBACK]:
            raise
        return Replayed(found, findings=tuple(e.findings))


def _parse(raw: bytes, announced: str | None, allow_legacy: bool) -> eventlog.Log:
    """Read a boot log; what is not the one announced is told to be that first."""
    try:
        log = eventlog.parse(raw, allow_legacy=allow_legacy)
    except SpireHwError as e:
        if announced not in {None, hashlib.sha256(raw).hexdigest()}:
            raise refusal("log_announced", _NOT_ANNOUNCED) from e
        raise
    if announced not in {None, log.sha256}:
        raise refusal("log_announced", _NOT_ANNOUNCED)
    return log


def _replay_ima(
    wanted: EvidenceRequest,
    bank: str,
    logs: Logs,
    proved: Proved,
    logged: PcrValues | None,
) -> ImaFacts:
    if logs.ima is None or wanted.ima is None:
        raise refusal("evidence_unasked", "envelope: evidence that was not asked for")
    start, known = (wanted.ima if wanted.ima.count else None), wanted.known_ima
    if proved.reset_count is None:
        same_boot = logs.ima_from != 0  # the node's word: nothing else tells
    else:
        same_boot = wanted.reset_count in {None, proved.reset_count}
    if logs.ima_from and (start is None or not same_boot):
        raise refusal("ima_restart", "ima: list must start at entry 0")
    if not same_boot:
        start = known = None
    elif start is not None and not logs.ima_from:
        start, known = None, start  # the whole list instead: it must pass where the part begins
    elif start is not None and logs.ima_from != start.count:
        denied = ErrorKind.PERMISSION_DENIED
        raise refusal(_ROLLBACK, "ima: list was rewritten: it begins elsewhere", denied)
    return ima.replay(
        logs.ima,
        start,
        proved.pcrs,
        bank,
        logged=logged,
        known=known,
        allow_padded_sha1="padded_sha1" in wanted.tolerate,
    )


def needed_pcrs(wanted: EvidenceRequest) -> frozenset[int]:
    """Return the PCRs the logs that are asked for are replayed into."""
    needed: set[int] = set()
    if wanted.boot_log:
        needed.update(FIRMWARE_PCRS)
    if wanted.ima is not None:
        needed.add(imalist.PCR)
        if not wanted.boot_log and not wanted.ima.count:
            needed.update(AGGREGATE_PCRS)
    return frozenset(needed)


def extended(wanted: EvidenceRequest, asked: tuple[PcrSelection, ...]) -> tuple[PcrSelection, ...]:
    """Return what has to be quoted so that the logs asked for can be replayed."""
    needed = needed_pcrs(wanted)
    if not needed:
        return asked
    bank = log_bank(wanted, asked)
    return tuple(
        replace(s, pcrs=tuple(sorted(needed.union(s.pcrs)))) if s.bank == bank else s for s in asked
    )


def log_bank(wanted: EvidenceRequest, asked: Sequence[PcrSelection]) -> str:
    """Return the bank that logs are replayed in.

    The one asked for, else that of the list's state, else the best covered.
    """
    if any(wanted.bank == s.bank for s in asked):
        return wanted.bank
    needed = needed_pcrs(wanted)
    if wanted.ima is not None:
        size = len(wanted.ima.pcr)
        asked = [s for s in asked if HASHES[BANKS[s.bank]][1] == size] or asked
    return max(asked, key=lambda s: len(needed.intersection(s.pcrs))).bank
