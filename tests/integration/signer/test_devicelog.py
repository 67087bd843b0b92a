"""The log of a device in the audit log: with a stand-in for yubihsm-shell that is a real process."""

from __future__ import annotations

import asyncio
import json
import tempfile
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.cli.run import run
from spire_hw.clock import SystemClock
from spire_hw.log import get_logger
from spire_hw.telemetry.exposition import encode
from spire_hw.telemetry.naming import Selection
from spire_hw.telemetry.registry import Registry
from spire_hw_signer.audit.verify import Verdict
from spire_hw_signer.cli.commands import PROGRAM, root
from spire_hw_signer.devicelog.drain import DeviceLog
from spire_hw_signer.devicelog.settings import DeviceLogSettings
from spire_hw_signer.devicelog.standing import MAX_ENTRIES, find_alarm, find_standing
from spire_hw_signer.devicelog.yubihsm import CAPACITY
from spire_hw_sim.auditrig import make_log, read_all, sign_some, until, verify
from spire_hw_sim.clock import SimClock
from spire_hw_sim.signer import SignerRig
from spire_hw_sim.yubishell import SIGN_ECDSA, LogFullError, YubiHsmLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from spire_hw.clock import Clock
    from spire_hw_signer.audit.log import AuditLog

pytestmark = pytest.mark.asyncio


def settings_of(device: YubiHsmLog, *, consume: bool = True) -> DeviceLogSettings:
    telling = device.command("set-log-index", "--log-index", "{number}") if consume else []
    read = tuple(device.command("get-logs"))
    return DeviceLogSettings("yubihsm", read, tuple(telling), device.secret_file)


class Rig:
    """A device, an audit log, and what reads the one into the other."""

    def __init__(self, audit: AuditLog, settings: DeviceLogSettings, clock: Clock) -> None:
        self.audit = audit
        self.registry = Registry(Selection("spire_signer"))
        self.device_log = DeviceLog(
            settings, audit, metrics=self.registry, clock=clock, log=get_logger("device_log")
        )

    async def look(self) -> str:
        await self.device_log.look()
        return self.device_log.trouble

    def counted(self, series: str) -> float:
        """Return the value of one series, 0 when there is none."""
        for line in encode(self.registry.read()).decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name == series:
                return float(value)
        return 0.0

    def alarms(self, reason: str) -> float:
        return self.counted(f'spire_signer_alarm{{reason="device_log_{reason}"}}')


@asynccontextmanager
async def opened(
    folder: Path, settings: DeviceLogSettings, clock: Clock | None = None
) -> AsyncIterator[Rig]:
    """Open the audit log and find out how far the device's was taken, as a start does."""
    clock = clock or SystemClock()
    audit = make_log(folder / "audit", clock=clock)
    await audit.open()
    rig = Rig(audit, settings, clock)
    rig.device_log._standing = await asyncio.to_thread(find_standing, audit.directory)
    try:
        yield rig
    finally:
        await rig.device_log.close()
        await audit.close()


def notes(folder: Path, event: str) -> list[dict[str, str]]:
    """Return the fields of notes in the audit log on the disk."""
    found = [json.loads(line) for line in read_all(folder / "audit")]
    return [r["fields"] for r in found if r["kind"] == "note" and r["event"] == event]


def taken(folder: Path) -> list[tuple[int, str]]:
    """Return number and text of every entry in the audit log."""
    return [
        (int(name.removeprefix("entry.")), text)
        for fields in notes(folder, "device_log")
        for name, text in sorted(fields.items())
        if name.startswith("entry.")
    ]


def numbers(folder: Path) -> list[int]:
    return [number for number, _ in taken(folder)]


@pytest.fixture
def device(tmp_path: Path) -> YubiHsmLog:
    return YubiHsmLog(tmp_path / "device")


async def test_every_entry_stands_in_the_audit_log_once_and_the_device_lets_go_of_it(
    tmp_path: Path, device: YubiHsmLog
) -> None:
    async with opened(tmp_path, settings_of(device)) as rig:
        for _ in range(4):
            for _ in range(5):
                device.do(SIGN_ECDSA, target=0x1234)
            assert await rig.look() == ""
            assert device.state.items[0][0] == numbers(tmp_path)[-1] + 1
        assert rig.counted('spire_signer_device_log{result="done"}') == 4
        assert rig.counted("spire_signer_device_log_entries") == len(numbers(tmp_path))
    assert numbers(tmp_path) == list(range(1, numbers(tmp_path)[-1] + 1))
    signatures = [text for _, text in taken(tmp_path) if "cmd=0x56 length=34" in text]
    assert len(signatures) == 20
    assert "target=0x1234" in signatures[0]
    assert notes(tmp_path, "device_log_alarm") == []
    report = verify(tmp_path / "audit")
    assert report.verdict is Verdict.HOLDS, report.findings


async def test_a_log_that_is_only_read_is_taken_once_too(
    tmp_path: Path, device: YubiHsmLog
) -> None:
    async with opened(tmp_path, settings_of(device, consume=False)) as rig:
        for _ in range(8):  # more than the device holds
            for _ in range(5):
                device.do(SIGN_ECDSA)
            assert await rig.look() == ""
    assert numbers(tmp_path) == list(range(1, numbers(tmp_path)[-1] + 1))
    assert numbers(tmp_path)[-1] > 62


async def test_a_restart_goes_on_where_the_audit_log_ends(
    tmp_path: Path, device: YubiHsmLog
) -> None:
    settings = settings_of(device, consume=False)
    for _ in range(3):
        async with opened(tmp_path, settings) as rig:
            assert await rig.look() == ""
            await sign_some(rig.audit, 3)
        device.do(SIGN_ECDSA)
    assert numbers(tmp_path) == list(range(1, numbers(tmp_path)[-1] + 1))
    assert len(notes(tmp_path, "device_log")) == 3
    newest = max((tmp_path / "audit").glob("audit-*.log"))
    whole = newest.read_bytes()
    # A crash that loses records: what they had is taken anew from the device.
    at = whole.rindex(b'"event":"device_log"')
    newest.chmod(0o600)
    newest.write_bytes(whole[: whole.rindex(b"\n", 0, at) + 1])
    async with opened(tmp_path, settings) as rig:
        assert await rig.look() == ""
    assert numbers(tmp_path) == list(range(1, numbers(tmp_path)[-1] + 1))


async def test_its_place_is_found_in_an_older_file(tmp_path: Path, device: YubiHsmLog) -> None:
    settings = settings_of(device)
    async with opened(tmp_path, settings) as rig:
        assert await rig.look() == ""
    clock = SimClock()
    await clock.advance(timedelta(days=3))
    async with opened(tmp_path, settings, clock) as rig:
        assert len(list((tmp_path / "audit").glob("audit-*.log"))) == 2
        before = find_standing(rig.audit.directory)
        assert before.mark is not None
        assert before.mark.number == numbers(tmp_path)[-1]
        assert await rig.look() == ""
    assert numbers(tmp_path) == list(range(1, numbers(tmp_path)[-1] + 1))


async def test_it_is_said_now_and_then_how_far_a_quiet_log_was_taken(tmp_path: Path) -> None:
    program = tmp_path / "quiet"
    program.write_text('#!/bin/sh\necho \'{"number":1,"text":"on"}\'\n')
    program.chmod(0o700)
    settings = DeviceLogSettings("json", (str(program),), capacity=10)
    clock = SimClock()
    async with opened(tmp_path, settings, clock) as rig:
        for hours, records in ((0, 1), (1, 1), (12, 2), (1, 2), (12, 3)):
            await clock.advance(timedelta(hours=hours))
            assert await rig.look() == ""
            assert len(notes(tmp_path, "device_log")) == records
    assert numbers(tmp_path) == [1]


async def test_long_logs_go_into_several_records(tmp_path: Path) -> None:
    program, text = tmp_path / "long", tmp_path / "text"
    program.write_text(f"#!/bin/sh\nexec cat {text}\n")
    program.chmod(0o700)
    longest = {"digest": "ab" * 64, "text": "\u00fc" * 380}
    lines = [json.dumps({"number": 2**62 + n, **longest}) + "\n" for n in range(200)]
    text.write_text("".join(lines))
    settings = DeviceLogSettings("json", (str(program),), capacity=1000)
    async with opened(tmp_path, settings) as rig:
        assert await rig.look() == ""
    assert len(notes(tmp_path, "device_log")) == -(-200 // MAX_ENTRIES)
    assert [n - 2**62 for n in numbers(tmp_path)] == list(range(200))
    assert taken(tmp_path)[0][1] == f"{'ab' * 64} {longest['text']}"
    assert verify(tmp_path / "audit").verdict is Verdict.HOLDS


@pytest.mark.parametrize(
    ("harm", "reason"),
    [("gap", "gap"), ("reset", "back"), ("rewritten", "other"), ("replaced", "chain")],
)
async def test_a_log_that_does_not_go_on_is_an_alarm_once(
    tmp_path: Path, device: YubiHsmLog, harm: str, reason: str
) -> None:
    for _ in range(20):
        device.do(SIGN_ECDSA)
    async with opened(tmp_path, settings_of(device, consume=False)) as rig:
        assert await rig.look() == ""
        last = numbers(tmp_path)[-1]
        with device.change() as state:
            if harm == "rewritten":
                rest, state.items, state.digests = state.items, [], []
                state.before = "00" * 16
                for item in rest:
                    state.add(item)
            elif harm == "replaced":
                known = [item[0] for item in state.items].index(last)
                rest, state.items, state.digests = state.items[known + 1 :], [], []
                state.before = "00" * 16
                for item in rest:
                    state.add(item)
        if harm == "gap":
            for _ in range(70):
                device.do(SIGN_ECDSA)
        elif harm == "reset":
            device.reset()
        trouble = await rig.look()
        assert trouble
        assert rig.alarms(reason) == 1
        (alarm, *_) = notes(tmp_path, "device_log_alarm")
        assert alarm["reason"] == reason
        assert alarm["error"] in trouble
        found = find_alarm(rig.audit.directory, SystemClock().now() - timedelta(minutes=5))
        assert found is not None
        # What the device had is kept all the same, and reading goes on from there.
        assert len(numbers(tmp_path)) > last
        assert await rig.look() == ""
        assert rig.alarms(reason) == 1
        await rig.device_log.check()


async def test_a_broken_chain_is_taken_by_nobody_and_told_to_no_device(
    tmp_path: Path, device: YubiHsmLog
) -> None:
    async with opened(tmp_path, settings_of(device)) as rig:
        assert await rig.look() == ""
        known = numbers(tmp_path)
        device.do(SIGN_ECDSA)
        with device.change() as state:
            state.items[-1][5] ^= 1
        for _ in range(3):
            assert "chain of the device's log is broken" in await rig.look()
        assert numbers(tmp_path) == known
        assert device.state.items[0][0] == known[-1] + 1
        assert rig.alarms("chain") == 3
        assert len(notes(tmp_path, "device_log_alarm")) == 1
        # An operator keeps what is there, and has the device go on.
        assert device.consume(device.state.items[-1][0])
        assert "entries of the device's log are missing" in await rig.look()
        assert await rig.look() == ""


async def test_a_full_log_stops_the_device_until_it_was_read(tmp_path: Path) -> None:
    device = YubiHsmLog(tmp_path / "device", force=True)
    while len(device.state.items) < CAPACITY:
        device.do(SIGN_ECDSA)
    with pytest.raises(LogFullError):
        device.do(SIGN_ECDSA)
    device.boot()
    async with opened(tmp_path, settings_of(device)) as rig:
        trouble = await rig.look()
        assert "the device's log was full: 62 entries" in trouble
        assert "no room to log 1 boots" in trouble
        assert "no room to log 1 authentications" in trouble
        assert (rig.alarms("full"), rig.alarms("unlogged")) == (1, 2)
        device.do(SIGN_ECDSA)
        assert await rig.look() == ""
    assert numbers(tmp_path) == list(range(1, numbers(tmp_path)[-1] + 1))


async def test_nothing_is_told_to_the_device_that_is_not_on_the_disk(
    tmp_path: Path, device: YubiHsmLog
) -> None:
    async with opened(tmp_path, settings_of(device)) as rig:
        assert await rig.look() == ""
        at = device.state.items[0][0]
        # Somebody else's hand: the log takes nothing more.
        (file,) = (tmp_path / "audit").glob("audit-*.log")
        with file.open("ab") as stream:
            stream.write(b"x\n")
        assert "audit log unavailable" in await rig.look()
        assert "audit log unavailable" in await rig.look()
        assert device.state.items[0][0] == at
        with file.open("rb+") as stream:
            stream.truncate(file.stat().st_size - 2)
        await until(lambda: not rig.audit.trouble)
        assert await rig.look() == ""
        assert device.state.items[0][0] > at
    assert numbers(tmp_path) == list(range(1, numbers(tmp_path)[-1] + 1))


async def test_a_device_that_cannot_be_told_is_an_alarm(tmp_path: Path, device: YubiHsmLog) -> None:
    settings = settings_of(device)
    settings = replace(settings, consume=(*settings.consume, "--what"))
    async with opened(tmp_path, settings) as rig:
        trouble = await rig.look()
        assert "the device was not told that its log was read" in trouble
        assert "exit status 2" in trouble
        assert (rig.alarms("consume"), len(numbers(tmp_path)) > 2) == (1, True)


async def test_a_wrong_password_is_told_and_never_shown(tmp_path: Path, device: YubiHsmLog) -> None:
    device.secret_file.write_text("sesame-4711\n")
    async with opened(tmp_path, settings_of(device)) as rig:
        trouble = await rig.look()
    assert "Authentication error" in trouble
    assert b"4711" not in b"".join(read_all(tmp_path / "audit"))


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hwsig") as folder:
        yield Path(folder)


def block(device: YubiHsmLog) -> str:
    settings = settings_of(device)
    return f"""
  device_log {{
    format      = "yubihsm"
    read        = {json.dumps(settings.read)}
    consume     = {json.dumps(settings.consume)}
    secret_file = "{device.secret_file}"
    interval    = "1s"
  }}"""


async def test_a_signer_reads_the_log_while_it_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = YubiHsmLog(folder / "device")
    async with SignerRig(folder, keys="disk", more=block(device)) as rig:
        data = folder / "data"
        await until(lambda: len(notes(data, "device_log")) >= 1)
        first = numbers(data)[-1]
        device.do(SIGN_ECDSA, target=0x77)
        await until(lambda: any("target=0x0077" in text for _, text in taken(data)))
        device.reset()
        await until(lambda: {"back", "other"} & reasons(data))
        await rig.restart()
        await until(lambda: len(notes(data, "start")) >= 2 and numbers(data)[-1] > first)
        found = await asyncio.to_thread(doctor, rig, capsys)
    assert found["device_log.alarm"]["level"] == "warning"
    assert notes(data, "device_log_alarm")[-1]["error"] in found["device_log.alarm"]["message"]
    assert verify(data / "audit").verdict is Verdict.HOLDS


async def test_a_signer_that_is_killed_goes_on_without_a_gap_and_without_a_double(
    folder: Path,
) -> None:
    device = YubiHsmLog(folder / "device")
    rig = SignerRig(folder, keys="disk", more=block(device))
    data = folder / "data"
    (data / "audit").mkdir(parents=True, mode=0o700)
    data.chmod(0o700)
    for turn in range(4):
        before = len(numbers(data))
        process = await asyncio.create_subprocess_exec(*rig.command, env=dict(rig.environment))
        try:
            # While it reads, while it writes, while it tells the device, and later.
            await until(lambda n=before: len(numbers(data)) > n)  # type: ignore[misc]
            await asyncio.sleep(0.15 * turn)
            device.do(SIGN_ECDSA)
        finally:
            process.kill()
            await process.wait()
    async with SignerRig(folder, keys="disk", more=block(device)):
        last = device.state.number
        await until(lambda: numbers(data)[-1] >= last)
    assert numbers(data) == list(range(1, numbers(data)[-1] + 1))
    assert reasons(data) <= {"consume"}
    assert verify(data / "audit").verdict is Verdict.HOLDS


async def test_a_signer_tells_of_a_log_that_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = YubiHsmLog(folder / "device")
    more = block(device)
    device.program.chmod(0o600)
    async with SignerRig(folder, keys="disk", more=more) as rig:
        await until(lambda: notes(folder / "data", "device_log_alarm"))
        healthy = ["healthcheck", "-socketPath", str(rig.admin_socket)]
        assert await asyncio.to_thread(run, root, PROGRAM, healthy) == 1
        found = await asyncio.to_thread(doctor, rig, capsys)
        assert "is not a program" in found["config.invalid"]["message"]
        assert "is not a program" in found["device_log.alarm"]["message"]
        assert found["device_log.unread"]["level"] == "warning"
        device.program.chmod(0o700)
        await until(lambda: notes(folder / "data", "device_log"))
        async with asyncio.timeout(20):
            while await asyncio.to_thread(run, root, PROGRAM, healthy) != 0:  # noqa: ASYNC110 - a program
                await asyncio.sleep(0.1)


def reasons(folder: Path) -> set[str]:
    return {fields["reason"] for fields in notes(folder, "device_log_alarm")}


def doctor(rig: SignerRig, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    run(root, PROGRAM, ["doctor", "-config", str(rig.config_file), "-output", "json"])
    return {f["check"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
