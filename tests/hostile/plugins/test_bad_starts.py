"""Programs that do not come up as plugins: a clear error with the name, and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import SpireHwError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hostile.plugins.conftest import Stage

HASTY_S = 1.5


async def refused(stage: Stage, mode: str, *more: str, script: str = "rude_guest.py") -> str:
    """Load a guest that will not do, and return the error."""
    with pytest.raises(SpireHwError) as caught:
        await stage.load(stage.config(mode, *more, script=script))
    assert stage.left_over() == []
    return caught.value.message


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("exits", "the program ended (exit status 3) before it was up; it said: cannot go on"),
        ("garbage", "plugin's first line"),
        ("endless_line", "plugin's first line: over 4096 bytes"),
        ("silent", "did not say within 1.5 s where it listens"),
        ("closes_stdout", "closed its standard output without saying where it listens"),
        ("banner", "'Welcome to the plugin!' is not `1|1|unix|<path>|grpc`"),
        ("core_version", "core protocol version '2', expected 1"),
        ("app_version", "plugin protocol version '7', expected 1"),
        ("netrpc", "protocol 'netrpc', expected grpc"),
        ("tls", "wants TLS"),
        ("tcp", "only unix sockets are accepted"),
        ("relative", "socket path 'plugin.sock' is not absolute"),
        ("no_socket", "cannot be found: No such file or directory"),
        ("file", "is not a socket"),
        ("deaf_socket", "takes no connection: Connection refused"),
    ],
)
async def test_a_program_that_does_not_come_up(stage: Stage, mode: str, words: str) -> None:
    stage.limits = replace(stage.limits, start_s=HASTY_S if mode == "silent" else 60)
    message = await refused(stage, mode)
    assert words in message
    assert message.startswith("keymanager(odd): ")
    assert message.isprintable()


@pytest.mark.asyncio
async def test_somebody_elses_socket_is_not_talked_to(stage: Stage) -> None:
    with socket.socket(socket.AF_UNIX) as foreign:
        path = stage.temp / "foreign.sock"
        foreign.bind(str(path))
        foreign.listen()
        foreign.settimeout(0)
        assert "is not a socket" in await refused(stage, "symlink", str(path))
        message = await refused(stage, "foreign_socket", str(path))
        assert f"belongs to another process (pid {os.getpid()})" in message
        connection, _ = foreign.accept()  # looked at, and left without a byte
        with connection:
            assert connection.recv(64) == b""


@pytest.mark.asyncio
@pytest.mark.skipif(os.geteuid() != 0, reason="gives a socket to another user")
async def test_a_socket_of_another_user_is_refused(stage: Stage) -> None:
    with socket.socket(socket.AF_UNIX) as foreign:
        path = stage.temp / "foreign.sock"
        foreign.bind(str(path))
        foreign.listen()
        os.chown(path, 65534, 65534)
        message = await refused(stage, "foreign_socket", str(path))
    assert "belongs to user 65534; a plugin runs as its host's user" in message


@pytest.mark.asyncio
async def test_a_socket_where_everybody_may_exchange_it_is_refused(stage: Stage) -> None:
    open_to_all = stage.temp / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as foreign:
        path = open_to_all / "s"
        foreign.bind(str(path))
        foreign.listen()
        assert "not safe from other users" in await refused(stage, "foreign_socket", str(path))


@pytest.mark.asyncio
async def test_what_does_not_speak_grpc_is_given_up(stage: Stage) -> None:
    message = await refused(stage, "not_grpc")
    assert message.startswith("keymanager(odd): ")


@pytest.mark.asyncio
async def test_a_wrong_checksum_is_not_started(stage: Stage) -> None:
    ran = stage.temp / "ran"
    program = script(stage.temp / "p", f"#!/bin/sh\ntouch {ran}\n")
    config = replace(stage.config("good"), cmd=str(program), checksum="ab" * 32)
    with pytest.raises(
        SpireHwError, match=r"^keymanager\(odd\): plugin_cmd .* has checksum"
    ) as caught:
        await stage.load(config)
    assert "plugin_checksum says " + "ab" * 32 in caught.value.message
    assert not ran.exists()


@pytest.mark.asyncio
async def test_a_program_exchanged_after_the_check_is_not_what_runs(stage: Stage) -> None:
    """The script replaces its own file before it is up; what is started again is what was checked."""
    ran = stage.temp / "ran"
    program = script(
        stage.temp / "p", f'#!/bin/sh\necho once >> {ran}\necho "touch {ran}.evil" > "$1"\nexit 1\n'
    )
    config = replace(stage.config("good"), cmd=str(program), args=(str(program),))
    config = replace(config, checksum=hashlib.sha256(program.read_bytes()).hexdigest())
    with pytest.raises(SpireHwError, match="exit status 1"):
        await stage.load(config)
    assert ran.read_text() == "once\n"
    with pytest.raises(SpireHwError, match="has checksum"):
        await stage.load(config)
    assert not ran.with_suffix(".evil").exists()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("mode", "words"), [(0o644, "is not executable"), (stat.S_ISUID, "is not executable")]
)
async def test_a_file_that_is_not_executable(stage: Stage, mode: int, words: str) -> None:
    program = script(stage.temp / "p", "#!/bin/sh\n")
    program.chmod(mode)
    with pytest.raises(SpireHwError, match=words):
        await stage.load(replace(stage.config("good"), cmd=str(program), checksum=""))


@pytest.mark.asyncio
async def test_what_is_no_program_at_all(stage: Stage) -> None:
    fifo = stage.temp / "fifo"
    os.mkfifo(fifo, 0o755)
    nonsense = script(stage.temp / "nonsense", "nonsense")
    lost = script(stage.temp / "lost", "#!/no/such/interpreter\n")
    for path, words in (
        (stage.temp / "missing", "does not exist"),
        (stage.temp, "is not a regular file"),
        (fifo, "is not a regular file"),
        (nonsense, "cannot be executed: Exec format error"),
        (lost, "cannot be executed: No such file or directory (a script's interpreter?)"),
    ):
        with pytest.raises(SpireHwError) as caught:
            await stage.load(replace(stage.config("good"), cmd=str(path), checksum=""))
        assert words in caught.value.message
        assert caught.value.message.startswith("keymanager(odd): ")
        assert stage.left_over() == []


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path
