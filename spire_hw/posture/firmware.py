"""Versions of firmware: of the TPM as 64 bits, of the machine as text; which is older?"""

from __future__ import annotations

import re
import struct
from itertools import zip_longest
from typing import Final

from spire_hw.errors import InvalidInputError

_PARTS: Final = struct.Struct(">4H")
_DOTTED: Final = re.compile(r"[0-9]{1,5}(?:\.[0-9]{1,5}){0,3}", re.ASCII)
_HEX: Final = re.compile(r"0x[0-9a-fA-F]{1,16}", re.ASCII)
_RUNS: Final = re.compile(r"[0-9]{1,32}|[^0-9]+", re.ASCII)
_MAX_PART: Final = 0xFFFF


def parse_tpm_version(text: str) -> int:
    """Return a TPM's firmware version: `7.85.4555.0`, or its 64 bits as `0x...`.

    Raises:
        InvalidInputError: neither.
    """
    if _HEX.fullmatch(text):
        return int(text, 16)
    parts = [int(part) for part in text.split(".")] if _DOTTED.fullmatch(text) else []
    if not parts or max(parts) > _MAX_PART:
        raise InvalidInputError("expected a TPM firmware version such as 7.85.4555.0 or 0x...")
    return int.from_bytes(_PARTS.pack(*parts, *[0] * (4 - len(parts))), "big")


def tpm_version_text(version: int) -> str:
    """Return a TPM's firmware version as four numbers."""
    return ".".join(map(str, _PARTS.unpack(version.to_bytes(8, "big"))))


def is_older(version: str, floor: str) -> bool:
    """Tell whether a machine's firmware is older than the least that is allowed.

    Numbers are compared as numbers; whatever stands between them has to be the same, else the
    two cannot be compared and the firmware counts as older.
    """
    pairs = zip_longest(_RUNS.findall(version), _RUNS.findall(floor))
    for ours, least in pairs:
        if ours == least:
            continue
        if ours is None or least is None:
            return ours is None
        if not (ours.isdecimal() and least.isdecimal()):
            return True
        if int(ours) != int(least):
            return int(ours) < int(least)
    return False
