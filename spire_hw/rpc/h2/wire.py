"""gRPC on top of HTTP/2: message frames, timeouts, status texts (pure).

Source: the gRPC over HTTP/2 protocol description.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes

from spire_hw.errors import ErrorKind, InvalidInputError, LimitError, SpireHwError

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFIX_BYTES: Final = 5
_PREFIX: Final = struct.Struct(">BI")
_TIMEOUT: Final = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNIT_S: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_MAX_TIMEOUT_DIGITS: Final = 10**8
_PRINTABLE: Final = frozenset(map(chr, range(0x20, 0x7F))) - {"%"}
_PLAIN: Final = re.compile(r"[ -$&-~]*")
CONTENT_TYPE: Final = "application/grpc"
_CONTENT_TYPE: Final = re.compile(r"application/grpc(?:[+;].*)?", re.IGNORECASE)


def is_content_type(value: str) -> bool:
    """Tell whether a content type is gRPC's."""
    return value == CONTENT_TYPE or _CONTENT_TYPE.fullmatch(value) is not None


def pack(message: bytes) -> bytes:
    """Return a message with its length before it."""
    return _PREFIX.pack(0, len(message)) + message


class Assembler:
    """Puts messages together from the pieces that arrive."""

    __slots__ = ("_buffer", "_limit")

    def __init__(self, limit: int) -> None:
        """Begin; a message may have up to `limit` bytes."""
        self._limit = limit
        self._buffer: bytearray | None = None

    @property
    def pending(self) -> int:
        """Return how many bytes of an incomplete message are held."""
        return 0 if self._buffer is None else len(self._buffer)

    def take(self, data: bytes) -> Sequence[bytes]:
        """Return the messages that are complete now.

        Raises:
            LimitError: a message is too large; told by its length, before it is here.
            SpireHwError: UNIMPLEMENTED, it is compressed.
        """
        if self._buffer is None:
            length = self._length(data)
            if length is None or length + PREFIX_BYTES > len(data):
                self._buffer = bytearray(data)
                return ()
            if length + PREFIX_BYTES == len(data):
                return (data[PREFIX_BYTES:],)
            buffer = bytearray(data)
        else:
            buffer = self._buffer
            buffer += data
        messages = []
        at = 0
        while (length := self._length(buffer, at)) is not None:
            end = at + PREFIX_BYTES + length
            if end > len(buffer):
                break
            messages.append(bytes(memoryview(buffer)[at + PREFIX_BYTES : end]))
            at = end
        if at:
            del buffer[:at]
        self._buffer = buffer or None
        return messages

    def _length(self, data: bytes | bytearray, at: int = 0) -> int | None:
        if len(data) - at < PREFIX_BYTES:
            return None
        compressed, length = _PREFIX.unpack_from(data, at)
        if compressed:
            raise SpireHwError("compressed messages are not taken", kind=ErrorKind.UNIMPLEMENTED)
        if length > self._limit:
            raise LimitError(f"a message of {length} bytes is larger than {self._limit}")
        return int(length)


def encode_timeout(seconds: float) -> str:
    """Return a `grpc-timeout` of at most eight digits, rounded up."""
    for unit, per_second in (("m", 1_000), ("S", 1)):
        value = -int(-max(seconds, 0.0) * per_second // 1)
        if value < _MAX_TIMEOUT_DIGITS:
            return f"{value}{unit}"
    return f"{_MAX_TIMEOUT_DIGITS - 1}S"


def parse_timeout(text: str) -> float:
    """Return the seconds of a `grpc-timeout`.

    Raises:
        InvalidInputError: not one.
    """
    found = _TIMEOUT.fullmatch(text)
    if found is None:
        raise InvalidInputError("grpc-timeout is malformed")
    return int(found[1]) * _UNIT_S[found[2]]


def encode_message(text: str) -> str:
    """Return a `grpc-message`: UTF-8, everything but printable ASCII as %XX, and `%` itself."""
    if _PLAIN.fullmatch(text):
        return text
    raw = text.encode("utf-8", "replace")
    return "".join(chr(byte) if chr(byte) in _PRINTABLE else f"%{byte:02X}" for byte in raw)


def parse_message(text: str) -> str:
    """Return the text of a `grpc-message`; what is malformed in it stands as it is."""
    if "%" not in text:
        return text
    return unquote_to_bytes(text).decode("utf-8", "replace")


def encode_binary(value: bytes) -> str:
    """Return the text of a `-bin` header."""
    return base64.b64encode(value).rstrip(b"=").decode("ascii")


def parse_binary(text: str) -> bytes | None:
    """Return the value of a `-bin` header, padded or not; None when it is malformed."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
