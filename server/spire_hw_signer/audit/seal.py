"""How a log goes on after a break: an operator says so, in the first record of a new file.

The broken file stays as it is. The seal names it by its digest, says which record is the last good
one and what is wrong after it, and has a number that is higher than any that was seen, so that no
head of the sealed part comes again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from spire_hw.bootid import read_boot_id
from spire_hw.errors import NotReadyError
from spire_hw_signer.audit.chain import Chain, LogHead, next_hash
from spire_hw_signer.audit.folder import Folder, digest_of, file_names, read_lines, reason_of
from spire_hw_signer.audit.record import Kind, Record, cut, encode, file_name, micro, time_text
from spire_hw_signer.audit.verify import Verdict, Verifier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from spire_hw.clock import Clock
    from spire_hw.key import PublicKey
    from spire_hw_signer.audit.verify import Finding

_WELL: Final = "nothing in it; its witnesses or its log key say otherwise"


@dataclass(frozen=True, slots=True)
class Damage:
    """A log that is to be sealed.

    Attributes:
        good: the log up to its last good record.
        file: the newest file.
        digest: SHA-256 of that file, hexadecimal.
        fault: what is wrong.
        seq: number that the seal gets.
        is_broken: the chain itself is.
    """

    good: Chain
    file: str
    digest: str
    fault: str
    seq: int
    is_broken: bool

    @property
    def target(self) -> str:
        """Return what an order for the seal names."""
        return f"{self.file}@{self.digest}"


def verify_directory(
    directory: Path, verifier: Verifier, names: Sequence[str] | None = None
) -> Verifier:
    """Have a verifier read all files of a log.

    Raises:
        NotReadyError: one cannot be read.
    """
    names = file_names(directory) if names is None else names
    for name in names:
        path = directory / name
        verifier.read(name, read_lines(path), partial(digest_of, path), last=name == names[-1])
    return verifier


def examine(
    directory: Path, key: PublicKey | None = None, copies: Sequence[Mapping[str, Any]] = ()
) -> Damage:
    """Find out what a seal would say.

    Args:
        directory: of the log.
        key: the log key, where it is at hand.
        copies: members of checkpoints from another place.

    Raises:
        NotReadyError: it cannot be read, or has no file.
    """
    names = file_names(directory)
    if not names:
        raise NotReadyError(f"{directory} holds no audit log")
    verifier = verify_directory(directory, Verifier(key, copies=copies), names)
    good, newest = verifier.end, names[-1]
    report = verifier.finish()
    wrong = [f for f in report.findings if f.verdict is Verdict.BROKEN]
    last = _last_of(directory / newest)
    seen = [body["at"] for body in copies]
    return Damage(
        good=good,
        file=newest,
        digest=digest_of(directory / newest),
        fault=_describe([f for f in wrong if f.file == newest] or wrong),
        seq=max([good.head.seq + last, *seen]) + 1,
        is_broken=bool(wrong),
    )


def _last_of(path: Path) -> int:
    """Return how many lines a file has: no honest number is higher than the good ones by more."""
    return sum(1 for _ in read_lines(path))


def _describe(findings: Sequence[Finding]) -> str:
    if not findings:
        return _WELL
    first = findings[0]
    place = f"line {first.line}: " if first.line else ""
    more = "" if len(findings) == 1 else f" (and {len(findings) - 1} more)"
    return cut(f"{place}{first.message}{more}")


def seal(
    directory: Path, damage: Damage, *, operators: Sequence[str], comment: str, clock: Clock
) -> LogHead:
    """Begin a new file; the signer can be started again.

    Args:
        directory: of the log; no signer may have it open.
        damage: as `examine` found it.
        operators: who says so.
        comment: why.
        clock: both times of the record.

    Returns:
        The end of the log.

    Raises:
        NotReadyError: it is not as it was, or it cannot be written.
        UnavailableError: a signer has it open.
    """
    folder = Folder(directory)
    folder.hold()
    try:
        if folder.names()[-1] != damage.file or digest_of(directory / damage.file) != damage.digest:
            raise NotReadyError(f"{directory} is not as it was; look again")
        body = {
            "log": damage.good.log_id,
            "file": damage.file,
            "digest": damage.digest,
            "good": damage.good.head.seq,
            "fault": cut(damage.fault),
            "operators": [cut(name) for name in operators],
            "comment": cut(comment),
            "open": list(damage.good.open),
            "orders": damage.good.orders,
        }
        record = Record(
            seq=damage.seq,
            time=time_text(clock.now()),
            mono=micro(clock.monotonic()),
            boot=read_boot_id() or "",
            kind=Kind.SEAL,
            prev=damage.good.head.hash,
            body=body,
        )
        line = encode(record)
        folder.append(file_name(damage.seq), line + b"\n")
        os.chmod(directory / damage.file, 0o400)  # noqa: PTH101 - what is evidence stays as it is
    except OSError as e:
        raise NotReadyError(f"audit log cannot be sealed: {reason_of(e)}") from e
    finally:
        folder.release()
    return LogHead(damage.seq, next_hash(damage.good.head.hash, line))
