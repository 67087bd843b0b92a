"""The IMA list of a node as the store keeps it: distinct entries, deflated."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from spire_hw.errors import EncodingError
from spire_hw.posture.document import decode_entries, encode_entries
from spire_hw_server.posture.deflated import deflate, inflate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw.posture.evidence import ImaEntry


def pack(entries: Iterable[ImaEntry]) -> bytes:
    """Return entries in order, each once: policy says the same to it however often it was used."""
    rows = encode_entries(dict.fromkeys(entries))
    return deflate(json.dumps(rows, separators=(",", ":")).encode())


def unpack(data: bytes) -> tuple[ImaEntry, ...]:
    """Return what `pack` was given.

    Raises:
        EncodingError: it is something else.
    """
    try:
        rows = json.loads(inflate(data))
    except ValueError as e:
        raise EncodingError("IMA list of a node", "cannot be read") from e
    if not isinstance(rows, list):
        raise EncodingError("IMA list of a node", "is no list")
    return decode_entries(rows)
