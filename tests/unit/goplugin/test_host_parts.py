"""What a host takes care of before and after a plugin runs: program, environment, place, socket."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import InvalidInputError, NotFoundError, UnavailableError
from spire_hw.goplugin.external import visible
from spire_hw.goplugin.listener import pin_socket
from spire_hw.goplugin.place import Place
from spire_hw.goplugin.program import open_program

if TYPE_CHECKING:
    from collections.abc import Iterator


def anybody(_pid: int) -> bool:
    return True


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="shu-", dir="/tmp") as directory:
        yield Path(directory)


def program(directory: Path, content: bytes = b"#!/bin/sh\n") -> Path:
    path = directory / "plugin"
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def test_what_was_checked_is_a_sealed_copy(tmp_path: Path) -> None:
    path = program(tmp_path)
    with closing(open_program(str(path), hashlib.sha256(b"#!/bin/sh\n").hexdigest())) as opened:
        path.write_bytes(b"#!/bin/sh\nevil\n")
        assert os.pread(opened.image, 64, 0) == b"#!/bin/sh\n"
        with pytest.raises(PermissionError):
            os.pwrite(opened.image, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(opened.image, 0)
        assert not os.get_inheritable(opened.image)
    assert opened.image == -1


def test_without_a_checksum_an_operator_is_warned(tmp_path: Path) -> None:
    path = program(tmp_path)
    assert open_program(str(path), "").remark == "no plugin_checksum is set"
    path.chmod(0o777)
    assert "may write" in open_program(str(path), "").remark


def test_programs_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_program(str(tmp_path / "missing"), "")
    with pytest.raises(InvalidInputError, match="plugin_checksum says"):
        open_program(str(program(tmp_path)), "00" * 32)


def test_relative_programs_start_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert open_program("plugin", "").path == tmp_path / "plugin"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir("/")
    with pytest.raises(NotFoundError):
        open_program("plugin", "")


def test_the_environment_holds_nothing_that_is_ours_alone() -> None:
    environ = {
        "PATH": "/bin",
        "HTTPS_PROXY": "http://proxy",
        "SPIRE_HW_SOCKET_PATH": "/s",
        "PLUGIN_MIN_PORT": "1",
        "LISTEN_FDS": "1",
        "WATCHDOG_USEC": "1",
        "NOTIFY_SOCKET": "/n",
        "HSM_PIN": "1",
        "clientSecret": "1",
        "VAULT_TOKEN": "1",
    }
    assert visible(environ, []).keys() == {"PATH", "HTTPS_PROXY"}
    assert visible(environ, ["VAULT_TOKEN"]).keys() == {"PATH", "HTTPS_PROXY", "VAULT_TOKEN"}


def test_places_of_killed_processes_are_cleared_and_those_of_others_left(short: Path) -> None:
    with closing(Place.open(str(short))) as alive:
        made = alive.make()
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
        stale = short / "spire-hw-plugins-stale"
        (stale / "run").mkdir(parents=True)
        (stale / "lock").touch()
        outside = short / "outside"
        outside.mkdir()
        (outside / "kept").touch()
        (stale / "run" / "link").symlink_to(outside)
        (short / "spire-hw-plugins-link").symlink_to(outside)
        with closing(Place.open(str(short))) as second:
            assert not stale.exists()
            assert made.exists()
            assert (outside / "kept").exists()
        assert not second.path.exists()
    assert not alive.path.exists()


def test_a_place_that_cannot_be_made_is_said(short: Path) -> None:
    with pytest.raises(UnavailableError, match="set TMPDIR to another one"):
        Place.open(str(short / "missing"))


def test_a_socket_is_pinned_where_nobody_else_can_exchange_it(short: Path) -> None:
    mine = short / "mine"
    mine.mkdir(mode=0o700)
    path = short / "s"
    with socket.socket(socket.AF_UNIX) as first:
        first.bind(str(path))
        first.listen()
        pinned = pin_socket(path, mine, anybody)
        assert pinned.parent == mine
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as caller:
            other.bind(str(path))
            other.listen()
            caller.connect(str(pinned))
            first.settimeout(5)
            accepted = [first.accept()[0], first.accept()[0], first.accept()[0]]
            for connection in accepted:
                connection.close()
    with socket.socket(socket.AF_UNIX) as inside:
        inside.bind(str(mine / "own"))
        inside.listen()
        assert pin_socket(mine / "own", mine, anybody) == mine / "own"
