"""Read the kernel's list of measured files, entry by entry, in either of its two forms.

Every entry is checked against its template hash. Whether the kernel measured it at all is for
`ima` to find out.

Spec: Linux kernel, security/integrity/ima (ima_fs.c, ima_template_lib.c).
"""

from __future__ import annotations

import hashlib
import struct
from binascii import hexlify
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from spire_hw.errors import AttestationError, Finding, InvalidInputError, LimitError
from spire_hw.tpm import wire
from spire_hw.tpm.imatemplate import (
    OLD,
    SHA1_BYTES,
    TEMPLATES,
    custom_template,
    from_hex,
    old_entry,
    read_columns,
    read_data,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from spire_hw.posture.evidence import ImaEntry

PCR: Final = 10
MAX_BYTES: Final = 8 * 1024 * 1024
PART_BYTES: Final = 768 * 1024
MAX_ENTRIES: Final = 100_000
MAX_LINE: Final = 8192

# Takes half the time of Record().
_make = tuple.__new__
_COLUMN_BANKS: Final = {size: name for name, size in wire.HASHES.values()}
_RECORD: Final = struct.Struct("<I20sI")
_U32: Final = struct.Struct("<I")


class _Digest(Protocol):
    def digest(self) -> bytes: ...


class Record(NamedTuple):
    """One extension of PCR 10.

    Attributes:
        digest: what the PCR was extended with; all ones for a violation.
        sha1: SHA-1 of the same template data, which kernels before 5.8 extend with zeros behind.
        entry: what was measured; None for a violation.
    """

    digest: bytes
    sha1: bytes
    entry: ImaEntry | None


def read(data: bytes, before: int, bank: str) -> Iterator[Record]:
    """Read a list, or a part of it.

    Args:
        data: `ascii_runtime_measurements` (or its siblings per bank), or
            `binary_runtime_measurements` (little-endian); whole entries, at most `PART_BYTES`.
        before: number of entries in front of it, for messages.
        bank: hash of PCR 10.

    Raises:
        AttestationError: `ima_hash`: an entry does not match its template hash.
        InvalidInputError: an entry is malformed.
        LimitError: more than `PART_BYTES` or `MAX_ENTRIES`, or an entry over `MAX_LINE`.
    """
    if len(data) > PART_BYTES:
        raise LimitError(f"ima: part larger than {PART_BYTES} bytes")
    new: Callable[[bytes], _Digest] = getattr(hashlib, bank)
    size = wire.HASHES[wire.BANKS[bank]][1]
    violation = _make(Record, (b"\xff" * size, b"\xff" * SHA1_BYTES, None))
    if data[:1] == bytes((PCR,)):
        return _read_binary(data, before, new, violation)
    return _read_ascii(data, before, new, violation)


def _read_ascii(
    data: bytes, before: int, new: Callable[[bytes], _Digest], violation: Record
) -> Iterator[Record]:
    sha1 = hashlib.sha1
    for number, line in enumerate(_lines(data, before), before + 1):
        try:
            entry, body, column = _read_line(line)
        except (LookupError, ValueError) as e:
            raise _malformed(number) from e
        hash_ = sha1(body).digest()
        if hexlify(hash_) != column and _is_violation(column, body, number):
            yield violation
        else:
            yield _make(Record, (new(body).digest(), hash_, entry))


def _read_line(line: bytes) -> tuple[ImaEntry, bytes, bytes]:
    """Return what a line says, the template data and the template hash as hex.

    Raises:
        ValueError: malformed; a LookupError says the same.
    """
    pcr, column, name, *columns = line.split(b" ")
    if pcr != b"10":
        raise ValueError("another PCR")
    entry, body = read_columns(TEMPLATES.get(name) or custom_template(name), columns)
    return entry, body, column


def _lines(data: bytes, before: int) -> list[bytes]:
    """Return the lines after what can be said about all of them at once."""
    count = data.count(b"\n")
    if count > MAX_ENTRIES:
        raise LimitError(f"ima: more than {MAX_ENTRIES} entries")
    at = 0
    while len(data) - at > MAX_LINE:
        end = data.rfind(b"\n", at, at + MAX_LINE + 1)
        if end < 0:
            raise LimitError(f"ima: line longer than {MAX_LINE} bytes")
        at = end + 1
    _check_text(data, before + 1)
    zero = data.find(b"\x00")
    if zero >= 0:
        raise _malformed(before + 1 + data.count(b"\n", 0, zero))
    lines = data.split(b"\n")
    if lines.pop():
        raise _malformed(before + count + 1)
    return lines


def _check_text(data: bytes, number: int) -> None:
    if data.isascii():
        return
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise _malformed(number + data.count(b"\n", 0, e.start)) from e


def _is_violation(column: bytes, body: bytes, number: int) -> bool:
    """Judge a template hash that is not the SHA-1 of its data: a violation, or another bank's."""
    try:
        hash_ = from_hex(column)
        bank = _COLUMN_BANKS[len(hash_)]
    except (LookupError, ValueError) as e:
        raise _malformed(number) from e
    if any(hash_) and hashlib.new(bank, body).digest() != hash_:
        raise _mismatch(number)
    return not any(hash_)


def _read_binary(
    data: bytes, before: int, new: Callable[[bytes], _Digest], violation: Record
) -> Iterator[Record]:
    total, at, number = len(data), 0, before
    sha1 = hashlib.sha1
    while at < total:
        number += 1
        if number - before > MAX_ENTRIES:
            raise LimitError(f"ima: more than {MAX_ENTRIES} entries")
        try:
            entry, body, column, at = _read_record(data, at)
        except (struct.error, LookupError, ValueError) as e:
            raise _malformed(number) from e
        hash_ = sha1(body).digest()
        if hash_ == column:
            yield _make(Record, (new(body).digest(), hash_, entry))
        elif any(column):
            raise _mismatch(number)
        else:
            yield violation


def _read_record(data: bytes, at: int) -> tuple[ImaEntry, bytes, bytes, int]:
    """Return what a record says, the template data, the template hash and where the record ends.

    Raises:
        ValueError: malformed; a struct.error or LookupError says the same.
        LimitError: too large.
    """
    pcr, column, length = _RECORD.unpack_from(data, at)
    at += _RECORD.size + length
    name = data[at - length : at]
    template = TEMPLATES.get(name) or custom_template(name)
    if template is OLD:
        entry, body, at = _old_record(data, at)
    else:
        (size,) = _U32.unpack_from(data, at)
        if size > MAX_LINE:
            raise LimitError(f"ima: line longer than {MAX_LINE} bytes")
        at += 4 + size
        body = data[at - size : at]
        entry = read_data(template, body)
    if pcr != PCR or at > len(data):
        raise ValueError("another PCR, or cut")
    if not entry.path.isascii():
        entry.path.decode("utf-8")
    return entry, body, column, at


def _old_record(data: bytes, at: int) -> tuple[ImaEntry, bytes, int]:
    """Read the data of the `ima` template, which alone has no length in front."""
    (length,) = _U32.unpack_from(data, at + SHA1_BYTES)
    digest = data[at : at + SHA1_BYTES]
    at += SHA1_BYTES + 4
    return (*old_entry(digest, data[at : at + length]), at + length)


def _malformed(number: int) -> InvalidInputError:
    return InvalidInputError(f"ima: line {number} is malformed")


def _mismatch(number: int) -> AttestationError:
    return AttestationError([Finding("ima_hash", f"ima: line {number} does not match its hash")])
