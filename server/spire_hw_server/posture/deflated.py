"""Documents as the store keeps them."""

from __future__ import annotations

import zlib
from typing import Final

from spire_hw.errors import EncodingError
from spire_hw.posture.document import MAX_BYTES

_LEVEL: Final = 1


def deflate(data: bytes) -> bytes:
    """Return a document as it is stored."""
    return zlib.compress(data, _LEVEL)


def inflate(data: bytes) -> bytes:
    """Return a stored document.

    Raises:
        EncodingError: it is cut, damaged or too large.
    """
    try:
        reader = zlib.decompressobj()
        text = reader.decompress(data, MAX_BYTES)
    except zlib.error as e:
        raise EncodingError("stored document", "is damaged") from e
    if reader.unconsumed_tail or not reader.eof:
        raise EncodingError("stored document", "is cut or too large")
    return text
