"""One line of the audit log: what a record holds, its only spelling, and how it is read.

A line is canonical JSON: ASCII, members sorted, no blanks, one spelling for every value. Reading is
strict and total: unknown, missing or repeated members, other types and other spellings are refused.
Hashes and identifiers are lower-case hexadecimal, times RFC 3339 in UTC with microseconds, durations
and the monotonic clock whole microseconds.

This module is pure: text and values in, values or an EncodingError out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final, NoReturn

from spire_hw.bootid import is_boot_id
from spire_hw.errors import EncodingError, InvalidInputError

WHAT: Final = "audit record"
NO_HEAD: Final = bytes(32)
MAX_LINE_BYTES: Final = 1024 * 1024
MAX_TEXT: Final = 512
_MAX_WHOLE: Final = 2**63 - 1
_HEAD_HEX: Final = 64
_LOG_ID_HEX: Final = 32
_MICRO: Final = 1_000_000
_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z", re.ASCII
)
_WORD: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}", re.ASCII)
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})*", re.ASCII)
_FILE_NAME: Final = re.compile(r"audit-[0-9]{16}\.log", re.ASCII)
_encode_json: Final = json.JSONEncoder(
    separators=(",", ":"), sort_keys=True, ensure_ascii=True, allow_nan=False
).encode


class Kind(Enum):
    """What a record is about."""

    START = "start"  # the first record of a log
    INTENT = "intent"  # about to be done; in the log before it is
    OUTCOME = "outcome"  # what became of an intent
    REFUSAL = "refusal"
    NOTE = "note"
    ORDER = "order"  # of an operator
    CHECKPOINT = "checkpoint"
    ROTATION = "rotation"  # the first record of a later file
    RECOVERY = "recovery"  # a torn last line was cut off
    SEAL = "seal"  # an operator went on after a broken chain; the first record of a file


class Result(Enum):
    """What became of an intent."""

    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"  # the signer ended before it could tell


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Attributes:
        seq: its number, 1 for the first of a log.
        time: wall clock, RFC 3339.
        mono: monotonic clock, microseconds; counts within one boot.
        boot: id of the boot, "" where the kernel tells none.
        kind: what it is about.
        prev: chain value of the record before, `NO_HEAD` for the first.
        body: the members of its kind.
    """

    seq: int
    time: str
    mono: int
    boot: str
    kind: Kind
    prev: bytes
    body: Mapping[str, Any]

    def at(self) -> datetime:
        """Return its wall clock time."""
        return parse_time(self.time)


def encode(record: Record) -> bytes:
    """Return the line of a record, without its line feed.

    Raises:
        EncodingError: it is longer than `MAX_LINE_BYTES`.
    """
    line = _encode_json(
        {
            **record.body,
            "seq": record.seq,
            "time": record.time,
            "mono": record.mono,
            "boot": record.boot,
            "kind": record.kind.value,
            "prev": record.prev.hex(),
        }
    ).encode("ascii")
    if len(line) > MAX_LINE_BYTES:
        raise EncodingError(WHAT, f"is longer than {MAX_LINE_BYTES} bytes")
    return line


def parse(line: bytes) -> Record:
    """Read a line, without its line feed.

    Raises:
        EncodingError: it is no record, or not spelled as `encode` does.
    """
    if len(line) > MAX_LINE_BYTES:
        raise EncodingError(WHAT, f"is longer than {MAX_LINE_BYTES} bytes")
    members = _load(line)
    kind = _kind(members)
    for name, check in _COMMON.items():
        _check(name, members, check)
    for name, check in BODIES[kind].items():
        _check(name, members, check)
    body = {name: members[name] for name in BODIES[kind]}
    if len(members) != len(body) + len(_COMMON):
        known = {*_COMMON, *body}
        _refuse(min(name for name in members if name not in known), "is not known")
    record = Record(
        seq=members["seq"],
        time=members["time"],
        mono=members["mono"],
        boot=members["boot"],
        kind=kind,
        prev=bytes.fromhex(members["prev"]),
        body=body,
    )
    if encode(record) != line:
        raise EncodingError(WHAT, "is not in its canonical spelling")
    return record


def time_text(at: datetime) -> str:
    """Return a time as records have it."""
    return at.astimezone(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def parse_time(text: str) -> datetime:
    """Read a time as `time_text` writes it.

    Raises:
        EncodingError: it is another text.
    """
    if _TIME.fullmatch(text) is None:
        raise EncodingError(WHAT, "expected a time such as 2026-11-22T08:12:00.000000Z")
    try:
        return datetime.fromisoformat(text)
    except ValueError as e:
        raise EncodingError(WHAT, f"{text} is no time") from e


def micro(seconds: float) -> int:
    """Return seconds as whole microseconds, never below 0."""
    return max(0, int(seconds * _MICRO))


def cut(text: str) -> str:
    """Return a text as long as records take it; what is longer ends in three dots."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."


def canonical(value: Mapping[str, Any]) -> bytes:
    """Return plain values as canonical JSON, ASCII."""
    return _encode_json(value).encode("ascii")


def load_canonical(data: bytes, what: str) -> dict[str, Any]:
    """Read an object in canonical JSON.

    Args:
        data: its text.
        what: what it is, for errors.

    Raises:
        EncodingError: anything else.
    """
    found = _load(data, what)
    try:
        same = canonical(found) == data
    except (ValueError, RecursionError) as e:
        raise EncodingError(what, "cannot be written again") from e
    if same:
        return found
    raise EncodingError(what, "is not in canonical JSON: members sorted, no blanks, ASCII")


def is_file_name(name: str) -> bool:
    """Tell whether a file of this name belongs to a log."""
    return _FILE_NAME.fullmatch(name) is not None


def file_name(seq: int) -> str:
    """Return the name of the file whose first record has this number."""
    return f"audit-{seq:016d}.log"


def check_word(text: str, what: str) -> str:
    """Return a word as notes take them for events.

    Raises:
        InvalidInputError: anything but a-z, 0-9, `_`, `.` and `-`, or longer than 64.
    """
    if _WORD.fullmatch(text) is None:
        raise InvalidInputError(f"{what} {text[:64]!a} is not a word of a-z, 0-9, _, . and -")
    return text


def _load(text: bytes, what: str = WHAT) -> dict[str, Any]:
    def no_number(_text: str) -> NoReturn:
        raise EncodingError(what, "holds a number that is not whole")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise EncodingError(what, "a member appears twice")
        return made

    try:
        members = json.loads(
            text.decode("ascii"),
            object_pairs_hook=unique,
            parse_float=no_number,
            parse_constant=no_number,
        )
    except UnicodeDecodeError as e:
        raise EncodingError(what, "is not ASCII", e.start) from e
    except json.JSONDecodeError as e:
        raise EncodingError(what, f"is not JSON: {e.msg}", e.pos) from e
    except RecursionError as e:
        raise EncodingError(what, "is nested too deep") from e
    except EncodingError:
        raise
    except ValueError as e:  # more digits than Python reads
        raise EncodingError(what, "holds a number that is not allowed") from e
    if not isinstance(members, dict):
        raise EncodingError(what, "is not an object")
    return members


def _refuse(name: str, reason: str) -> NoReturn:
    raise EncodingError(WHAT, f"{ascii(name[:64])[1:-1]} {reason}")


def _kind(members: dict[str, Any]) -> Kind:
    try:
        return Kind(members.get("kind"))
    except ValueError as e:
        raise EncodingError(WHAT, "kind is missing or not known") from e


# A check of one value: says what was expected, "" when the value is fine.
_Check = Callable[[Any], str]


def _check(name: str, members: Mapping[str, Any], check: _Check) -> None:
    if name not in members:
        _refuse(name, "is missing")
    expected = check(members[name])
    if expected:
        _refuse(name, f"is not {expected}")


def _whole(value: Any) -> str:
    fits = type(value) is int and 0 <= value <= _MAX_WHOLE
    return "" if fits else "a whole number from 0"


def _number(value: Any) -> str:
    return "" if type(value) is int and 1 <= value <= _MAX_WHOLE else "a whole number from 1"


def _text(value: Any) -> str:
    fits = isinstance(value, str) and len(value) <= MAX_TEXT
    return "" if fits else f"text of up to {MAX_TEXT} characters"


def _word(value: Any) -> str:
    return "" if isinstance(value, str) and _WORD.fullmatch(value) else "a word"


def _hex(value: Any) -> str:
    return "" if isinstance(value, str) and _HEX.fullmatch(value) else "lower-case hexadecimal"


def _hash(value: Any) -> str:
    return "" if not _hex(value) and len(value) == _HEAD_HEX else "32 bytes in hexadecimal"


def _log_id(value: Any) -> str:
    return "" if not _hex(value) and len(value) == _LOG_ID_HEX else "16 bytes in hexadecimal"


def _time(value: Any) -> str:
    if isinstance(value, str):
        try:
            parse_time(value)
        except EncodingError:
            return "a time in UTC with microseconds"
        return ""
    return "text"


def _boot(value: Any) -> str:
    fits = value == "" or (isinstance(value, str) and is_boot_id(value))
    return "" if fits else "the id of a boot"


def _result(value: Any) -> str:
    return "" if any(value == r.value for r in Result) else "done, failed or unknown"


def _file(value: Any) -> str:
    return "" if isinstance(value, str) and is_file_name(value) else "the name of a log file"


def _fields(value: Any) -> str:
    fits = isinstance(value, dict) and all(not _word(k) and not _text(v) for k, v in value.items())
    return "" if fits else "an object of texts"


def _seqs(value: Any) -> str:
    fits = isinstance(value, list) and not any(_number(one) for one in value)
    return "" if fits else "a list of record numbers"


def _orders(value: Any) -> str:
    fits = isinstance(value, dict) and all(
        not _log_id(nonce) and not _time(expiry) for nonce, expiry in value.items()
    )
    return "" if fits else "an object of times by nonce"


def _names(value: Any) -> str:
    fits = isinstance(value, list) and not any(_text(one) for one in value)
    return "" if fits else "a list of texts"


_COMMON: Final[dict[str, _Check]] = {
    "seq": _number,
    "time": _time,
    "mono": _whole,
    "boot": _boot,
    "kind": _text,
    "prev": _hash,
}
_REQUEST: Final[dict[str, _Check]] = {
    "client": _text,
    "cert": _text,
    "peer": _text,
    "method": _text,
    "request": _text,
    "key": _text,
    "generation": _whole,
    "fingerprint": _text,
    "hash": _text,
    "digest": _text,
    "policy": _text,
}
BODIES: Final[dict[Kind, dict[str, _Check]]] = {
    Kind.START: {"log": _log_id},
    Kind.INTENT: _REQUEST,
    Kind.OUTCOME: {
        "intent": _number,
        "result": _result,
        "reason": _text,
        "latency": _whole,
        "made_generation": _whole,
        "made_fingerprint": _text,
    },
    Kind.REFUSAL: {**_REQUEST, "reason": _text, "class": _whole, "count": _number},
    Kind.NOTE: {"event": _word, "fields": _fields},
    Kind.ORDER: {
        "nonce": _log_id,
        "action": _word,
        "target": _text,
        "expires": _time,
        "operators": _names,
        "comment": _text,
        "head": _hash,
        "at": _whole,
        "accepted": _whole,
        "reason": _text,
    },
    Kind.CHECKPOINT: {
        "log": _log_id,
        "at": _number,
        "head": _hash,
        "taken": _time,
        "clock": _text,
        "key": _hash,
        "signature": _hex,
    },
    Kind.ROTATION: {"log": _log_id, "file": _file, "open": _seqs, "orders": _orders},
    Kind.RECOVERY: {"event": _word, "bytes": _number, "digest": _hash, "content": _hex},
    Kind.SEAL: {
        "log": _log_id,
        "file": _file,
        "digest": _hash,
        "good": _whole,
        "fault": _text,
        "operators": _names,
        "comment": _text,
        "open": _seqs,
        "orders": _orders,
    },
}
