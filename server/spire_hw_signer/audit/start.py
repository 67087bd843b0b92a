"""Where a log goes on after a start: its newest file is read whole, a torn last line is cut off.

A crash may leave one record that is not whole at the very end, never more: batches are cut off
before the next one is written. Anything else is somebody's hand, and the signer does not start until
an operator has sealed the log.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from spire_hw.errors import EncodingError, NotReadyError
from spire_hw_signer.audit.chain import Chain, ChainError, LogHead, next_hash
from spire_hw_signer.audit.folder import Folder, Line, file_names, read_lines
from spire_hw_signer.audit.record import Kind, Record, file_name, parse

if TYPE_CHECKING:
    from pathlib import Path

_SHOWN_BYTES: Final = 2048


class BrokenLogError(NotReadyError):
    """A log that does not continue; an operator has to look at it.

    Attributes:
        file: where it breaks.
        chain: all that is good before that.
    """

    def __init__(self, path: Path, line: int, reason: str, chain: Chain) -> None:
        super().__init__(
            f"audit log is broken: {path} line {line}: {reason}; run"
            f" `spire-hw-signer log verify {path.parent}` to see all of it, keep a copy, then"
            " `spire-hw-signer log seal` to go on"
        )
        self.file = path
        self.chain = chain
        self.reason = reason


@dataclass(slots=True)
class Found:
    """What a start found.

    Attributes:
        chain: the log up to its end.
        torn: the members of a recovery record, None when all was whole.
        checkpoints: records and lines of the newest file's checkpoints, oldest first.
        first: the first record of the newest file, None for a new log.
    """

    chain: Chain = field(default_factory=Chain)
    torn: dict[str, object] | None = None
    checkpoints: list[tuple[Record, bytes]] = field(default_factory=list)
    first: Record | None = None


def find(folder: Folder) -> Found:
    """Read the end of a log and make its folder ready to go on.

    Raises:
        NotReadyError: a file cannot be read.
        BrokenLogError: the chain does not hold.
    """
    names = folder.names()
    torn: Line | None = None
    while names:
        path = folder.path / names[-1]
        found, bad = _read(path)
        if found.first is not None:
            _check_joint(folder, names, found.first)
            size = bad.offset if bad is not None else path.stat().st_size
            folder.resume(names[-1], size)
            torn = bad or torn
            found.torn = None if torn is None else _as_torn(torn)
            return found
        if torn is not None:
            raise BrokenLogError(path, 1, "two files without a record", found.chain)
        # A new file whose first record did not make it: the one before it is the newest again.
        torn = bad or Line(0, b"", whole=False)
        path.unlink()
        names.pop()
    return Found(torn=None if torn is None else _as_torn(torn))


def _as_torn(line: Line) -> dict[str, object] | None:
    if not line.size:
        return None
    return {
        "event": "torn",
        "bytes": line.size,
        "digest": hashlib.sha256(line.text).hexdigest(),
        "content": line.text[:_SHOWN_BYTES].hex(),
    }


def _read(path: Path) -> tuple[Found, Line | None]:
    """Return what a file holds, and the last line where that one is bad."""
    found = Found()
    bad: tuple[int, Line, str] | None = None
    for number, line in enumerate(read_lines(path), start=1):
        if bad is not None:
            raise BrokenLogError(path, bad[0], bad[2], found.chain)
        try:
            _take(found, line)
        except (EncodingError, ChainError) as e:
            bad = (number, line, e.message)
    return found, None if bad is None else bad[1]


def _take(found: Found, line: Line) -> None:
    if not line.whole:
        raise EncodingError("audit record", "is not whole")
    record = parse(line.text)
    first = found.first is None
    chain = Chain.before(record) if first else found.chain
    chain.check(record, first_in_file=first)
    chain.take(record, line.text)
    found.chain = chain
    if first:
        found.first = record
    if record.kind is Kind.CHECKPOINT:
        found.checkpoints.append((record, line.text))


def _check_joint(folder: Folder, names: list[str], first: Record) -> None:
    """Make sure that the newest file continues the one before it, where that is there."""
    if len(names) == 1 or first.kind is Kind.SEAL:
        return
    path = folder.path / names[-2]
    head, number = LogHead(), 0
    last: Line | None = None
    for number, last in enumerate(read_lines(path), start=1):  # noqa: B007 - the last ones
        pass
    if last is not None:
        try:
            record = parse(last.text)
            head = LogHead(record.seq, next_hash(record.prev, last.text))
        except EncodingError as e:
            raise BrokenLogError(path, number, e.message, Chain()) from e
    if first.kind is not Kind.ROTATION or head != LogHead(first.seq - 1, first.prev):
        reason = f"{names[-1]} does not continue it"
        raise BrokenLogError(path, number, reason, Chain(head=head))


def find_hash(directory: Path, seq: int) -> bytes | None:
    """Return the chain value of a record, None when it is not in the files that are there.

    What is read is not checked: the log was when it was opened.

    Raises:
        NotReadyError: a file cannot be read.
    """
    names = [name for name in file_names(directory) if name <= file_name(seq)]
    if not names:
        return None
    for line in read_lines(directory / names[-1]):
        try:
            record = parse(line.text)
        except EncodingError:  # the end of a file that was sealed
            return None
        if record.seq == seq:
            return next_hash(record.prev, line.text)
    return None
