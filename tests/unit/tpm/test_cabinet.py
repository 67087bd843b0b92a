from __future__ import annotations

import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.tpm import cabinet
from spire_hw.tpm.cabinet import Entry, read_cabinet
from spire_hw_sim.cabinets import CabinetSpec, make_cabinet

if TYPE_CHECKING:
    from pathlib import Path

LONG = bytes(range(256)) * 600
FILES = {"setup.cmd": b"echo", "Maker/RootCA/Root.cer": LONG, "Maker/empty.crt": b"", "x": b"tail"}


@pytest.mark.parametrize(
    "spec",
    [
        CabinetSpec(),
        CabinetSpec(compression=0),
        CabinetSpec(reserved=(0, 0)),
        CabinetSpec(reserved=(8, 5)),
        CabinetSpec(with_checksums=False),
        CabinetSpec(compression=0x1201),
    ],
)
def test_files_come_back(spec: CabinetSpec) -> None:
    found = read_cabinet(make_cabinet(FILES, spec))
    assert found == [Entry(name, content) for name, content in FILES.items()]


def test_other_readers_agree_about_what_is_written_for_tests(tmp_path: Path) -> None:
    tool = shutil.which("bsdtar")
    if tool is None:
        pytest.skip("bsdtar is not installed")
    path = tmp_path / "a.cab"
    path.write_bytes(make_cabinet(FILES))
    subprocess.run([tool, "-xf", path, "-C", tmp_path], check=True, timeout=30)  # noqa: S603
    assert (tmp_path / "Maker/RootCA/Root.cer").read_bytes() == LONG


def test_blocks_refer_to_the_block_before_them() -> None:
    whole = make_cabinet({"a": LONG})
    # The second block says the same as the first: nearly nothing is left of it.
    assert len(whole) < 2000
    assert read_cabinet(whole)[0].content == LONG


SPECS = {
    "LZX": (CabinetSpec(compression=0x1503), "LZX compression is not supported"),
    "Quantum": (CabinetSpec(compression=2), "Quantum compression is not supported"),
    "unknown": (CabinetSpec(compression=9), "compression 9 compression is not supported"),
    "version": (CabinetSpec(version=(0, 2)), "version 2.0 is not supported"),
    "one of a set": (CabinetSpec(flags=1), "one of a set"),
    "first of a set": (CabinetSpec(flags=2), "one of a set"),
    "not a cabinet": (CabinetSpec(magic=b"MZ\0\0"), "not a cabinet"),
}


@pytest.mark.parametrize("row", SPECS)
def test_what_is_not_supported_is_told(row: str) -> None:
    spec, words = SPECS[row]
    with pytest.raises(InvalidInputError, match=words):
        read_cabinet(make_cabinet({"a": b"content"}, spec))


def test_every_cut_is_refused() -> None:
    whole = make_cabinet({"a": b"some content", "b": b"more"})
    for end in range(len(whole)):
        with pytest.raises(EncodingError):
            read_cabinet(whole[:end])


def _patched(offset: int, layout: str, *values: int, spec: CabinetSpec | None = None) -> bytes:
    raw = bytearray(make_cabinet({"a": b"some content"}, spec))
    struct.pack_into(layout, raw, offset, *values)
    return bytes(raw)


FOLDER = 60
FILE = 68
BLOCK = FILE + 16 + 2
DAMAGE = {
    "checksum": (_patched(BLOCK, "<I", 1), "checksum does not match"),
    "file past its folder": (_patched(FILE, "<I", 13), "outside its folder"),
    "file in no folder": (_patched(FILE + 8, "<H", 0xFFFD), "outside its folder"),
    "name is empty": (_patched(FILE + 16, "<B", 0), "file name is malformed"),
    "size said is small": (
        _patched(BLOCK, "<IHH", 0, 16, 3, spec=CabinetSpec(compression=0)),
        "ends early|another size",
    ),
    "block too large": (_patched(BLOCK, "<IHH", 0, 4, 40000), "larger than 32768"),
    "folder outside": (_patched(FOLDER, "<I", 0xFFFFFFF0), "ends early"),
}


@pytest.mark.parametrize("row", DAMAGE)
def test_damage_is_told(row: str) -> None:
    raw, words = DAMAGE[row]
    with pytest.raises(EncodingError, match=words):
        read_cabinet(raw)


def test_block_that_is_no_mszip_is_refused() -> None:
    stored = make_cabinet({"a": b"some content"}, CabinetSpec(compression=0, with_checksums=False))
    raw = bytearray(stored)
    struct.pack_into("<H", raw, FOLDER + 6, 1)
    with pytest.raises(EncodingError, match="not MSZIP"):
        read_cabinet(bytes(raw))
    at = raw.index(b"some")
    for packed, words in ((b"CK\xff\xff", "does not inflate"), (b"CK\x03\x00", "another size")):
        raw[at : at + 4] = packed
        with pytest.raises(EncodingError, match=words):
            read_cabinet(bytes(raw))


def test_small_file_does_not_become_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cabinet, "MAX_CONTENT_BYTES", 100_000)
    with pytest.raises(InvalidInputError, match="holds more than 100000 bytes"):
        read_cabinet(make_cabinet({"a": bytes(200_000)}))


def test_one_content_is_not_handed_out_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cabinet, "MAX_CONTENT_BYTES", 100)
    raw = bytearray(make_cabinet({"a": bytes(60), "b": b""}))
    struct.pack_into("<II", raw, FILE + 18, 60, 0)
    with pytest.raises(InvalidInputError, match="holds more than 100 bytes"):
        read_cabinet(bytes(raw))


def test_large_file_and_many_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cabinet, "_MAX_FILES", 1)
    with pytest.raises(InvalidInputError, match="more than 1 files"):
        read_cabinet(make_cabinet({"a": b"1", "b": b"2"}))
    monkeypatch.setattr(cabinet, "MAX_CABINET_BYTES", 10)
    with pytest.raises(InvalidInputError, match="larger than 10 bytes"):
        read_cabinet(make_cabinet({"a": b"1"}))
