"""Further rounds of one exchange: parts of the IMA list that the first answer had no room for.

The server names the entry it wants next, the node sends whole lines from there and says how many
entries are left. The list is a snapshot: it does not grow during an exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from spire_hw.errors import InvalidInputError
from spire_hw_plugins.nodeattestor import strictjson
from spire_hw_plugins.nodeattestor.tpm.wire import (
    DIALECT,
    MAX_CHALLENGE_BYTES,
    MAX_RESPONSE_BYTES,
    check_version,
)

# Hosts end an exchange after 16 challenges; the first one asks for the quotes.
MAX_ROUNDS: Final = 15


@dataclass(frozen=True, slots=True)
class ImaPart:
    """A part of a list.

    Attributes:
        data: zlib of whole lines.
        start: number of the first entry.
        left: how many entries follow.
    """

    data: bytes
    start: int
    left: int


def encode_part_request(start: int) -> bytes:
    """Return the challenge for the part that begins at an entry."""
    return strictjson.dump({"spire_hw": {"v": DIALECT, "want": ["ima"], "ima_from": start}})


def decode_part_request(data: bytes) -> int:
    """Return the entry a part is wanted from.

    Raises:
        LimitError: larger than 64 KiB.
        InvalidInputError: anything else that is wrong with it.
    """
    outer = strictjson.load(data, MAX_CHALLENGE_BYTES)
    if "EC" in outer:
        raise InvalidInputError("challenge: expected a request for more of the IMA list")
    ours = outer.child("spire_hw")
    check_version(ours)
    ours.closed("v", "want", "ima_from")
    if ours.texts("want") != ["ima"]:
        raise InvalidInputError("challenge: evidence asked for is not known")
    return ours.number("ima_from")


def encode_part(part: ImaPart) -> bytes:
    """Return the answer with a part."""
    ours = {"v": DIALECT, "ima": part.data, "ima_from": part.start, "ima_left": part.left}
    return strictjson.dump({"spire_hw": ours})


def decode_part(data: bytes) -> ImaPart:
    """Read an answer with a part.

    Raises:
        LimitError: larger than 1 MiB.
        InvalidInputError: anything else that is wrong with it.
    """
    if not data:
        raise InvalidInputError("envelope: expected a challenge response")
    ours = strictjson.load(data, MAX_RESPONSE_BYTES).child("spire_hw")
    check_version(ours)
    ours.closed("v", "ima", "ima_from", "ima_left")
    return ImaPart(ours.blob("ima"), ours.number("ima_from"), ours.number("ima_left"))
