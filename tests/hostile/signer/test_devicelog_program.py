"""Programs that read a device's log and do what they should not; files that others can change."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.config import hcl
from spire_hw.errors import ConfigError, InvalidInputError, NotReadyError
from spire_hw.log import get_logger
from spire_hw.telemetry.metrics import NO_METRICS
from spire_hw_signer.config import build_settings
from spire_hw_signer.devicelog import program
from spire_hw_signer.devicelog.drain import DeviceLog
from spire_hw_signer.devicelog.entries import DeviceLogError
from spire_hw_signer.devicelog.program import check_program, check_secret, find_faults, own_users
from spire_hw_signer.devicelog.settings import DeviceLogSettings
from spire_hw_sim.auditrig import make_log, read_all, until
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import Callable

OTHER_USER = 12345
IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="gives files to other users")


def script(folder: Path, text: str, name: str = "read") -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


async def output(command: str, *arguments: str, secret: Path | None = None, **more: Any) -> bytes:
    limits = {"timeout_s": 20.0, "limit": 4096, **more}
    return await program.run([command, *arguments], secret, **limits)


async def failure(command: str, **more: Any) -> str:
    with pytest.raises(DeviceLogError) as caught:
        await output(command, **more)
    assert caught.value.reason == "program"
    return caught.value.message


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.asyncio
async def test_a_program_gets_its_secret_and_nothing_else_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_SECRET", "x")
    ours = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(ours, True)
    secret = tmp_path / "secret"
    secret.write_text("sesame\n")
    secret.chmod(0o600)
    text = 'echo "$@"; cat; pwd; umask; env | sort; ls /proc/self/fd; cat /proc/self/stat'
    try:
        said = await output(script(tmp_path, text), "a b", "$(id)", secret=secret)
    finally:
        os.close(ours)
    lines = said.decode().splitlines()
    assert lines[:4] == ["a b $(id)", "sesame", "/", "0077"]
    names = {line.partition("=")[0] for line in lines if "=" in line}
    assert names <= {"PATH", "LC_ALL", "PWD", "OLDPWD", "SHLVL", "_"}
    # Its three, and the one `ls` reads the directory with.
    assert [line for line in lines if line.isdigit() and line != "0077"] == ["0", "1", "2", "3"]
    session = int(lines[-1].rpartition(")")[2].split()[3])
    assert session != os.getsid(0)


@pytest.mark.asyncio
async def test_what_a_program_has_to_read_it_need_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x" * 4096)
    secret.chmod(0o600)
    assert await output(script(tmp_path, "exec 0<&-; echo well"), secret=secret) == b"well\n"
    assert await output(script(tmp_path, "cat"), secret=None) == b""
    secret.write_text("x" * 4097)
    assert "larger than 4 KiB" in await failure(script(tmp_path, "cat"), secret=secret)


@pytest.mark.asyncio
async def test_a_program_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    text = "echo lies; printf 'no \\033[31mdevice\\n\\377' >&2; exit 3"
    message = await failure(script(tmp_path, text))
    assert "failed (exit status 3); it said: no" in message
    assert message.isprintable()
    assert "signal 11" in await failure(script(tmp_path, "kill -SEGV $$"))
    long = await failure(script(tmp_path, "yes words | head -c 100000 >&2; exit 1"))
    assert len(long) < 400
    broken = tmp_path / "broken"
    broken.write_text("#!/does/not/exist\n")
    broken.chmod(0o700)
    assert "cannot be run" in await failure(str(broken))


@pytest.mark.asyncio
async def test_a_program_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    text = f"sleep 1000 & echo $! >> {pids}; echo $$ >> {pids}; echo hello; wait"
    message = await failure(script(tmp_path, text), timeout_s=3.0)
    assert "did not end within 3 s" in message
    for pid in pids.read_text().split():
        await until(lambda p=pid: not is_alive(int(p)))  # type: ignore[misc]


@pytest.mark.asyncio
async def test_a_process_that_is_left_behind_does_not_hold_us_up(tmp_path: Path) -> None:
    left = tmp_path / "left"
    assert await output(script(tmp_path, f"sleep 1000 & echo $! > {left}; echo done")) == b"done\n"
    await until(lambda: not is_alive(int(left.read_text())))
    # One that went into a session of its own is out of reach, and what it would print of no use.
    away = tmp_path / "away"
    text = f"setsid sh -c 'echo $$ > {away}; exec sleep 1000' & until [ -s {away} ]; do :; done; echo done"
    assert "left a process behind" in await failure(script(tmp_path, text), timeout_s=600.0)
    os.kill(int(away.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("stream", ["", " >&2"])
@pytest.mark.asyncio
async def test_a_program_that_prints_without_end_is_killed(tmp_path: Path, stream: str) -> None:
    path = script(tmp_path, f"exec yes{stream}")
    if stream:
        assert "did not end within 2 s" in await failure(path, timeout_s=2.0)
    else:
        assert "printed more than 4096 bytes" in await failure(path)


@pytest.mark.asyncio
async def test_a_program_is_killed_when_the_signer_ends(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    path = script(tmp_path, f"echo $$ > {pid}; exec sleep 1000")
    audit = make_log(tmp_path / "audit")
    await audit.open()
    settings = DeviceLogSettings("yubihsm", (path,), timeout_s=600.0)
    reading = DeviceLog(
        settings, audit, metrics=NO_METRICS, clock=SimClock(), log=get_logger("device_log")
    )
    await reading.start()
    await until(lambda: pid.exists() and pid.read_text().strip())
    await reading.close()
    await audit.close()
    assert not is_alive(int(pid.read_text()))
    with pytest.raises(NotReadyError, match="was not read yet"):
        await reading.check()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "does not end with a line feed|has no counters"),
        (b"\0" * 1000 + b"\n", "has no counters"),
        (b"\xff\xfe\n", "is not ASCII"),
        (b"0 unlogged boots found\n" * 3, "expected a line such as"),
        (b"Created session 0\n" * 20_000, "has no counters"),
        (b"x" * 2_000_000, "printed more than 1048576 bytes"),
        (
            b"0 unlogged boots found\n0 unlogged authentications found\nFound 99 items\n",
            "a device has 64 at most",
        ),
    ],
)
@pytest.mark.asyncio
async def test_rubbish_is_told_once_and_nothing_is_taken(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    (tmp_path / "content").write_bytes(content)
    told = tmp_path / "told"
    settings = DeviceLogSettings(
        "yubihsm",
        (script(tmp_path, f"exec cat {tmp_path}/content"),),
        (script(tmp_path, f"touch {told}", "consume"), "{number}"),
    )
    audit = make_log(tmp_path / "audit")
    await audit.open()
    reading = DeviceLog(
        settings, audit, metrics=NO_METRICS, clock=SimClock(), log=get_logger("device_log")
    )
    for _ in range(2):
        await reading.look()
        with pytest.raises(NotReadyError, match=expected):
            await reading.check()
    await audit.close()
    lines = [json.loads(line) for line in read_all(tmp_path / "audit")]
    events = [line["event"] for line in lines if line["kind"] == "note"]
    assert events.count("device_log_alarm") == 1
    assert "device_log" not in events
    assert not told.exists()


def harm_mode(path: Path) -> None:
    path.chmod(0o722)


def harm_folder(path: Path) -> None:
    path.parent.chmod(0o770)


def harm_kind(path: Path) -> None:
    path.unlink()
    path.mkdir()


def harm_missing(path: Path) -> None:
    path.unlink()


def harm_executable(path: Path) -> None:
    path.chmod(0o600)


def harm_link(path: Path) -> None:
    """Put a link into a folder of everybody's in its place."""
    shared = path.parent / "shared"
    shared.mkdir()
    path.rename(shared / "real")
    shared.chmod(0o777)
    path.symlink_to(shared / "real")


def harm_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (harm_mode, "others may write to"),
        (harm_folder, "others may write to"),
        (harm_link, "others may write to"),
        (harm_kind, "is not a program"),
        (harm_executable, "is not a program"),
        (harm_missing, "No such file"),
        (harm_loop, "cannot be run"),
    ],
)
@pytest.mark.asyncio
async def test_a_program_that_others_could_change_is_not_run(
    tmp_path: Path, harm: Callable[[Path], None], expected: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = script(folder, "echo well")
    assert await output(path) == b"well\n"
    harm(Path(path))
    assert expected in await failure(path)
    (fault,) = await asyncio.to_thread(
        list, find_faults(DeviceLogSettings("json", (path,)), folder)
    )
    assert expected in fault.message


@needs_root
def test_a_program_of_another_user_is_not_run(tmp_path: Path) -> None:
    path = script(tmp_path, "echo well")
    os.chown(path, OTHER_USER, -1)
    with pytest.raises(InvalidInputError, match=f"belongs to user {OTHER_USER}"):
        check_program(path, own_users())
    check_program(path, own_users(OTHER_USER))
    data = tmp_path / "data"
    data.mkdir()
    settings = DeviceLogSettings("json", (path,))
    assert len(list(find_faults(settings, data))) == 1
    os.chown(data, OTHER_USER, -1)
    assert list(find_faults(settings, data)) == []


def test_a_secret_that_others_could_read_is_not_used(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    settings = DeviceLogSettings("json", (script(tmp_path, ""),), secret_file=secret)
    (fault,) = find_faults(settings, tmp_path / "missing")
    assert "No such file" in fault.message
    secret.write_text("x")
    for mode in (0o640, 0o604, 0o660):
        secret.chmod(mode)
        with pytest.raises(InvalidInputError, match=f"has mode {mode:04o}"):
            check_secret(secret, own_users())
    secret.chmod(0o600)
    check_secret(secret, own_users())
    with pytest.raises(InvalidInputError, match="belongs to user"):
        check_secret(secret, {OTHER_USER})
    with pytest.raises(InvalidInputError, match="is not a regular file"):
        check_secret(tmp_path, own_users())


LEAST = """
signer {
  name = "a"
  data_dir = "/d"
  policy_file = "/p"
  socket_path = "/s"
  device_log {
    format = "yubihsm"
    read = ["/bin/r", "-a", "get-logs"]
  }
}
plugins { KeyManager "pkcs11" { plugin_data { module_path = "/m" } } }
"""


def faults(old: str, new: str) -> str:
    assert old in LEAST
    with pytest.raises(ConfigError) as caught:
        build_settings(hcl.parse(LEAST.replace(old, new), "signer.conf"))
    return caught.value.message


def test_what_is_not_said_has_a_default() -> None:
    settings = build_settings(hcl.parse(LEAST)).device_log
    assert settings == DeviceLogSettings("yubihsm", ("/bin/r", "-a", "get-logs"))
    assert settings.programs == (settings.read,)
    text = LEAST.replace("read =", 'consume = ["/bin/c", "--index={number}"] read =')
    settings = build_settings(hcl.parse(text)).device_log
    assert settings is not None
    assert settings.consuming(47) == ("/bin/c", "--index=47")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('format = "yubihsm"', "", '"format": is required'),
        ('format = "yubihsm"', 'format = "xml"', '"format"'),
        ('format = "yubihsm"', 'format = "json"', "set capacity"),
        ('"yubihsm"', '"yubihsm" capacity = 20', "a YubiHSM holds 62 entries"),
        ('"yubihsm"', '"yubihsm" interval = "10ms"', "below the least"),
        ('"yubihsm"', '"yubihsm" interval = "25h"', "interval is at most 86400s"),
        ('"yubihsm"', '"yubihsm" timeout = "1h"', "timeout is at most 600s"),
        ('"yubihsm"', '"yubihsm" max_output_bytes = 10', "max_output_bytes"),
        ('"yubihsm"', '"yubihsm" max_output_bytes = 1000000000', "max_output_bytes"),
        ('"yubihsm"', '"yubihsm" consume = ["/c", "7"]', "needs {number} once"),
        ('"yubihsm"', '"yubihsm" consume = ["/c", "{number}{number}"]', "needs {number} once"),
        ('"yubihsm"', '"yubihsm" consume = ["c", "{number}"]', "the absolute path"),
        ('"yubihsm"', '"yubihsm" pin = "1234"', "pin"),
        ('"/bin/r"', '"r"', "read begins with the absolute path"),
        ('["/bin/r", "-a", "get-logs"]', "[]", "read"),
        ('["/bin/r", "-a", "get-logs"]', '"/bin/r -a get-logs"', "read"),
        ('"-a"', '"--password=sesame", "-a"', "password on its command line"),
        ('"-a"', '"--password", "sesame", "-a"', "password on its command line"),
        ('"-a"', '"-p", "sesame", "-a"', "password on its command line"),
        ('"-a"', '"-psesame", "-a"', "password on its command line"),
        ('"-a"', '"--pin", "1234", "-a"', "password on its command line"),
        ('"-a"', '"-pin=env:PIN", "-a"', "password on its command line"),
        ('"get-logs"', '"get-logs", "-p"', "password on its command line"),
    ],
)
def test_faults_of_the_block_are_told(old: str, new: str, expected: str) -> None:
    message = faults(old, new)
    assert expected in message
    assert "sesame" not in message


@pytest.mark.parametrize("way", ["-", "file:/etc/spire-hw/p", "/etc/spire-hw/p"])
@pytest.mark.parametrize("flag", ['"-p", "{}"', '"-p{}"', '"--password", "{}"', '"--password={}"'])
def test_a_password_may_be_read_from_elsewhere(way: str, flag: str) -> None:
    text = LEAST.replace('"-a"', flag.format(way) + ', "-a"')
    assert build_settings(hcl.parse(text)).device_log is not None
