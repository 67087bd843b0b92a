"""Directories that others have a hand on, and what a process gives away about itself."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import structlog

from spire_hw.datadir import prepare_data_dir
from spire_hw.errors import NotReadyError, UnavailableError
from spire_hw.hardening import check_directory
from spire_hw.rpc.server import RpcServer
from spire_hw.transport.front import FrontLimits
from spire_hw.transport.unixfront import UnixFront
from spire_hw_agent.storage import Storage

if TYPE_CHECKING:
    from pathlib import Path

OTHER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def foreign(parent: Path, mode: int) -> Path:
    """Return a directory another user made in one with the mode given."""
    parent.chmod(mode)
    made = parent / "theirs"
    made.mkdir()
    os.chown(made, OTHER, OTHER)
    return made


@needs_root
def test_a_directory_another_user_left_where_all_may_is_refused(tmp_path: Path) -> None:
    theirs = foreign(tmp_path, 0o1777)
    below = theirs / "mine"
    below.mkdir()
    for directory in (theirs, below):
        with pytest.raises(UnavailableError, match="belongs to user 65534"):
            check_directory(directory)
    with pytest.raises(UnavailableError):
        prepare_data_dir(below, structlog.get_logger())
    with pytest.raises((UnavailableError, NotReadyError)):
        Storage(below)


@needs_root
def test_a_link_another_user_left_where_all_may_is_refused(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o1777)
    link = open_to_all / "link"
    link.symlink_to(real)
    os.lchown(link, OTHER, OTHER)
    with pytest.raises(UnavailableError, match="belongs to user"):
        check_directory(link)
    assert check_directory(real) is None


@needs_root
def test_what_an_operator_gave_away_is_only_remarked_on(tmp_path: Path) -> None:
    assert "belongs to user" in str(check_directory(foreign(tmp_path, 0o755)))


def test_a_directory_open_to_all_is_remarked_on(tmp_path: Path) -> None:
    assert check_directory(tmp_path) is None
    tmp_path.chmod(0o777)
    assert "everybody" in str(check_directory(tmp_path))
    tmp_path.chmod(0o1777)
    assert check_directory(tmp_path) is None


@needs_root
@pytest.mark.asyncio
async def test_no_socket_is_opened_in_a_directory_of_another_user(tmp_path: Path) -> None:
    front = UnixFront(foreign(tmp_path, 0o1777) / "s", 0o777)
    with pytest.raises(UnavailableError, match="belongs to user"):
        await front.start(RpcServer([]).engine)


@pytest.mark.asyncio
async def test_one_caller_never_has_all_of_few_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rpc_engine: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    server = RpcServer([])
    front = UnixFront(tmp_path / "s", 0o777, limits=FrontLimits())
    server.add_front(front)
    await server.start()
    room = (1024 - 256) // {"h2": 2, "grpcio": 4}[rpc_engine]
    assert front._max_connections == room
    assert front._max_per_caller == room // 4
    await server.close(0)


HARDENED = """
import os, resource, signal
from spire_hw.hardening import harden
resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
harden()
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300)
print(os.stat("/proc/self/mem").st_uid, status["CoreDumping"].strip())
os.listdir("/proc/self/fd")
os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_a_hardened_process_leaves_no_core_file(tmp_path: Path) -> None:
    done = subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-u", "-c", HARDENED],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode < 0
    assert done.stdout.splitlines()[0] == "(0, 0) True"
    assert done.stdout.splitlines()[1].split()[0] == "0"
    assert list(tmp_path.iterdir()) == []
