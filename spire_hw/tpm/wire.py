"""TPM 2.0 structures as bytes: strict readers for what a verifier is sent, writers for requests.

Every reader takes the whole input and refuses anything left over; sizes are bounded before they
are used. Nothing here judges a value: that is done in `public`, `verify` and `credential`.

Spec: TPM 2.0 Library, Part 2 "Structures".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from spire_hw.errors import EncodingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ALG_RSA: Final = 0x0001
ALG_SHA1: Final = 0x0004
ALG_AES: Final = 0x0006
ALG_KEYEDHASH: Final = 0x0008
ALG_SHA256: Final = 0x000B
ALG_SHA384: Final = 0x000C
ALG_SHA512: Final = 0x000D
ALG_NULL: Final = 0x0010
ALG_RSASSA: Final = 0x0014
ALG_RSAES: Final = 0x0015
ALG_RSAPSS: Final = 0x0016
ALG_OAEP: Final = 0x0017
ALG_ECDSA: Final = 0x0018
ALG_ECDAA: Final = 0x001A
ALG_ECC: Final = 0x0023
ALG_SYMCIPHER: Final = 0x0025
ALG_CFB: Final = 0x0043

CURVE_P256: Final = 0x0003
CURVE_P384: Final = 0x0004
CURVE_P521: Final = 0x0005

RH_OWNER: Final = 0x40000001
RH_NULL: Final = 0x40000007
RH_ENDORSEMENT: Final = 0x4000000B
RH_PLATFORM: Final = 0x4000000C

MAGIC: Final = 0xFF544347
ST_CERTIFY: Final = 0x8017
ST_QUOTE: Final = 0x8018
ST_TIME: Final = 0x8019
ST_CREATION: Final = 0x801A

# Hash algorithms by TPM number: name for hashlib and digest size.
HASHES: Final[dict[int, tuple[str, int]]] = {
    ALG_SHA1: ("sha1", 20),
    ALG_SHA256: ("sha256", 32),
    ALG_SHA384: ("sha384", 48),
    ALG_SHA512: ("sha512", 64),
}
BANKS: Final[dict[str, int]] = {name: number for number, (name, _) in HASHES.items()}
PCR_COUNT: Final = 24

_MAX_DATA = 64
_MAX_NAME = 66
_MAX_RSA = 512
_MAX_COORDINATE = 66
_MAX_SELECTIONS = 16
_HEAD: Final = struct.Struct(">IH")
_CLOCK: Final = struct.Struct(">QIIB")
_SIZE_BYTES: Final = 2


class Reader:
    """Walks big-endian bytes; every fault is an EncodingError that names its offset."""

    __slots__ = ("_data", "_size", "_what", "offset")

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._size = len(data)
        self._what = what
        self.offset = 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes.

        Raises:
            EncodingError: fewer are left.
        """
        start = self.offset
        end = start + count
        if end > self._size:
            raise EncodingError(self._what, "ends early", self._size)
        self.offset = end
        return self._data[start:end]

    def u8(self) -> int:
        """Return the next byte."""
        return self.take(1)[0]

    def u16(self) -> int:
        """Return the next 2 bytes as a number."""
        start = self.offset
        if start + 2 > self._size:
            raise EncodingError(self._what, "ends early", self._size)
        self.offset = start + 2
        return self._data[start] << 8 | self._data[start + 1]

    def u32(self) -> int:
        """Return the next 4 bytes as a number."""
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        """Return the next 8 bytes as a number."""
        return int.from_bytes(self.take(8), "big")

    def sized(self, limit: int) -> bytes:
        """Return the content of a TPM2B of at most `limit` bytes.

        Raises:
            EncodingError: larger, or fewer bytes are left than announced.
        """
        data, start = self._data, self.offset
        begin = start + _SIZE_BYTES
        if begin > self._size:
            raise EncodingError(self._what, "ends early", self._size)
        size = data[start] << 8 | data[start + 1]
        if size > limit:
            raise EncodingError(self._what, f"field of {size} bytes, limit {limit}", start)
        end = begin + size
        if end > self._size:
            raise EncodingError(self._what, "ends early", self._size)
        self.offset = end
        return data[begin:end]

    def numbers(self, form: struct.Struct) -> tuple[int, ...]:
        """Return several numbers that follow each other.

        Raises:
            EncodingError: fewer bytes are left.
        """
        return form.unpack(self.take(form.size))

    def fail(self, reason: str) -> EncodingError:
        """Return an error about the current place."""
        return EncodingError(self._what, reason, self.offset)

    def end(self) -> None:
        """Refuse bytes that are left.

        Raises:
            EncodingError: there are some.
        """
        left = self._size - self.offset
        if left:
            raise self.fail(f"{left} extra bytes")


def sized(data: bytes) -> bytes:
    """Return data as a TPM2B: 2-byte size in front."""
    return struct.pack(">H", len(data)) + data


@dataclass(frozen=True, slots=True)
class PcrSelection:
    """PCRs of one bank.

    Attributes:
        bank: hash name, such as `sha256`.
        pcrs: PCR numbers, ascending.
    """

    bank: str
    pcrs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClockInfo:
    """The counters every attestation carries.

    Attributes:
        clock_ms: powered-on milliseconds since the last clear.
        reset_count: restarts of the machine; scrambled for owner-hierarchy signers.
        restart_count: resumes since the last reset; scrambled likewise.
        safe: the clock was written to NV since it last could have gone back.
    """

    clock_ms: int
    reset_count: int
    restart_count: int
    safe: bool


@dataclass(frozen=True, slots=True)
class Attest:
    """The part of TPMS_ATTEST all types share, and its type-specific body unread.

    Attributes:
        magic: FF544347 when the TPM made it.
        type: one of the `ST_` numbers.
        qualified_signer: qualified name of the signing key.
        extra_data: the caller's qualifying data.
        clock: the counters.
        firmware_version: vendor's number; scrambled for owner-hierarchy signers.
        body: the rest.
    """

    magic: int
    type: int
    qualified_signer: bytes
    extra_data: bytes
    clock: ClockInfo
    firmware_version: int
    body: bytes


def parse_attest(raw: bytes, what: str = "attestation") -> Attest:
    """Read the head of a TPMS_ATTEST; `body` still has to be read by type.

    Raises:
        EncodingError: it ends early, a field is too large or the clock flag is not 0 or 1.
    """
    r = Reader(raw, what)
    magic, kind = r.numbers(_HEAD)
    signer, extra = r.sized(_MAX_NAME), r.sized(_MAX_DATA)
    clock = _read_clock(r)
    firmware = r.u64()
    return Attest(magic, kind, signer, extra, clock, firmware, raw[r.offset :])


def _read_clock(r: Reader) -> ClockInfo:
    clock, resets, restarts, safe = r.numbers(_CLOCK)
    if safe > 1:
        raise r.fail("clock flag is malformed")
    return ClockInfo(clock, resets, restarts, bool(safe))


@dataclass(frozen=True, slots=True)
class QuoteBody:
    """What a quote says: which PCRs, and the digest over their values."""

    selections: tuple[PcrSelection, ...]
    pcr_digest: bytes


@dataclass(frozen=True, slots=True)
class NamePairBody:
    """A certify body (name, qualified name) or a creation body (object name, creation hash)."""

    name: bytes
    second: bytes


def parse_quote_body(body: bytes, what: str = "quote") -> QuoteBody:
    """Read the body of a quote.

    Raises:
        EncodingError: malformed, or bytes are left over.
    """
    r = Reader(body, what)
    selections = _read_selections(r)
    digest = r.sized(_MAX_DATA)
    r.end()
    return QuoteBody(selections, digest)


def parse_name_pair(body: bytes, what: str) -> NamePairBody:
    """Read the body of a certify or creation statement.

    Raises:
        EncodingError: malformed, or bytes are left over.
    """
    r = Reader(body, what)
    pair = NamePairBody(r.sized(_MAX_NAME), r.sized(_MAX_NAME))
    r.end()
    return pair


@dataclass(frozen=True, slots=True)
class TimeBody:
    """What a time statement says: counters and firmware version as they are, never scrambled."""

    clock: ClockInfo
    firmware_version: int


def parse_time_body(body: bytes, what: str = "time") -> TimeBody:
    """Read the body of a time statement.

    Raises:
        EncodingError: malformed, or bytes are left over.
    """
    r = Reader(body, what)
    r.u64()  # milliseconds since the TPM was powered on
    time = TimeBody(_read_clock(r), r.u64())
    r.end()
    return time


def _read_selections(r: Reader) -> tuple[PcrSelection, ...]:
    count = r.u32()
    if count > _MAX_SELECTIONS:
        raise r.fail(f"PCR selection is malformed: {count} banks")
    return tuple(_read_selection(r) for _ in range(count))


def _read_selection(r: Reader) -> PcrSelection:
    algorithm, size = r.u16(), r.u8()
    if algorithm not in HASHES:
        raise r.fail(f"PCR selection is malformed: unknown bank {algorithm:#06x}")
    if not 1 <= size <= 4:  # noqa: PLR2004
        raise r.fail(f"PCR selection is malformed: bitmap of {size} bytes")
    bitmap = int.from_bytes(r.take(size), "little")
    if bitmap >> PCR_COUNT:
        raise r.fail("PCR selection is malformed: PCR above 23")
    return PcrSelection(HASHES[algorithm][0], _pcrs_of(bitmap))


@lru_cache(maxsize=64)
def _pcrs_of(bitmap: int) -> tuple[int, ...]:
    return tuple(n for n in range(PCR_COUNT) if bitmap >> n & 1)


def encode_selections(selections: Iterable[PcrSelection]) -> bytes:
    """Return a TPML_PCR_SELECTION with 3-byte bitmaps."""
    entries = list(selections)
    out = struct.pack(">I", len(entries))
    for entry in entries:
        bitmap = sum(1 << n for n in set(entry.pcrs))
        out += struct.pack(">HB", BANKS[entry.bank], 3) + bitmap.to_bytes(3, "little")
    return out


@dataclass(frozen=True, slots=True)
class Signature:
    """A TPMT_SIGNATURE.

    Attributes:
        scheme: `ALG_RSASSA`, `ALG_RSAPSS` or `ALG_ECDSA`.
        hash: TPM number of the hash.
        parts: one RSA signature, or r and s.
    """

    scheme: int
    hash: int
    parts: tuple[bytes, ...]


def parse_signature(raw: bytes, what: str = "signature") -> Signature:
    """Read a TPMT_SIGNATURE.

    Raises:
        EncodingError: another algorithm, malformed, or bytes are left over.
    """
    r = Reader(raw, what)
    scheme, hash_alg = r.u16(), r.u16()
    if scheme in {ALG_RSASSA, ALG_RSAPSS}:
        parts: tuple[bytes, ...] = (r.sized(_MAX_RSA),)
    elif scheme == ALG_ECDSA:
        parts = (r.sized(_MAX_COORDINATE), r.sized(_MAX_COORDINATE))
    else:
        raise r.fail(f"algorithm {scheme:#06x} is not a signature scheme accepted here")
    r.end()
    return Signature(scheme, hash_alg, parts)


@dataclass(frozen=True, slots=True)
class CreationData:
    """A TPMS_CREATION_DATA, as far as a verifier uses it.

    Attributes:
        parent_name: Name of the parent; the 4-byte handle of a hierarchy for primaries.
        parent_qualified_name: the same, qualified.
        outside_info: whatever the creator asked to be included.
    """

    selections: tuple[PcrSelection, ...]
    pcr_digest: bytes
    locality: int
    parent_name_alg: int
    parent_name: bytes
    parent_qualified_name: bytes
    outside_info: bytes


def parse_creation_data(raw: bytes, what: str = "creation data") -> CreationData:
    """Read a TPMS_CREATION_DATA.

    Raises:
        EncodingError: malformed, or bytes are left over.
    """
    r = Reader(raw, what)
    data = CreationData(
        selections=_read_selections(r),
        pcr_digest=r.sized(_MAX_DATA),
        locality=r.u8(),
        parent_name_alg=r.u16(),
        parent_name=r.sized(_MAX_NAME),
        parent_qualified_name=r.sized(_MAX_NAME),
        outside_info=r.sized(_MAX_DATA),
    )
    r.end()
    return data


def order_selection(selection: Sequence[PcrSelection]) -> list[tuple[str, int]]:
    """Return (bank, PCR) pairs in the order a quote's digest takes their values."""
    return [(entry.bank, n) for entry in selection for n in sorted(entry.pcrs)]
