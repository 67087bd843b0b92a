from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import LimitError, NotReadyError
from spire_hw_plugins.nodeattestor.tpm import machine
from spire_hw_plugins.nodeattestor.tpm.machine import (
    BOOT_LOG,
    IMA_LOG,
    ImaList,
    Machine,
    NoLogError,
)

if TYPE_CHECKING:
    from pathlib import Path

LINES = b"".join(b"%d %s\n" % (number, b"x" * (number % 7)) for number in range(50))


@pytest.mark.parametrize("room", [0, 1, 5, 20, 100, len(LINES) - 1, len(LINES), 10**6])
@pytest.mark.parametrize("start", [0, 1, 17, 49, 50])
def test_parts_are_whole_lines_and_add_up(start: int, room: int) -> None:
    listed, found, at = ImaList(LINES), [], start
    while True:
        part, left = listed.part(at, room)
        assert part.endswith(b"\n") or not part
        assert len(part) <= room or part.count(b"\n") == 1
        found.append(part)
        at += part.count(b"\n")
        assert at + left == len(listed)
        if not left:
            break
    assert found == list(listed.parts(start, room))
    assert b"".join(found) == b"".join(LINES.splitlines(keepends=True)[start:])


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    shown = Machine(ima_log_path=tmp_path / "ima")
    shown.ima_log_path.write_bytes(b"one\ntwo\nthr")
    assert shown.ima_list().raw == b"one\ntwo\n"
    shown.ima_log_path.write_bytes(b"")
    assert len(shown.ima_list()) == 0


def test_how_long_the_list_is_stands_beside_it(tmp_path: Path) -> None:
    shown, count = Machine(ima_log_path=tmp_path / "ima"), tmp_path / "runtime_measurements_count"
    assert shown.ima_entries() is None
    for text, value in (("17\n", 17), ("x", None), ("-1", None), ("", None)):
        count.write_text(text)
        assert shown.ima_entries() == value


def test_files_that_are_not_there_are_told_apart(tmp_path: Path) -> None:
    shown = Machine(tmp_path / "log", tmp_path / "ima")
    with pytest.raises(NoLogError, match="no boot log at"):
        shown.boot_log()
    shown.boot_log_path.mkdir()
    with pytest.raises(NotReadyError, match="cannot be read"):
        shown.boot_log()
    shown.ima_log_path.write_bytes(bytes(8 * 1024 * 1024 + 1))
    with pytest.raises(LimitError, match="ima: larger than 8388608 bytes"):
        shown.ima_list()


def test_the_kernels_places_are_the_usual_ones() -> None:
    assert (Machine().boot_log_path, Machine().ima_log_path) == (BOOT_LOG, IMA_LOG)
    assert zlib.decompress(machine.compress(LINES)) == LINES
