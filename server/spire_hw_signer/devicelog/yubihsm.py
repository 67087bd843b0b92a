"""What `yubihsm-shell -a get-logs` prints, and the chain of digests in it.

The log holds 62 entries; an entry is 32 bytes, of which the last 16 are the beginning of
SHA-256(its first 16 bytes || digest of the entry before).

Sources: yubihsm-shell 2.7, `src/commands.c` (text), `lib/yubihsm.h` and `lib/yubihsm.c` (structure,
chain); Yubico, "YubiHSM 2 User Guide": Logging and Logs, GET LOG ENTRIES, SET LOG INDEX.

This module is pure: bytes in, a value or an EncodingError out.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from spire_hw.errors import EncodingError
from spire_hw_signer.devicelog.entries import Dump, Entry

CAPACITY: Final = 62
DIGEST_BYTES: Final = 16
WHAT: Final = "log of the YubiHSM"
_NUMBERS: Final = 1 << 16
_LAST_NUMBER: Final = _NUMBERS - 1
_MAX_ITEMS: Final = 64  # YH_MAX_LOG_ENTRIES
PACKED: Final = struct.Struct(">HBHHHHBI")
# Versions differ in whether these go to standard output or elsewhere.
_TALK: Final = re.compile(
    r"Using default connector URL: [!-~]{1,256}"
    r"|Session keepalive set up to run every [0-9]{1,9} seconds"
    r"|Created session [0-9]{1,9}",
    re.ASCII,
)
_BOOTS: Final = re.compile(r"([0-9]{1,5}) unlogged boots found", re.ASCII)
_AUTHENTICATIONS: Final = re.compile(r"([0-9]{1,5}) unlogged authentications found", re.ASCII)
_COUNT: Final = re.compile(
    r"(No) logs to extract|Found (1) item|Found ([0-9]{1,2}) items", re.ASCII
)
_ITEM: Final = re.compile(
    r"item: {1,5}([0-9]{1,5}) -- cmd: 0x([0-9a-f]{2}) -- length: {1,4}([0-9]{1,5})"
    r" -- session key: 0x([0-9a-f]{4}) -- target key: 0x([0-9a-f]{4})"
    r" -- second key: 0x([0-9a-f]{4}) -- result: 0x([0-9a-f]{2}) -- tick: ([0-9]{1,10})"
    r" -- hash: ([0-9a-f]{32})",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class YubiHsmEntry(Entry):
    """One entry.

    Attributes:
        packed: its first 16 bytes as the device has them.
    """

    packed: bytes

    @override
    def steps_from(self, number: int) -> int:
        # Nobody documents whether 0 or 1 follows the last number; the digest tells that it is next.
        if number == _LAST_NUMBER and self.number in {0, 1}:
            return 1
        steps = (self.number - number) % _NUMBERS
        return steps if steps < _NUMBERS // 2 else steps - _NUMBERS

    @override
    def is_linked(self, digest: bytes) -> bool:
        return chained(self.packed, digest) == self.digest


def chained(packed: bytes, before: bytes) -> bytes:
    """Return the digest of an entry.

    Args:
        packed: its first 16 bytes.
        before: digest of the entry before it.
    """
    return hashlib.sha256(packed + before).digest()[:DIGEST_BYTES]


def parse(output: bytes) -> Dump:
    """Read what the program printed.

    Raises:
        EncodingError: it is anything else.
    """
    try:
        lines = output.decode("ascii").split("\n")
    except UnicodeDecodeError as e:
        raise EncodingError(WHAT, "is not ASCII", e.start) from e
    if lines.pop():
        raise EncodingError(WHAT, "does not end with a line feed")
    while lines and _TALK.fullmatch(lines[0]):
        del lines[0]
    if len(lines) < 3:  # noqa: PLR2004 - two counters and the number of items
        raise EncodingError(WHAT, "has no counters; is it what `get-logs` prints?")
    boots = _counter(_BOOTS, lines[0])
    authentications = _counter(_AUTHENTICATIONS, lines[1])
    count = _items(lines[2])
    if len(lines) - 3 != count:
        raise EncodingError(WHAT, f"says {count} items and has {len(lines) - 3} lines of them")
    entries = tuple(_entry(line, number) for number, line in enumerate(lines[3:], start=1))
    return Dump(entries, {"boots": boots, "authentications": authentications})


def _counter(form: re.Pattern[str], line: str) -> int:
    found = form.fullmatch(line)
    if found is None or int(found[1]) > _LAST_NUMBER:
        raise EncodingError(WHAT, f"expected a line such as {_shown(form)!r}")
    return int(found[1])


def _shown(form: re.Pattern[str]) -> str:
    return "0" + form.pattern.partition(")")[2]


def _items(line: str) -> int:
    found = _COUNT.fullmatch(line)
    if found is None:
        raise EncodingError(WHAT, "expected a line such as 'Found 2 items'")
    count = 0 if found[1] else int(found[2] or found[3])
    if count > _MAX_ITEMS:
        raise EncodingError(WHAT, f"says {count} items, a device has {_MAX_ITEMS} at most")
    return count


def _entry(line: str, number: int) -> Entry:
    found = _ITEM.fullmatch(line)
    if found is None:
        raise EncodingError(WHAT, f"item {number} is not as `get-logs` prints it")
    item, length, tick = int(found[1]), int(found[3]), int(found[8])
    command, session, target, second, result = (int(found[n], 16) for n in (2, 4, 5, 6, 7))
    try:
        packed = PACKED.pack(item, command, length, session, target, second, result, tick)
    except struct.error as e:
        raise EncodingError(WHAT, f"item {number} has a number that is too large") from e
    text = (
        f"cmd=0x{command:02x} length={length} session=0x{session:04x} target=0x{target:04x}"
        f" second=0x{second:04x} result=0x{result:02x} tick={tick}"
    )
    return YubiHsmEntry(item, bytes.fromhex(found[9]), text, packed)
