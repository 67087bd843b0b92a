r"""Read Microsoft cabinet files (`.cab`), the form in which TPM manufacturers' CAs are published.

Stored and MSZIP folders of a single cabinet; not LZX, Quantum, or sets of several cabinets. Sizes
are checked before anything is inflated, so that a small file cannot become a large one. The
Authenticode signature in the header's reserved part is not looked at.

Spec: [MS-CAB], sections 2.1 to 2.6; [MS-MCI].
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

from spire_hw.errors import EncodingError, InvalidInputError

MAGIC: Final = b"MSCF"
MAX_CABINET_BYTES: Final = 32 << 20
MAX_CONTENT_BYTES: Final = 64 << 20
_MAX_FILES: Final = 20_000
_MAX_NAME_BYTES: Final = 256

_HEADER: Final = struct.Struct("<4xIIIIIBBHHHHH")
_RESERVED: Final = struct.Struct("<HBB")
_FOLDER: Final = struct.Struct("<IHH")
_FILE: Final = struct.Struct("<IIHHHH")
_BLOCK: Final = struct.Struct("<IHH")
_VERSION: Final = (1, 3)
_HAS_PREVIOUS, _HAS_NEXT, _HAS_RESERVED = 1, 2, 4
_KIND_MASK, _STORED, _MSZIP = 0x000F, 0, 1
_KINDS: Final = {2: "Quantum", 3: "LZX"}
_MAX_BLOCK_BYTES: Final = 32_768
_ZIP_MAGIC: Final = b"CK"
_IS_UTF8: Final = 0x80
_WHAT: Final = "cabinet"


class Entry(NamedTuple):
    """One file: its path with forward slashes, as it is written there, and its content."""

    name: str
    content: bytes


class _Folder(NamedTuple):
    start: int
    blocks: int
    kind: int


class _Header(NamedTuple):
    folders: list[_Folder]
    first_file: int
    files: int
    block_spare: int


def read_cabinet(raw: bytes) -> list[Entry]:
    """Return the files of a cabinet in their order.

    Names come from the file: whoever writes them to a disk has to check them.

    Raises:
        EncodingError: malformed.
        InvalidInputError: too large, or a feature that is not supported.
    """
    if len(raw) > MAX_CABINET_BYTES:
        raise InvalidInputError(f"{_WHAT}: larger than {MAX_CABINET_BYTES} bytes")
    header = _read_header(raw)
    listed = _read_files(raw, header)
    room = MAX_CONTENT_BYTES
    contents: list[bytes] = []
    for folder in header.folders:
        contents.append(_read_folder(raw, folder, header.block_spare, room))
        room -= len(contents[-1])
    found, taken = [], 0
    for offset, (name, size, start, index) in listed:
        # Overlapping files could make many copies of few bytes.
        taken += size
        if index >= len(contents) or start + size > len(contents[index]):
            raise EncodingError(_WHAT, "a file lies outside its folder", offset)
        if taken > MAX_CONTENT_BYTES:
            raise InvalidInputError(f"{_WHAT}: holds more than {MAX_CONTENT_BYTES} bytes")
        found.append(Entry(name, contents[index][start : start + size]))
    return found


def _unpack(layout: struct.Struct, raw: bytes, offset: int) -> tuple[int, ...]:
    if offset + layout.size > len(raw):
        raise EncodingError(_WHAT, "ends early", len(raw))
    return layout.unpack_from(raw, offset)


def _read_header(raw: bytes) -> _Header:
    fields = _unpack(_HEADER, raw, 0)
    _, size, _, first_file, _, minor, major, folders, files, flags, _, _ = fields
    if not raw.startswith(MAGIC):
        raise EncodingError(_WHAT, "not a cabinet", 0)
    if (major, minor) != _VERSION:
        raise InvalidInputError(f"{_WHAT}: version {major}.{minor} is not supported")
    if size > len(raw):
        raise EncodingError(_WHAT, "ends early", len(raw))
    if flags & (_HAS_PREVIOUS | _HAS_NEXT):
        raise InvalidInputError(f"{_WHAT}: it is one of a set; sets are not supported")
    if files > _MAX_FILES:
        raise InvalidInputError(f"{_WHAT}: holds more than {_MAX_FILES} files")
    offset, folder_spare, block_spare = _HEADER.size, 0, 0
    if flags & _HAS_RESERVED:
        header_spare, folder_spare, block_spare = _unpack(_RESERVED, raw, offset)
        offset += _RESERVED.size + header_spare
    found = []
    for _ in range(folders):
        found.append(_Folder(*_unpack(_FOLDER, raw, offset)))
        offset += _FOLDER.size + folder_spare
    return _Header(found, first_file, files, block_spare)


def _read_files(raw: bytes, header: _Header) -> list[tuple[int, tuple[str, int, int, int]]]:
    """Return name, size, place in its folder, and folder, each with where it was read."""
    found, offset = [], header.first_file
    for _ in range(header.files):
        size, start, index, _, _, attributes = _unpack(_FILE, raw, offset)
        begin = offset + _FILE.size
        end = raw.find(b"\0", begin, begin + _MAX_NAME_BYTES + 1)
        if end <= begin:
            raise EncodingError(_WHAT, "file name is malformed", begin)
        coding = "utf-8" if attributes & _IS_UTF8 else "cp1252"
        name = raw[begin:end].decode(coding, "replace").replace("\\", "/")
        found.append((offset, (name, size, start, index)))
        offset = end + 1
    return found


def _read_folder(raw: bytes, folder: _Folder, spare: int, room: int) -> bytes:
    kind = folder.kind & _KIND_MASK
    if kind not in {_STORED, _MSZIP}:
        raise InvalidInputError(
            f"{_WHAT}: {_KINDS.get(kind, f'compression {kind}')} compression is not supported; "
            "unpack it with cabextract and take the directory"
        )
    blocks = _list_blocks(raw, folder, spare)
    if sum(size for _, _, size in blocks) > room:
        raise InvalidInputError(f"{_WHAT}: holds more than {MAX_CONTENT_BYTES} bytes")
    parts: list[bytes] = []
    for offset, data, size in blocks:
        if kind == _MSZIP:
            parts.append(_inflate(data, parts[-1] if parts else b"", size, offset))
        elif len(data) == size:
            parts.append(data)
        else:
            raise EncodingError(_WHAT, "block has another size than it says", offset)
    return b"".join(parts)


def _list_blocks(raw: bytes, folder: _Folder, spare: int) -> list[tuple[int, bytes, int]]:
    """Return offset, content and size when inflated of every block, checksums verified."""
    found, offset = [], folder.start
    for _ in range(folder.blocks):
        checksum, packed, size = _unpack(_BLOCK, raw, offset)
        begin = offset + _BLOCK.size + spare
        if begin + packed > len(raw):
            raise EncodingError(_WHAT, "ends early", len(raw))
        if size > _MAX_BLOCK_BYTES:
            raise EncodingError(_WHAT, "block is larger than 32768 bytes", offset)
        data = raw[begin : begin + packed]
        # The checksum starts at the sizes, and the reserved bytes belong to it.
        if checksum and checksum != _checksum(raw[offset + 4 : begin + packed]):
            raise EncodingError(_WHAT, "checksum does not match", offset)
        found.append((offset, data, size))
        offset = begin + packed
    return found


def _checksum(data: bytes) -> int:
    """Return the checksum of a block, from its sizes on.

    The content is taken in words of 4 bytes, little-endian; what is left over, big-endian. The
    sizes are one such word, so both fall on the same lattice.
    """
    whole = len(data) // 4 * 4
    total = 0
    for (word,) in struct.iter_unpack("<I", data[:whole]):
        total ^= word
    return total ^ int.from_bytes(data[whole:], "big")


def _inflate(data: bytes, before: bytes, size: int, offset: int) -> bytes:
    """Return an MSZIP block; it may refer to the block before it."""
    if not data.startswith(_ZIP_MAGIC):
        raise EncodingError(_WHAT, "block is not MSZIP", offset)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS, zdict=before)
    try:
        out = inflater.decompress(data[len(_ZIP_MAGIC) :], size + 1)
    except zlib.error as e:
        raise EncodingError(_WHAT, "block does not inflate", offset) from e
    if len(out) != size or not inflater.eof:
        raise EncodingError(_WHAT, "block has another size than it says", offset)
    return out
