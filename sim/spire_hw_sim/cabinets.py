"""Microsoft cabinet files, also wrong ones, for what reads them.

Spec: [MS-CAB], section 2; [MS-MCI].
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_BLOCK_BYTES: Final = 32_768
_MSZIP, _KIND_MASK = 1, 0x000F
_UTF8: Final = 0x80


@dataclass(slots=True)
class CabinetSpec:
    """What a cabinet should be like.

    Attributes:
        compression: 0 stored, 1 MSZIP; others are only said, not done.
        reserved: bytes kept free in the header, where a signature would be, and in every block.
        with_checksums: blocks carry checksums.
        version: minor and major.
        flags: besides that for reserved bytes.
        magic: first four bytes.
    """

    compression: int = _MSZIP
    reserved: tuple[int, int] = (20, 0)
    with_checksums: bool = True
    version: tuple[int, int] = (3, 1)
    flags: int = 0
    magic: bytes = b"MSCF"


def make_cabinet(files: Mapping[str, bytes], spec: CabinetSpec | None = None) -> bytes:
    """Return a cabinet with one folder; names have backslashes, as on the system it is from."""
    chosen = spec or CabinetSpec()
    content = b"".join(files.values())
    chunks = [content[i : i + _BLOCK_BYTES] for i in range(0, len(content), _BLOCK_BYTES)]
    head_spare, block_spare = chosen.reserved
    listed, place = b"", 0
    for name, data in files.items():
        text = name.replace("/", "\\").encode() + b"\0"
        listed += struct.pack("<IIHHHH", len(data), place, 0, 0, 0, _UTF8) + text
        place += len(data)
    first_file = 36 + 4 + head_spare + 8
    start = first_file + len(listed)
    blocks = _blocks(chunks, chosen, block_spare)
    total = start + len(blocks)
    flags = chosen.flags | 4
    header = struct.pack("<4s5I", chosen.magic, 0, total, 0, first_file, 0)
    header += struct.pack("<BBHHHHH", *chosen.version, 1, len(files), flags, 0, 0)
    header += struct.pack("<HBB", head_spare, 0, block_spare) + bytes(head_spare)
    folder = struct.pack("<IHH", start, len(chunks), chosen.compression)
    return header + folder + listed + blocks


def _blocks(chunks: list[bytes], spec: CabinetSpec, spare: int) -> bytes:
    out, before = b"", b""
    for chunk in chunks:
        data = chunk
        if spec.compression & _KIND_MASK == _MSZIP:
            deflate = (
                zlib.compressobj(wbits=-15, zdict=before) if before else zlib.compressobj(wbits=-15)
            )
            data = b"CK" + deflate.compress(chunk) + deflate.flush()
            before = chunk
        body = struct.pack("<HH", len(data), len(chunk)) + bytes(spare) + data
        out += struct.pack("<I", checksum(body) if spec.with_checksums else 0) + body
    return out


def checksum(body: bytes) -> int:
    """Return the checksum of a block from its sizes on, a byte at a time."""
    lanes, whole = [0, 0, 0, 0], len(body) // 4 * 4
    for i, byte in enumerate(body[:whole]):
        lanes[i % 4] ^= byte
    return int.from_bytes(bytes(lanes), "little") ^ int.from_bytes(body[whole:], "big")
