from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.pool.pin import EnvironmentPin, FilePin, PinGuard

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, content: bytes, mode: int = 0o600) -> FilePin:
    path.write_bytes(content)
    path.chmod(mode)
    return FilePin(path)


def test_exactly_one_newline_is_stripped(tmp_path: Path) -> None:
    assert write(tmp_path / "pin", b"1234").read() == "1234"
    assert write(tmp_path / "pin", b"1234\n").read() == "1234"
    assert write(tmp_path / "pin", b"1234\n\n").read() == "1234\n"
    assert write(tmp_path / "pin", b" 1234 ").read() == " 1234 "


@pytest.mark.parametrize("content", [b"", b"\n", b"9" * 300, b"\xff\xfe", b"a\0b"])
def test_fault_20_contents_that_are_no_pin(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(TokenError) as caught:
        write(tmp_path / "pin", content).read()
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert "999" not in caught.value.message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_fault_20_a_file_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(TokenError, match=f"{mode:04o}"):
        write(tmp_path / "pin", b"1234", mode).read()


def test_fault_20_missing_directory_and_fifo_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "dir").mkdir()
    for name in ("missing", "dir", "fifo"):
        with pytest.raises(TokenError) as caught:
            FilePin(tmp_path / name).read()
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION


def test_the_environment_variable_is_gone_after_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIRE_HW_TEST_PIN", "4321")
    source = EnvironmentPin("SPIRE_HW_TEST_PIN")
    assert "SPIRE_HW_TEST_PIN" not in os.environ
    assert source.read() == "4321"
    assert "4321" not in repr(source)
    with pytest.raises(TokenError):
        EnvironmentPin("SPIRE_HW_TEST_PIN").read()


def test_a_refused_pin_is_not_handed_out_until_the_source_changes(tmp_path: Path) -> None:
    guard = PinGuard(write(tmp_path / "pin", b"1111"))
    guard.refuse(guard.take(), "PIN refused")
    with pytest.raises(TokenError, match="PIN refused"):
        guard.take()
    write(tmp_path / "pin", b"2222")
    assert guard.take() == "2222"
    write(tmp_path / "pin", b"1111")
    with pytest.raises(TokenError):
        guard.take()
    heir = PinGuard(FilePin(tmp_path / "pin"))
    heir.inherit(guard)
    with pytest.raises(TokenError):
        heir.take()
    assert "1111" not in repr(vars(guard))


def test_a_doubted_pin_is_handed_out_once_more_unless_it_was_taken_since(tmp_path: Path) -> None:
    guard = PinGuard(write(tmp_path / "pin", b"1111"))
    for _ in range(3):
        guard.doubt(guard.take(), "login failed")
        guard.accept(guard.take())
    guard.doubt(guard.take(), "login failed")
    heir = PinGuard(FilePin(tmp_path / "pin"))
    heir.inherit(guard)
    heir.doubt(heir.take(), "login failed")
    for one in (guard, heir):
        with pytest.raises(TokenError, match="login failed; two logins") as caught:
            one.take()
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    write(tmp_path / "pin", b"2222")
    assert heir.take() == "2222"


def test_a_credential_of_systemd_may_show_the_mask_of_its_access_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hsm-pin"
    file.write_text("4321")
    file.chmod(0o440)
    with pytest.raises(TokenError, match="0440"):
        FilePin(file).read()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert FilePin(file).read() == "4321"
    file.chmod(0o444)
    with pytest.raises(TokenError, match="0444"):
        FilePin(file).read()
