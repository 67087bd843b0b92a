"""Bounds the header blocks of an HTTP/2 connection that is otherwise only passed on (pure).

The inner server counts the bytes a header block unpacks to, yet makes a note of each field of one
that is too large. A block that goes on and on, or one of ten thousand one-byte references to a
field sent before, costs it a thousand times what it costs the sender. So blocks are measured, and
their fields counted, before they get there. Nothing is unpacked for that.

Spec: RFC 9113 sections 4.1, 4.3, 6.2 and 6.10; RFC 7541 sections 5 and 6.
"""

from __future__ import annotations

from typing import Final

from spire_hw.errors import InvalidInputError, LimitError

MAX_BLOCK_BYTES: Final = 32 * 1024
MAX_FIELDS: Final = 128

_FRAME_HEADER: Final = 9
_HEADERS: Final = 0x1
_PUSH_PROMISE: Final = 0x5
_CONTINUATION: Final = 0x9
_PADDED: Final = 0x8
_PRIORITY: Final = 0x20
_PRIORITY_BYTES: Final = 5
_MAX_INTEGER_BYTES: Final = 5
_REFERENCE: Final = 0x80
_LONG_REFERENCE: Final = 0xFF
_LENGTH: Final = 0x7F
_NOT_YET: Final = -1


class HeaderWatch:
    """Follows the frames of one direction of a connection."""

    __slots__ = ("_block", "_fields", "_head", "_inside", "_left", "_strip", "_tail")

    def __init__(self, preface_bytes: int = 0) -> None:
        """Begin before the first frame, with so many bytes before it."""
        self._left = preface_bytes  # of the payload at hand
        self._head = b""  # of a frame header, the part that has come
        self._inside = False  # the payload is part of a header block
        self._strip = 0  # bytes of it before the block
        self._block = 0  # bytes of the block so far
        self._fields = 0  # and its fields
        self._tail = bytearray()  # a field of which a part has come

    def check(self, data: bytes) -> None:
        """Look at the next bytes of the connection.

        Raises:
            LimitError: a header block is too large.
            InvalidInputError: a header frame no client or server of gRPC sends.
        """
        if self._head:
            data, self._head = self._head + data, b""
        at, size = 0, len(data)
        while True:
            step = min(self._left, size - at)
            if self._inside:
                self._take(data[at : at + step])
            at += step
            self._left -= step
            if size - at < _FRAME_HEADER:
                self._head = data[at:]
                return
            self._begin(data, at)
            at += _FRAME_HEADER

    def _begin(self, data: bytes, at: int) -> None:
        """Take a frame header."""
        kind, flags = data[at + 3], data[at + 4]
        self._left = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
        self._inside = kind in {_HEADERS, _CONTINUATION}
        if not self._inside:
            if kind == _PUSH_PROMISE:
                raise InvalidInputError("pushed streams are not accepted")
            return
        self._strip = 0
        if kind == _HEADERS:
            if flags & _PADDED:
                raise InvalidInputError("padded headers are not accepted")
            self._block = self._fields = 0
            self._tail.clear()
            self._strip = _PRIORITY_BYTES if flags & _PRIORITY else 0
        self._block += _FRAME_HEADER + self._left
        if self._block > MAX_BLOCK_BYTES:
            raise LimitError(f"a header block is larger than {MAX_BLOCK_BYTES} bytes")

    def _take(self, piece: bytes) -> None:
        """Count the fields that are complete with this piece of a block."""
        if self._strip:
            cut = min(self._strip, len(piece))
            self._strip -= cut
            piece = piece[cut:]
        if self._tail:
            self._tail += piece
            piece = bytes(self._tail)
        at, size, fields = 0, len(piece), self._fields
        while at < size:
            first = piece[at]
            if _REFERENCE <= first < _LONG_REFERENCE:  # a reference, by far the most frequent
                end = at + 1
            else:
                end = _field_end(piece, at)
                if end == _NOT_YET or end > size:
                    break
            at = end
            fields += 1
            if fields > MAX_FIELDS:
                raise LimitError(f"a header block has more than {MAX_FIELDS} fields")
        self._fields = fields
        self._tail[:] = piece[at:]


def _field_end(data: bytes, at: int) -> int:
    """Return where a field ends, which may be past the data, or `_NOT_YET`."""
    first = data[at]
    mask = 0x7F if first & 0x80 else 0x3F if first & 0x40 else 0x1F if first & 0x20 else 0x0F
    index = first & mask
    if index == mask:
        index, at = _integer(data, at, mask)
        if at == _NOT_YET:
            return at
    else:
        at += 1
    if mask in {0x7F, 0x1F}:
        return at
    if index == 0:
        at = _string_end(data, at)
        if at == _NOT_YET:
            return at
    return _string_end(data, at)


def _string_end(data: bytes, at: int) -> int:
    if at >= len(data):
        return _NOT_YET
    length = data[at] & _LENGTH
    if length != _LENGTH:
        return at + 1 + length
    length, at = _integer(data, at, _LENGTH)
    return at if at == _NOT_YET else at + length


def _integer(data: bytes, at: int, mask: int) -> tuple[int, int]:
    """Return an integer and where it ends; `_NOT_YET` when a part of it is missing."""
    value = data[at] & mask
    if value != mask:
        return value, at + 1
    for number in range(_MAX_INTEGER_BYTES):
        place = at + 1 + number
        if place >= len(data):
            return 0, _NOT_YET
        value += (data[place] & 0x7F) << (7 * number)
        if not data[place] & 0x80:
            return value, place + 1
    raise InvalidInputError("an integer in a header block is too large")
