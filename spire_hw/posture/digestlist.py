r"""Lists of digests in the format of sha256sum: a digest and, with two blanks between, a path.

Paths are bytes. A line that starts with a backslash has its path escaped as sha256sum does it
(`\\`, `\n`, `\r`). A digest alone, blank lines and lines that start with `#` are fine too.

Source: GNU coreutils manual, "md5sum invocation".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from spire_hw.errors import EncodingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAX_BYTES: Final = 16 * 1024 * 1024
_LINE: Final = re.compile(rb"(\\?)([0-9a-fA-F]{40,128})(?:(?: [ *]|\t)([^\0]+))?")
_ESCAPE: Final = re.compile(rb"\\(.?)", re.DOTALL)
_PLAIN: Final = {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}
# So many faults of one list are named.
_MAX_FAULTS: Final = 20
_SIZES: Final = frozenset({20, 32, 48, 64})


class Listed(NamedTuple):
    """A digest and the path it belongs to, b"" for none."""

    digest: bytes
    path: bytes


class ListFaultsError(EncodingError):
    """A list that does not parse.

    Attributes:
        lines: (line number, what is wrong with it) for the first faults.
    """

    def __init__(self, what: str, lines: list[tuple[int, str]]) -> None:
        super().__init__(what, "; ".join(f"line {number}: {fault}" for number, fault in lines))
        self.lines = lines


def parse(data: bytes, sizes: Iterable[int] = _SIZES, what: str = "digest list") -> list[Listed]:
    """Return the digests of a list in order.

    Args:
        data: the file.
        sizes: digests may have so many bytes.
        what: its name for messages.

    Raises:
        ListFaultsError: with the first faults.
        EncodingError: too large.
    """
    if len(data) > MAX_BYTES:
        raise EncodingError(what, f"larger than {MAX_BYTES} bytes")
    faults: list[tuple[int, str]] = []
    found = list(_read(data, frozenset(sizes), faults))
    if faults:
        raise ListFaultsError(what, faults)
    return found


def parse_line(line: bytes, sizes: Iterable[int] = _SIZES) -> Listed:
    """Return what one line holds.

    Raises:
        ListFaultsError: it does not parse.
    """
    if not line.strip() or line.lstrip().startswith(b"#"):
        raise ListFaultsError("digest", [(1, "is empty")])
    found = parse(line, sizes, "digest")
    if len(found) != 1:
        raise ListFaultsError("digest", [(1, "is more than one line")])
    return found[0]


def encode_line(digest: bytes, path: bytes) -> bytes:
    """Return a line that reads back, without its end."""
    if not path:
        return digest.hex().encode()
    escaped = path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    mark = b"\\" if escaped != path else b""
    return mark + digest.hex().encode() + b"  " + escaped


def _read(data: bytes, sizes: frozenset[int], faults: list[tuple[int, str]]) -> Iterator[Listed]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        text = line.removesuffix(b"\r")
        if not text.strip() or text.lstrip().startswith(b"#"):
            continue
        found = _LINE.fullmatch(text)
        if found is None or len(found[2]) % 2:
            faults.append((number, "expected a digest in hexadecimal, two blanks, and a path"))
        elif len(found[2]) // 2 not in sizes:
            wanted = " or ".join(str(2 * size) for size in sorted(sizes))
            faults.append((number, f"digest has {len(found[2])} digits, expected {wanted}"))
        else:
            path = found[3] or b""
            plain = _unescape(path) if found[1] else path
            if plain is None:
                faults.append((number, "path holds an escape that does not exist"))
            else:
                yield Listed(bytes.fromhex(found[2].decode("ascii")), plain)
        if len(faults) >= _MAX_FAULTS:
            return


def _unescape(path: bytes) -> bytes | None:
    if any(found not in _PLAIN for found in _ESCAPE.findall(path)):
        return None
    return _ESCAPE.sub(lambda found: _PLAIN[found[1]], path)
