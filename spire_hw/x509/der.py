"""DER in two small halves: putting bytes together, and walking strictly through foreign bytes.

Only what certificates and requests need; everything else is left to `cryptography`.

Spec: ITU-T X.690 section 10.
"""

from __future__ import annotations

from typing import Final

from spire_hw.errors import EncodingError

INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
OBJECT_IDENTIFIER: Final = 0x06
UTF8_STRING: Final = 0x0C
PRINTABLE_STRING: Final = 0x13
SEQUENCE: Final = 0x30
SET: Final = 0x31

# SubjectPublicKeyInfo of a key on P-256, up to the uncompressed point.
P256_HEAD: Final = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
_P256_BYTES: Final = len(P256_HEAD) + 65

_LONG_FORM: Final = 0x80
_MAX_LENGTH_BYTES: Final = 4
_MIN_ARCS: Final = 2
_MAX_FIRST_ARC: Final = 2
_ARC_STEP: Final = 40
_MAX_ARC_BITS: Final = 128  # those below 2.25 are UUIDs


def _header(tag: int, size: int) -> bytes:
    if size < _LONG_FORM:
        return bytes((tag, size))
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes((tag, _LONG_FORM | len(length))) + length


# Every element of an ordinary certificate is below 2 KiB: its header is looked up, not computed.
_SEQUENCE_HEADERS: Final = tuple(_header(SEQUENCE, size) for size in range(2048))


def encode(tag: int, content: bytes) -> bytes:
    """Return one element: tag, length, content."""
    return _header(tag, len(content)) + content


def sequence(*parts: bytes) -> bytes:
    """Return a SEQUENCE of elements that are encoded already."""
    content = b"".join(parts)
    size = len(content)
    head = _SEQUENCE_HEADERS[size] if size < len(_SEQUENCE_HEADERS) else _header(SEQUENCE, size)
    return head + content


def integer(value: int) -> bytes:
    """Return an INTEGER, not negative."""
    return encode(INTEGER, value.to_bytes(value.bit_length() // 8 + 1))


def bit_string(content: bytes) -> bytes:
    """Return a BIT STRING of whole bytes."""
    return encode(BIT_STRING, b"\0" + content)


def oid(dotted: str) -> bytes:
    """Return an OBJECT IDENTIFIER.

    Raises:
        EncodingError: not a dotted OID.
    """
    arcs = [int(arc) if arc.isdecimal() and arc.isascii() else -1 for arc in dotted.split(".")]
    if len(arcs) < _MIN_ARCS or min(arcs) < 0 or arcs[0] > _MAX_FIRST_ARC:
        raise EncodingError("OID", "is not of the form 1.2.3")
    if arcs[0] < _MAX_FIRST_ARC and arcs[1] >= _ARC_STEP:
        raise EncodingError("OID", "second number is above 39")
    joined = (_ARC_STEP * arcs[0] + arcs[1], *arcs[2:])
    return encode(OBJECT_IDENTIFIER, b"".join(_base128(arc) for arc in joined))


def dotted(content: bytes) -> str:
    """Return the dotted form of an object identifier's content.

    Raises:
        EncodingError: it is empty, cut off, not in its shortest form, or has a number above 128 bits.
    """
    arcs: list[int] = []
    arc = 0
    fresh = True
    for byte in content:
        if fresh and byte == _LONG_FORM:
            raise EncodingError("object identifier", "is not in its shortest form")
        arc = arc << 7 | byte & 0x7F
        if arc >> _MAX_ARC_BITS:
            raise EncodingError("object identifier", "has a number above 128 bits")
        fresh = not byte & _LONG_FORM
        if fresh:
            arcs.append(arc)
            arc = 0
    if not arcs or not fresh:
        raise EncodingError("object identifier", "is cut off")
    first = min(arcs[0] // _ARC_STEP, _MAX_FIRST_ARC)
    return ".".join(map(str, (first, arcs[0] - first * _ARC_STEP, *arcs[1:])))


def _base128(arc: int) -> bytes:
    out = [arc & 0x7F]
    while arc := arc >> 7:
        out.append(_LONG_FORM | (arc & 0x7F))
    return bytes(reversed(out))


class Reader:
    """Walks through the elements of one level of DER.

    Every step checks tag and length; indefinite and non-minimal lengths are refused.

    Args:
        data: the bytes.
        what: what they are, for errors.
        start: where the level starts.
        end: where it ends, None for the end of data.
    """

    __slots__ = ("_at", "_data", "_end", "_what")

    def __init__(self, data: bytes, what: str, start: int = 0, end: int | None = None) -> None:
        self._data = data
        self._what = what
        self._at = start
        self._end = len(data) if end is None else end

    @property
    def at(self) -> int:
        """Return the offset of the next element."""
        return self._at

    def more(self) -> bool:
        """Tell whether there is another element on this level."""
        return self._at < self._end

    def next_tag(self) -> int:
        """Return the tag of the next element, -1 at the end."""
        return self._data[self._at] if self._at < self._end else -1

    def enter(self, tag: int) -> Reader:
        """Step over the next element and return a reader of its inside.

        Raises:
            EncodingError: another tag, or a length that does not fit.
        """
        start, end = self._step(tag)
        return Reader(self._data, self._what, start, end)

    def content(self, tag: int) -> bytes:
        """Step over the next element and return its content.

        Raises:
            EncodingError: another tag, or a length that does not fit.
        """
        start, end = self._step(tag)
        return self._data[start:end]

    def element(self, tag: int) -> bytes:
        """Step over the next element and return it whole.

        Raises:
            EncodingError: another tag, or a length that does not fit.
        """
        at = self._at
        _, end = self._step(tag)
        return self._data[at:end]

    def finish(self) -> None:
        """Refuse anything left on this level.

        Raises:
            EncodingError: there is something left.
        """
        if self._at != self._end:
            raise EncodingError(self._what, "has something after its end", self._at)

    def _step(self, tag: int) -> tuple[int, int]:
        start, stop = step(self._data, self._at, self._end, tag, self._what)
        self._at = stop
        return start, stop


def step(data: bytes, at: int, end: int, tag: int, what: str) -> tuple[int, int]:
    """Return where the content of the element at an offset starts and stops.

    Args:
        data: the bytes.
        at: where the element starts.
        end: where the level that holds it ends.
        tag: what it has to be.
        what: what data is, for errors.

    Raises:
        EncodingError: another tag, or a length that is not DER or does not fit.
    """
    if at + 2 > end or data[at] != tag:
        raise EncodingError(what, f"expected DER tag 0x{tag:02x}", at)
    length, start = data[at + 1], at + 2
    if length >= _LONG_FORM:
        count = length - _LONG_FORM
        if not 1 <= count <= _MAX_LENGTH_BYTES or start + count > end:
            raise EncodingError(what, "length is not DER", at)
        length = int.from_bytes(data[start : start + count])
        if length < _LONG_FORM or length.bit_length() <= 8 * (count - 1):
            raise EncodingError(what, "length is not minimal", at)
        start += count
    stop = start + length
    if stop > end:
        raise EncodingError(what, "is cut short", at)
    return start, stop


def split(data: bytes, what: str) -> list[bytes]:
    """Cut SEQUENCEs that follow each other apart.

    Raises:
        EncodingError: something else than sequences, or a length that does not fit.
    """
    reader = Reader(data, what)
    parts = []
    while reader.more():
        parts.append(reader.element(SEQUENCE))
    return parts


def public_key_bits(spki: bytes) -> bytes:
    """Return the BIT STRING content of a SubjectPublicKeyInfo, without the unused-bits byte.

    Raises:
        EncodingError: not a SubjectPublicKeyInfo.
    """
    if len(spki) == _P256_BYTES and spki.startswith(P256_HEAD):
        return spki[len(P256_HEAD) :]
    outer = Reader(spki, "public key")
    inner = outer.enter(SEQUENCE)
    outer.finish()
    inner.enter(SEQUENCE)
    bits = inner.content(BIT_STRING)
    inner.finish()
    if not bits or bits[0]:
        raise EncodingError("public key", "is not a whole number of bytes")
    return bits[1:]
