import io
import sys
from pathlib import Path

import pytest

from spire_hw.cli.files import read_input, write_output
from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.files import NotWrittenError


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def given() -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"12345")))

    given()
    assert read_input("-", 5) == b"12345"
    given()
    with pytest.raises(InvalidInputError, match=r"^standard input is larger than 4 bytes$"):
        read_input("-", 4)


def test_standard_input_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "a").open("wb") as wrong, open(wrong.fileno(), "rb", closefd=False) as raw:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
        with pytest.raises(NotReadyError, match=r"^standard input cannot be read: Bad file desc"):
            read_input("-", 4)
        sys.stdin.detach()


def test_files_and_what_stands_for_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_input(str(tmp_path / "a"), 5) == b"12345"
    assert read_input("/dev/null", 5) == b""
    with pytest.raises(NotReadyError, match=f"^{tmp_path}/none cannot be read: No such file"):
        read_input(str(tmp_path / "none"), 5)


def test_output_goes_to_a_file(tmp_path: Path) -> None:
    write_output(str(tmp_path / "a"), b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    with pytest.raises(NotWrittenError, match=f"^{tmp_path} cannot be written: Is a directory$"):
        write_output(str(tmp_path), b"x")
