from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.pool.pin import EnvironmentPin, FilePin, PinGuard, Refusals, TerminalPins
from spire_hw.pkcs11.pool.place import PinFrom, Pins, Place

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


def sent(guard: PinGuard, refusals: Refusals, answer: str, name: str = "HSM") -> None:
    """Hand a PIN to a token, which answers that it was refused, that it was taken, or nothing clear."""

    async def log_in() -> None:
        pin = guard.take()
        async with guard.meeting(name, pin) as notes:
            assert notes is refusals
            if answer == "taken":
                notes.accept(name, pin)
            else:
                {"refused": notes.refuse, "unclear": notes.doubt}[answer](
                    name, pin, f"PIN {answer}"
                )

    asyncio.run(log_in())


def test_a_refused_pin_is_not_handed_out_until_the_source_changes(tmp_path: Path) -> None:
    refusals = Refusals()
    guard = PinGuard(write(tmp_path / "pin", b"1111"), refusals)
    sent(guard, refusals, "refused")
    with pytest.raises(TokenError, match="PIN refused"):
        guard.take()
    write(tmp_path / "pin", b"2222")
    assert guard.take() == "2222"
    write(tmp_path / "pin", b"1111")
    with pytest.raises(TokenError):
        guard.take()
    assert "1111" not in repr(vars(guard)) + repr(vars(refusals))


def test_fault_16_a_refused_pin_is_sent_to_that_token_by_nobody(tmp_path: Path) -> None:
    refusals = Refusals()
    sent(PinGuard(write(tmp_path / "pin", b"1111"), refusals), refusals, "refused")
    other = PinGuard(FilePin(tmp_path / "pin"), refusals)
    for _ in range(2):
        with pytest.raises(TokenError, match="PIN refused") as caught:
            sent(other, refusals, "taken")
        assert caught.value.reason == "hsm.pin_latched"
    # Another token may well take it.
    sent(PinGuard(FilePin(tmp_path / "pin"), refusals), refusals, "taken", "another token")
    write(tmp_path / "pin", b"2222")
    sent(other, refusals, "taken")


@pytest.mark.asyncio
async def test_who_sends_a_pin_waits_for_what_the_token_says_to_it_before(tmp_path: Path) -> None:
    refusals = Refusals()
    one = PinGuard(write(tmp_path / "pin", b"1111"), refusals)
    other = PinGuard(FilePin(tmp_path / "pin"), refusals)

    async def meets(guard: PinGuard, token: str) -> None:
        async with guard.meeting(token, guard.take()):
            return

    async with one.meeting("token", one.take()):
        late = asyncio.gather(meets(other, "token"))
        for _ in range(5):
            await asyncio.sleep(0)
        await meets(PinGuard(FilePin(tmp_path / "pin"), refusals), "another token")
        assert not late.done()
        refusals.refuse("token", "1111", "PIN refused")
    with pytest.raises(TokenError, match="PIN refused"):
        await late


def test_a_doubted_pin_is_handed_out_once_more_unless_it_was_taken_since(tmp_path: Path) -> None:
    refusals = Refusals()
    guard = PinGuard(write(tmp_path / "pin", b"1111"), refusals)
    for _ in range(3):
        sent(guard, refusals, "unclear")
        sent(guard, refusals, "taken")
    sent(guard, refusals, "unclear")
    other = PinGuard(FilePin(tmp_path / "pin"), refusals)
    sent(other, refusals, "unclear")
    for one in (guard, other):
        with pytest.raises(TokenError, match="PIN unclear; two logins") as caught:
            one.take()
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    write(tmp_path / "pin", b"2222")
    assert other.take() == "2222"


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


def test_one_token_has_one_pin_from_the_terminal_and_another_its_own() -> None:
    entered = TerminalPins()

    def source(**token: object) -> object:
        place = Place("/m.so", {"label": None, "uri": {}, **token}, PinFrom.TERMINAL)
        return Pins(Refusals(), entered)._source(place)

    same = source(label="ca", uri={"model": "A"})
    assert source(label="ca", uri={"model": "A"}) is same
    others = [
        source(label="ca", uri={"model": "B"}),
        source(label="ca"),
        source(label="ca", slot_id=3),
        source(label="ca", serial="12"),
        source(label="ca", login_as="crypto-user"),
    ]
    assert len({id(one) for one in (same, *others)}) == 6
    words = Place(
        "/m.so", {"label": "ca", "slot_id": 3, "uri": {"model": "A"}}, PinFrom.TERMINAL
    ).words
    assert words == 'token "ca" slot 3 model "A"'
    limited = Place("/m.so", {"label": "ca", "login_as": "crypto-user"}, PinFrom.TERMINAL)
    assert limited.words == 'token "ca" (crypto-user)'
