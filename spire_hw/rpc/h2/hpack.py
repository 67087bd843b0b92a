"""Header blocks (pure).

What we send refers to the static table alone, so blocks do not depend on what went before and
may be prepared. What we receive may use the dynamic table. A block that leaves that table alone is
remembered whole: clients send the same one with every call.

Source: RFC 7541; limits of RFC 9113 sections 6.5.2 and 10.5.1; names and values of 8.2.
"""

from __future__ import annotations

import re
from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from spire_hw.errors import InvalidInputError, LimitError
from spire_hw.rpc.h2 import huffman

if TYPE_CHECKING:
    from collections.abc import Iterable

# One field: name and value.
Field = tuple[str, str]

TABLE_BYTES: Final = 4096
MAX_BLOCK_BYTES: Final = 32 * 1024
MAX_FIELDS: Final = 128
ENTRY_OVERHEAD: Final = 32
# What a stranger can make us remember stays below 32 KiB a connection.
_REMEMBERED_BLOCKS: Final = 8
_MAX_REMEMBERED_BYTES: Final = 512
_MAX_REMEMBERED_FIELDS: Final = 24
_MAX_INTEGER_BYTES: Final = 5
_HUFFMAN: Final = 0x80
_LENGTH: Final = 0x7F
_INDEXED: Final = 0x80
_LITERAL_INDEXED: Final = 0x40
_TABLE_SIZE: Final = 0x20
_FULL_INDEX: Final = 0x7F
_FULL_INDEXED: Final = 0x3F
_FULL_SIZE: Final = 0x1F
_FULL_LITERAL: Final = 0x0F
# A token in lower case; a pseudo-header has a colon in front.
_NAME: Final = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE: Final = re.compile(rb"[\t -~\x80-\xff]*")

STATIC: Final[tuple[Field, ...]] = (
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
)
_STATIC_FIELDS: Final = len(STATIC)
_FIELD_AT: Final = {field: number for number, field in enumerate(STATIC, 1)}
_NAME_AT: Final = {name: number for number, (name, _) in reversed(list(enumerate(STATIC, 1)))}


def encode(fields: Iterable[Field]) -> bytes:
    """Return the block of some fields; it neither reads nor changes a dynamic table.

    Names are in lower case and values printable; nothing is checked.
    """
    out = bytearray()
    for field in fields:
        whole = _FIELD_AT.get(field)
        if whole is not None:
            out += _integer(whole, _INDEXED, _FULL_INDEX)
            continue
        name, value = field
        known = _NAME_AT.get(name)
        out += _integer(known or 0, 0, _FULL_LITERAL)
        if known is None:
            out += _string(name)
        out += _string(value)
    return bytes(out)


def _string(text: str) -> bytes:
    raw = text.encode("latin-1")
    return _integer(len(raw), 0, _LENGTH) + raw


def _integer(value: int, flags: int, full: int) -> bytes:
    if value < full:
        return bytes((flags | value,))
    value -= full
    out = bytearray((flags | full,))
    while value > _LENGTH:
        out.append(value & _LENGTH | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Block(NamedTuple):
    """What a block says.

    Attributes:
        fields: in order.
        size: bytes of names and values, 32 more for each field.
        malformed: a name or a value holds what none may; the stream ends, the connection need not.
    """

    fields: tuple[Field, ...]
    size: int
    malformed: bool


class Decoder:
    """The receiving end of one direction of a connection; any error is the connection's end."""

    __slots__ = ("_limit", "_malformed", "_remembered", "_size", "_table")

    def __init__(self) -> None:
        self._table: deque[Field] | None = None  # latest first; most peers of ours need none
        self._size = 0
        self._limit = TABLE_BYTES
        self._malformed = False
        self._remembered: dict[bytes, Block] | None = None

    def decode(self, data: bytes) -> Block:
        """Return what a block says.

        Raises:
            LimitError: larger, or more fields, than any block we take.
            InvalidInputError: not a block.
        """
        if self._remembered is not None:
            found = self._remembered.get(data)
            if found is not None:
                return found
        if len(data) > MAX_BLOCK_BYTES:
            raise LimitError(f"a header block is larger than {MAX_BLOCK_BYTES} bytes")
        block, lasting = self._decode(data)
        if (
            lasting
            and len(data) <= _MAX_REMEMBERED_BYTES
            and len(block.fields) <= _MAX_REMEMBERED_FIELDS
        ):
            if self._remembered is None or len(self._remembered) >= _REMEMBERED_BLOCKS:
                self._remembered = {}
            self._remembered[data] = block
        return block

    def _decode(self, data: bytes) -> tuple[Block, bool]:
        """Return the block, and whether it will mean the same for ever."""
        fields: list[Field] = []
        at, end = 0, len(data)
        lasting = True
        self._malformed = False
        try:
            while at < end:
                first = data[at]
                if _INDEXED < first <= _INDEXED | _STATIC_FIELDS:  # one byte says it all
                    field = STATIC[first - _INDEXED - 1]
                    at += 1
                elif first & _INDEXED:
                    number, at = _take_integer(data, at, _FULL_INDEX)
                    field = self._at(number)
                    lasting = lasting and number <= _STATIC_FIELDS
                elif first & _LITERAL_INDEXED:
                    number, at = _take_integer(data, at, _FULL_INDEXED)
                    field, at = self._literal(data, at, number)
                    if self._malformed:  # a later block could bring it back unseen
                        raise InvalidInputError("a header field is malformed")
                    self._add(field)
                    lasting = False
                elif first & _TABLE_SIZE:
                    limit, at = _take_integer(data, at, _FULL_SIZE)
                    if fields or limit > TABLE_BYTES:
                        raise InvalidInputError("a header table size is out of place")
                    self._limit = limit
                    self._evict()
                    lasting = False
                    continue
                else:
                    number, at = _take_integer(data, at, _FULL_LITERAL)
                    field, at = self._literal(data, at, number)
                    lasting = lasting and number <= _STATIC_FIELDS
                fields.append(field)
                if len(fields) > MAX_FIELDS:
                    raise LimitError(f"a header block has more than {MAX_FIELDS} fields")
        except IndexError as e:
            raise InvalidInputError("a header block is cut short") from e
        size = sum([len(name) + len(value) for name, value in fields])
        size += len(fields) * ENTRY_OVERHEAD
        return Block(tuple(fields), size, self._malformed), lasting

    def _literal(self, data: bytes, at: int, number: int) -> tuple[Field, int]:
        if number:
            name = self._at(number)[0]
        else:
            raw, at = _take_string(data, at)
            self._malformed |= not _NAME.fullmatch(raw)
            name = raw.decode("latin-1")
        raw, at = _take_string(data, at)
        self._malformed |= not _VALUE.fullmatch(raw)
        return (name, raw.decode("latin-1")), at

    def _at(self, number: int) -> Field:
        if 0 < number <= _STATIC_FIELDS:
            return STATIC[number - 1]
        if number == 0 or self._table is None or number > _STATIC_FIELDS + len(self._table):
            raise InvalidInputError("a header index is out of range")
        return self._table[number - _STATIC_FIELDS - 1]

    def _add(self, field: Field) -> None:
        if self._table is None:
            self._table = deque()
        self._table.appendleft(field)
        self._size += len(field[0]) + len(field[1]) + ENTRY_OVERHEAD
        self._evict()

    def _evict(self) -> None:
        while self._table and self._size > self._limit:
            name, value = self._table.pop()
            self._size -= len(name) + len(value) + ENTRY_OVERHEAD


def _take_integer(data: bytes, at: int, full: int) -> tuple[int, int]:
    value = data[at] & full
    at += 1
    if value != full:
        return value, at
    for number in range(_MAX_INTEGER_BYTES):
        byte = data[at]
        at += 1
        value += (byte & _LENGTH) << (7 * number)
        if not byte & 0x80:
            return value, at
    raise InvalidInputError("an integer in a header block is too large")


def _take_string(data: bytes, at: int) -> tuple[bytes, int]:
    coded = data[at] & _HUFFMAN
    length, at = _take_integer(data, at, _LENGTH)
    end = at + length
    if end > len(data):
        raise InvalidInputError("a header block is cut short")
    raw = data[at:end]
    return (_unpack(raw) if coded else raw), end


@lru_cache(maxsize=512)
def _unpack_short(data: bytes) -> bytes:
    return huffman.decode(data)


def _unpack(data: bytes) -> bytes:
    """Undo the Huffman code; peers repeat themselves, so short strings are remembered."""
    return _unpack_short(data) if len(data) <= 64 else huffman.decode(data)  # noqa: PLR2004
