"""Frames of HTTP/2 (pure).

Source: RFC 9113 sections 4, 6 and 7.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

HEAD: Final = struct.Struct(">IBI")
_U32: Final = struct.Struct(">I")
_SETTING: Final = struct.Struct(">HI")
_TWO: Final = struct.Struct(">II")

HEAD_BYTES: Final = 9
MAX_FRAME_BYTES: Final = 16 * 1024
MAX_WINDOW: Final = 2**31 - 1
DEFAULT_WINDOW: Final = 65_535
ID_MASK: Final = 0x7FFF_FFFF
PING_BYTES: Final = 8
SETTING_BYTES: Final = 6

# Kinds.
DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9

# Flags.
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
WITH_PRIORITY: Final = 0x20

# Settings.
HEADER_TABLE_SIZE: Final = 0x1
ENABLE_PUSH: Final = 0x2
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6


class Code(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


_CODES: Final[dict[int, Code]] = {code.value: code for code in Code}


def code_of(number: int) -> Code:
    """Return what a number says; one we do not know counts as INTERNAL_ERROR."""
    return _CODES.get(number, Code.INTERNAL_ERROR)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one frame; the payload is no longer than the peer takes."""
    return HEAD.pack(len(payload) << 8 | kind, flags, stream) + payload


def headers(stream: int, block: bytes, *, end: bool, limit: int = MAX_FRAME_BYTES) -> bytes:
    """Return the frames of a header block, cut to the peer's frame size.

    Args:
        stream: its number.
        block: encoded fields.
        end: whether nothing follows on the stream.
        limit: bytes of payload the peer takes.
    """
    flags = END_STREAM if end else 0
    if len(block) <= limit:
        return frame(HEADERS, flags | END_HEADERS, stream, block)
    pieces = [block[at : at + limit] for at in range(0, len(block), limit)]
    frames = [frame(HEADERS, flags, stream, pieces[0])]
    frames += [frame(CONTINUATION, 0, stream, piece) for piece in pieces[1:-1]]
    frames.append(frame(CONTINUATION, END_HEADERS, stream, pieces[-1]))
    return b"".join(frames)


def settings(values: dict[int, int]) -> bytes:
    """Return a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(k, v) for k, v in values.items()))


def take_settings(payload: bytes) -> list[tuple[int, int]]:
    """Return the settings in a payload whose length is a multiple of six."""
    return list(_SETTING.iter_unpack(payload))


def window_update(stream: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE frame."""
    return frame(WINDOW_UPDATE, 0, stream, _U32.pack(increment))


def rst_stream(stream: int, code: Code) -> bytes:
    """Return a RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream, _U32.pack(code))


def goaway(last: int, code: Code, why: str = "") -> bytes:
    """Return a GOAWAY frame; `why` is for the peer's log."""
    return frame(GOAWAY, 0, 0, _TWO.pack(last, code) + why.encode("ascii", "replace")[:256])


def u32(payload: bytes, at: int = 0) -> int:
    """Return four bytes as a number."""
    number: int = _U32.unpack_from(payload, at)[0]
    return number
