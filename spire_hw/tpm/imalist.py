"""Read the kernel's list of measured files, entry by entry, in either of its two forms.

Every entry is checked against its template hash. Whether the kernel measured it at all is for
`ima` to find out.

Spec: Linux kernel, security/integrity/ima (ima_fs.c, ima_template_lib.c).
"""

from __future__ import annotations

import hashlib
import struct
from binascii import hexlify, unhexlify
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from spire_hw.errors import AttestationError, Finding, InvalidInputError, LimitError
from spire_hw.posture.evidence import ImaEntry
from spire_hw.tpm import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PCR: Final = 10
MAX_BYTES: Final = 8 * 1024 * 1024
PART_BYTES: Final = 1024 * 1024
MAX_ENTRIES: Final = 100_000
MAX_LINE: Final = 8192

_NAME_BYTES: Final = 256
_SHA1_BYTES: Final = 20


class _Algorithm(NamedTuple):
    """A hash the kernel can measure files with.

    Attributes:
        name: as the kernel writes it.
        size: bytes of a digest.
        head: what a template puts before a digest: the length of both, and the name.
    """

    name: str
    size: int
    head: bytes


_SIZES: Final = {
    "md5": 16,
    "sha1": 20,
    "rmd160": 20,
    "sha224": 28,
    "sha256": 32,
    "sha384": 48,
    "sha512": 64,
    "wp256": 32,
    "wp384": 48,
    "wp512": 64,
    "sm3": 32,
    "sm3-256": 32,
    "streebog256": 32,
    "streebog512": 64,
    "sha3-256": 32,
    "sha3-384": 48,
    "sha3-512": 64,
}
_ALGORITHMS: Final = {
    name.encode(): _Algorithm(
        name, size, struct.pack("<I", len(name) + 2 + size) + name.encode() + b":\x00"
    )
    for name, size in _SIZES.items()
}
# Templates: number of columns, and the name.
_TEMPLATES: Final = {
    b"ima-ng": (5, "ima-ng"),
    b"ima-sig": (6, "ima-sig"),
    b"ima-buf": (6, "ima-buf"),
    b"ima": (5, "ima"),
}
_WITH_TAIL: Final = 6
# The latter takes half the time of ImaEntry().
_join, _make = b"".join, tuple.__new__
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
    violation = _make(Record, (b"\xff" * size, b"\xff" * _SHA1_BYTES, None))
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
    fields = line.split(b" ")
    columns, kind = _TEMPLATES[fields[2]]
    tail = fields.pop() if columns == _WITH_TAIL else b""
    pcr, column, _, named, path = fields
    if pcr != b"10" or not path:
        raise ValueError("another PCR, or no name")
    if kind == "ima":
        return (*_old_entry(_unhex(named), path), column)
    name, _, text = named.partition(b":")
    algorithm, size, head = _ALGORITHMS[name]
    digest = unhexlify(text)
    if len(digest) != size or hexlify(digest) != text:  # the latter: upper case
        raise ValueError("wrong digest")
    body = _join((head, digest, (len(path) + 1).to_bytes(4, "little"), path, b"\x00"))
    if columns != _WITH_TAIL:
        return _make(ImaEntry, (path, algorithm, digest, kind, b"")), body, column
    extra = _unhex(tail)
    body += len(extra).to_bytes(4, "little") + extra
    signature = extra if kind == "ima-sig" else b""
    return _make(ImaEntry, (path, algorithm, digest, kind, signature)), body, column


def _unhex(text: bytes) -> bytes:
    data = unhexlify(text)
    if hexlify(data) != text:
        raise ValueError("not lower-case hex")
    return data


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
        hash_ = _unhex(column)
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
    kind = _TEMPLATES[data[at - length : at]][1]
    if kind == "ima":
        entry, body, at = _old_record(data, at)
    else:
        (size,) = _U32.unpack_from(data, at)
        if size > MAX_LINE:
            raise LimitError(f"ima: line longer than {MAX_LINE} bytes")
        at += 4 + size
        body = data[at - size : at]
        entry = _fields(body, kind)
    if pcr != PCR or at > len(data):
        raise ValueError("another PCR, or cut")
    if not entry.path.isascii():
        entry.path.decode("utf-8")
    return entry, body, column, at


def _old_record(data: bytes, at: int) -> tuple[ImaEntry, bytes, int]:
    """Read the data of the `ima` template, which alone has no length in front."""
    (length,) = _U32.unpack_from(data, at + _SHA1_BYTES)
    digest = data[at : at + _SHA1_BYTES]
    at += _SHA1_BYTES + 4
    return (*_old_entry(digest, data[at : at + length]), at + length)


def _old_entry(digest: bytes, path: bytes) -> tuple[ImaEntry, bytes]:
    if len(digest) != _SHA1_BYTES or not 0 < len(path) < _NAME_BYTES or b"\x00" in path:
        raise ValueError("not an entry of the old template")
    return ImaEntry(path, "sha1", digest, "ima"), digest + path.ljust(_NAME_BYTES, b"\x00")


def _fields(body: bytes, kind: str) -> ImaEntry:
    """Read the fields of a template; they are hashed as they stand."""
    (size,) = _U32.unpack_from(body)
    at = 4 + size
    name, mark, digest = body[4:at].partition(b":\x00")
    algorithm = _ALGORITHMS[name]
    (size,) = _U32.unpack_from(body, at)
    at += 4 + size
    path = body[at - size : at]
    # One zero byte, at its end.
    if not mark or len(digest) != algorithm.size or size < 2 or path.find(b"\x00") != size - 1:  # noqa: PLR2004
        raise ValueError("wrong digest or name")
    signature = b""
    if kind != "ima-ng":
        (size,) = _U32.unpack_from(body, at)
        at += 4 + size
        if kind == "ima-sig":
            signature = body[at - size : at]
    if at != len(body):
        raise ValueError("bytes are left or missing")
    return ImaEntry(path[:-1], algorithm.name, digest, kind, signature)


def _malformed(number: int) -> InvalidInputError:
    return InvalidInputError(f"ima: line {number} is malformed")


def _mismatch(number: int) -> AttestationError:
    return AttestationError([Finding("ima_hash", f"ima: line {number} does not match its hash")])
