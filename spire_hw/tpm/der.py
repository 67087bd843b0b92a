"""Walk DER: definite, minimal lengths and nothing left over; every fault is an EncodingError.

Only what certificates of TPM vendors need. The order of SET members is not looked at: genuine
endorsement certificates have it wrong.

Spec: ITU-T X.690.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, NamedTuple

from spire_hw.errors import EncodingError

BOOLEAN: Final = 0x01
INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
NULL: Final = 0x05
OID: Final = 0x06
UTC_TIME: Final = 0x17
GENERALIZED_TIME: Final = 0x18
SEQUENCE: Final = 0x30
SET: Final = 0x31

_LONG_FORM = 0x80
_HIGH_TAG = 0x1F
_MAX_LENGTH_BYTES = 3
_MAX_OID_BYTES = 64


class Value(NamedTuple):
    """One tag-length-value.

    Attributes:
        tag: the identifier byte.
        content: what is inside.
        raw: the whole, header included.
        what: name for messages.
        offset: where it began in its parent.
    """

    tag: int
    content: bytes
    raw: bytes
    what: str
    offset: int

    def fail(self, reason: str) -> EncodingError:
        """Return an error about this value."""
        return EncodingError(self.what, reason, self.offset)

    def expect(self, tag: int) -> Value:
        """Return self when it has this tag.

        Raises:
            EncodingError: it has another.
        """
        if self.tag != tag:
            raise self.fail(f"tag {self.tag:#04x} where {tag:#04x} is due")
        return self

    def members(self) -> list[Value]:
        """Return the values inside.

        Raises:
            EncodingError: the content is not a series of values.
        """
        data, what, offset, size = self.content, self.what, 0, len(self.content)
        found = []
        while offset < size:
            # The ordinary case of `read`, without its call: a certificate has fifty values.
            end = offset + 2
            if end <= size and data[offset] & _HIGH_TAG != _HIGH_TAG:
                end += data[offset + 1]
                if data[offset + 1] < _LONG_FORM and end <= size:
                    content, raw = data[offset + 2 : end], data[offset:end]
                    found.append(Value(data[offset], content, raw, what, offset))
                    offset = end
                    continue
            value = read(data, what, offset)
            found.append(value)
            offset += len(value.raw)
        return found


def read(data: bytes, what: str, offset: int = 0) -> Value:
    """Read one value; bytes after it are the caller's matter.

    Raises:
        EncodingError: not DER.
    """
    if len(data) - offset < 2:  # noqa: PLR2004 - tag and length
        raise EncodingError(what, "ends early", len(data))
    tag, length, start = data[offset], data[offset + 1], offset + 2
    if tag & _HIGH_TAG == _HIGH_TAG:
        raise EncodingError(what, "tag is not known", offset)
    if length >= _LONG_FORM:
        count = length - _LONG_FORM
        if not 1 <= count <= _MAX_LENGTH_BYTES:
            raise EncodingError(what, "length is not DER", offset)
        length = int.from_bytes(data[start : start + count], "big")
        start += count
        if length < _LONG_FORM or length >> 8 * (count - 1) == 0:
            raise EncodingError(what, "length is not DER", offset)
    end = start + length
    if end > len(data):
        raise EncodingError(what, "ends early", len(data))
    return Value(tag, data[start:end], data[offset:end], what, offset)


def read_all(data: bytes, what: str, tag: int) -> Value:
    """Read one value of a known tag that fills the input.

    Raises:
        EncodingError: not DER, another tag, or bytes are left over.
    """
    value = read(data, what).expect(tag)
    if len(value.raw) != len(data):
        raise EncodingError(what, f"{len(data) - len(value.raw)} extra bytes", len(value.raw))
    return value


def integer(value: Value) -> int:
    """Return an INTEGER, which may be negative.

    Raises:
        EncodingError: not an INTEGER in its shortest form.
    """
    content = value.content
    if len(content) > 1 and (content[0], content[1] >> 7) in {(0x00, 0), (0xFF, 1)}:
        value.expect(INTEGER)
        raise value.fail("integer is not DER")
    return any_integer(value)


def any_integer(value: Value) -> int:
    """Return an INTEGER that may have needless bytes in front, as serials of one manufacturer do.

    Raises:
        EncodingError: not an INTEGER, or empty.
    """
    content = value.expect(INTEGER).content
    if not content:
        raise value.fail("empty integer")
    return int.from_bytes(content, "big", signed=True)


def boolean(value: Value) -> bool:
    """Return a BOOLEAN.

    Raises:
        EncodingError: not one byte 00 or FF.
    """
    content = value.expect(BOOLEAN).content
    if content not in {b"\x00", b"\xff"}:
        raise value.fail("boolean is not DER")
    return content == b"\xff"


def bit_string(value: Value) -> bytes:
    """Return a BIT STRING of whole bytes.

    Raises:
        EncodingError: not one, or with spare bits.
    """
    content = value.expect(BIT_STRING).content
    if not content or content[0]:
        raise value.fail("bit string is not of whole bytes")
    return content[1:]


def named_bits(value: Value) -> int:
    """Return a named BIT STRING as a number; bit 0 of the standard is the lowest.

    Raises:
        EncodingError: not one, or its spare bits are set.
    """
    content = value.expect(BIT_STRING).content
    spare_limit, max_bytes = 8, 4
    if not 1 < len(content) <= max_bytes + 1 or content[0] >= spare_limit:
        raise value.fail("bit string is malformed")
    number = int.from_bytes(content[1:], "big")
    if number & ((1 << content[0]) - 1):
        raise value.fail("bit string is not DER")
    width = 8 * (len(content) - 1)
    return sum(1 << i for i in range(width) if number >> (width - 1 - i) & 1)


def oid(value: Value) -> str:
    """Return an OBJECT IDENTIFIER in dotted form.

    Raises:
        EncodingError: not one, or malformed.
    """
    text, fault = _dotted(value.expect(OID).content)
    if fault:
        raise value.fail(fault)
    return text


@lru_cache(maxsize=256)
def _dotted(content: bytes) -> tuple[str, str]:
    """Return the dotted form, or what is wrong; certificates use the same few over and over."""
    if not content or content[-1] & 0x80 or len(content) > _MAX_OID_BYTES:
        return "", "object identifier is malformed"
    arcs, number, fresh = [], 0, True
    for byte in content:
        if fresh and byte == 0x80:  # noqa: PLR2004 - a leading zero digit
            return "", "object identifier is not DER"
        number = number << 7 | byte & 0x7F
        fresh = not byte & 0x80
        if fresh:
            arcs.append(number)
            number = 0
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, [first, arcs[0] - 40 * first, *arcs[1:]])), ""


def time(value: Value) -> datetime:
    """Return a UTCTime or GeneralizedTime in the forms certificates may use.

    Raises:
        EncodingError: another type or form, or no such date.

    Spec: RFC 5280, 4.1.2.5.
    """
    text = value.content.decode("ascii", "replace")
    if value.tag == UTC_TIME and len(text) == len("YYMMDDHHMMSSZ"):
        century = "19" if text[:2] >= "50" else "20"
        text = century + text
    elif value.tag != GENERALIZED_TIME:
        raise value.fail("validity dates are malformed")
    digits = text.removesuffix("Z")
    if len(text) != len("YYYYMMDDHHMMSSZ") or len(digits) != len(text) - 1:
        raise value.fail("validity dates are malformed")
    if not (digits.isascii() and digits.isdigit()):
        raise value.fail("validity dates are malformed")
    parts = [int(digits[:4]), *(int(digits[i : i + 2]) for i in range(4, 14, 2))]
    try:
        return datetime(*parts[:3], *parts[3:], tzinfo=UTC)  # type: ignore[misc, arg-type]
    except ValueError as e:
        raise value.fail("validity dates are malformed") from e
