"""What of a device's log stands in the audit log, and how it is found there again.

The audit log is the only place that says how far a device's log was taken: there is no other file
that could say something else after a crash. Its newest files are read, until one tells.

Events: `device_log` has entries, and where they end; `device_log_alarm` what was wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from spire_hw.errors import EncodingError, NotReadyError
from spire_hw_signer.audit.folder import file_names, read_lines
from spire_hw_signer.audit.record import Kind, parse
from spire_hw_signer.devicelog.entries import Mark

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from spire_hw_signer.audit.record import Record
    from spire_hw_signer.devicelog.entries import Entry

TAKEN: Final = "device_log"
ALARM: Final = "device_log_alarm"
MAX_ENTRIES: Final = 64
_LAST: Final = "last"
_UNLOGGED: Final = "unlogged"
_SIGN: Final = b'"event":"device_log'
_MAX_DIGITS: Final = 19


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a device's log was taken.

    Attributes:
        mark: the entry that was taken last, None when none was.
        unlogged: counters of events the device had no room for.
        known: whether the audit log says anything at all.
    """

    mark: Mark | None = None
    unlogged: Mapping[str, int] = field(default_factory=dict)
    known: bool = False


@dataclass(frozen=True, slots=True)
class Alarm:
    """What was wrong with a device's log.

    Attributes:
        time: when that was found, as records have it.
        text: in words.
    """

    time: str
    text: str


def fields_of(entries: Sequence[Entry], standing: Standing, form: str) -> dict[str, str]:
    """Return the fields of a `device_log` record.

    Args:
        entries: at most `MAX_ENTRIES`, which the record is to hold.
        standing: with these entries.
        form: of the device's log.
    """
    counters = (f"{kind}={count}" for kind, count in sorted(standing.unlogged.items()))
    return {
        "format": form,
        _LAST: "" if standing.mark is None else str(standing.mark),
        _UNLOGGED: " ".join(counters),
        **{f"entry.{e.number:05d}": f"{e.digest.hex()} {e.text}" for e in entries},
    }


def find_standing(directory: Path) -> Standing:
    """Return how far the device's log was taken, as the audit log says.

    Raises:
        NotReadyError: a file cannot be read.
    """
    record = next(_records(directory, TAKEN), None)
    if record is None:
        return Standing()
    fields = record.body["fields"]
    counters = dict(_counters(fields.get(_UNLOGGED, "")))
    return Standing(Mark.parse(fields.get(_LAST, "")), counters, known=True)


def find_alarm(directory: Path, since: datetime) -> Alarm | None:
    """Return the last alarm about the device's log since a time, None for none.

    Raises:
        NotReadyError: a file cannot be read.
    """
    record = next(_records(directory, ALARM, since.timestamp()), None)
    if record is None or record.at() < since:
        return None
    return Alarm(record.time, record.body["fields"].get("error", ""))


def _records(directory: Path, event: str, since: float = 0.0) -> Iterator[Record]:
    """Return records about the device's log, the newest of each file that was written since a time."""
    for name in reversed(file_names(directory)):
        if _written(directory / name) < since:
            return
        found = None
        for line in read_lines(directory / name):
            if line.whole and _SIGN in line.text:
                found = _as_record(line.text, event) or found
        if found is not None:
            yield found


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError as e:
        raise NotReadyError(f"{path} cannot be read: {e.strerror}") from e


def _as_record(text: bytes, event: str) -> Record | None:
    try:
        record = parse(text)
    except EncodingError:  # whether the log holds is asked elsewhere
        return None
    fits = record.kind is Kind.NOTE and record.body["event"] == event
    return record if fits else None


def _counters(text: str) -> Iterator[tuple[str, int]]:
    for word in text.split():
        kind, _, count = word.partition("=")
        if count.isascii() and count.isdigit() and len(count) <= _MAX_DIGITS:
            yield kind, int(count)
