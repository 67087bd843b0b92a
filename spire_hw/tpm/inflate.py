"""Decompress what a node sent, within a bound.

zlib itself neither stops at a size nor minds what follows a stream or that its end is missing.
"""

from __future__ import annotations

import zlib

from spire_hw.errors import InvalidInputError, LimitError


def inflate(data: bytes, limit: int, what: str) -> bytes:
    """Return the content of one complete zlib stream.

    Args:
        data: the stream and nothing else.
        limit: bytes it may hold.
        what: stage for messages, such as `log`.

    Raises:
        LimitError: it holds more.
        InvalidInputError: not zlib, cut short, or bytes follow it.

    Spec: RFC 1950.
    """
    stream = zlib.decompressobj()
    try:
        # One byte more than allowed tells "exactly" from "too much".
        content = stream.decompress(data, limit + 1)
    except zlib.error as e:
        raise InvalidInputError(f"{what}: compressed data is malformed") from e
    if len(content) > limit:
        raise LimitError(f"{what}: larger than {limit} bytes")
    if not stream.eof or stream.unused_data:
        raise InvalidInputError(f"{what}: compressed data is malformed")
    return content
