r"""Logs of other devices: a program prints one JSON object a line.

    {"number": 17, "text": "sign key 4 ok", "digest": "5f…", "previous": "2e…"}
    {"unlogged": 0}

`number` counts up by one. `digest` is the device's own, where it has one; with `previous` an entry
names the digest of the one before it. `unlogged` counts events the device had no room for.

This module is pure: bytes in, a value or an EncodingError out.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from typing_extensions import override

from spire_hw.errors import EncodingError
from spire_hw_signer.devicelog.entries import MAX_DIGEST_BYTES, MAX_TEXT, Dump, Entry

WHAT: Final = "log of the device"
MAX_LINE_BYTES: Final = 4096
_OWN_DIGEST_BYTES: Final = 16
_MAX_NUMBER: Final = 2**63 - 1
_ENTRY: Final = frozenset({"number", "text", "digest", "previous"})
_DIGEST: Final = re.compile(rf"(?:[0-9a-f]{{2}}){{1,{MAX_DIGEST_BYTES}}}", re.ASCII)


@dataclass(frozen=True, slots=True)
class JsonEntry(Entry):
    """One entry.

    Attributes:
        previous: digest of the one before it, None when it does not say.
    """

    previous: bytes | None

    @override
    def steps_from(self, number: int) -> int:
        return self.number - number

    @override
    def is_linked(self, digest: bytes) -> bool:
        return self.previous is None or self.previous == digest


def parse(output: bytes) -> Dump:
    """Read what the program printed.

    Raises:
        EncodingError: it is anything else.
    """
    lines = output.split(b"\n")
    if lines.pop():
        raise EncodingError(WHAT, "does not end with a line feed")
    entries: list[Entry] = []
    unlogged: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        found = _object(line, number)
        if set(found) == {"unlogged"} and not unlogged:
            unlogged["events"] = _number(found["unlogged"], "unlogged", number)
        else:
            entries.append(_entry(found, number))
    return Dump(tuple(entries), unlogged)


def _object(line: bytes, number: int) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        _refuse(number, f"is longer than {MAX_LINE_BYTES} bytes")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            _refuse(number, "has a member twice")
        return made

    try:
        found = json.loads(line.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise EncodingError(WHAT, f"line {number} is not JSON") from e
    if not isinstance(found, dict):
        _refuse(number, "is not an object")
    return found


def _entry(found: dict[str, Any], number: int) -> Entry:
    if not {"number", "text"} <= set(found) <= _ENTRY:
        _refuse(number, "expected number and text, perhaps digest and previous")
    text = found["text"]
    if not isinstance(text, str) or not 1 <= len(text) <= MAX_TEXT or not text.isprintable():
        _refuse(number, f"text is 1 to {MAX_TEXT} printable characters")
    digest = _digest(found.get("digest"), "digest", number)
    if digest is None:
        digest = hashlib.sha256(text.encode()).digest()[:_OWN_DIGEST_BYTES]
    previous = _digest(found.get("previous"), "previous", number)
    return JsonEntry(_number(found["number"], "number", number), digest, text, previous)


def _number(value: object, name: str, line: int) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        _refuse(line, f"{name} is a whole number")
    return value


def _digest(value: object, name: str, line: int) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, str) or _DIGEST.fullmatch(value) is None:
        _refuse(line, f"{name} is 1 to {MAX_DIGEST_BYTES} bytes in lower-case hexadecimal")
    return bytes.fromhex(value)


def _refuse(line: int, what: str) -> NoReturn:
    raise EncodingError(WHAT, f"line {line}: {what}")
