"""Checkpoints: signed by the log key, told to others, and a measure for the clock."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import DeviceError, NotReadyError, UnavailableError, VerificationError
from spire_hw.evidence.checkpoint import verify_checkpoint
from spire_hw.key import fingerprint
from spire_hw.log import get_logger
from spire_hw.syslog import SyslogSettings
from spire_hw_signer.audit.chain import RECENT
from spire_hw_signer.audit.checkpoint import EVERY_RECORDS, EVERY_S
from spire_hw_signer.audit.log import Outcome
from spire_hw_signer.audit.places import MAX_WAITING, FilePlace, SyslogPlace
from spire_hw_signer.audit.record import Kind, parse
from spire_hw_sim.auditrig import (
    codes,
    intent,
    make_checkpoints,
    make_key,
    make_log,
    read_all,
    until,
    verify,
    write_whole,
)
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.key import SignOptions
    from spire_hw_signer.audit.record import Record

pytestmark = pytest.mark.asyncio
BOOT = "01234567-89ab-cdef-0123-456789abcdef"
NEXT_BOOT = "11234567-89ab-cdef-0123-456789abcdef"


def checkpoints_of(directory: Path) -> list[Record]:
    made = [parse(line.rstrip(b"\n")) for line in read_all(directory)]
    return [record for record in made if record.kind is Kind.CHECKPOINT]


async def pass_a_minute(clock: SimClock) -> None:
    await clock.advance(timedelta())  # whoever is to sleep does
    await clock.advance(timedelta(seconds=EVERY_S))


async def until_there_are(directory: Path, count: int) -> list[Record]:
    await until(lambda: len(checkpoints_of(directory)) >= count)
    return checkpoints_of(directory)


async def test_every_minute_and_at_the_end(tmp_path: Path) -> None:
    clock, key = SimClock(), make_key()
    log = make_log(tmp_path / "audit", clock=clock, boot=BOOT)
    made = make_checkpoints(log, await log.open(), key, clock=clock)
    await made.start()
    assert len(checkpoints_of(tmp_path / "audit")) == 1
    await pass_a_minute(clock)
    await until_there_are(tmp_path / "audit", 2)
    await made.close()
    await log.close()
    found = checkpoints_of(tmp_path / "audit")
    assert len(found) == 3
    for record in found:
        verify_checkpoint(record.body, key.public_key)
        assert record.body["key"] == fingerprint(made.log_key)
    assert parse(made.last) == found[-1]
    assert verify(tmp_path / "audit", key.public_key).checkpoints == 3


async def test_after_many_records(tmp_path: Path) -> None:
    clock, key = SimClock(), make_key()
    log = make_log(tmp_path / "audit", clock=clock, boot=BOOT)
    made = make_checkpoints(log, await log.open(), key, clock=clock)
    await made.start()
    for _ in range(2):
        seqs = await log.intend([intent(n) for n in range(EVERY_RECORDS // 2)])
        log.conclude([Outcome(seq, "done") for seq in seqs])
    await until_there_are(tmp_path / "audit", 2)
    await made.close()
    await log.close()


async def test_another_key_or_content_is_no_checkpoint(tmp_path: Path) -> None:
    key, other = make_key(), make_key()
    await write_whole(tmp_path / "audit", key, rounds=1)
    body = dict(checkpoints_of(tmp_path / "audit")[0].body)
    verify_checkpoint(body, key.public_key)
    with pytest.raises(VerificationError, match="another key"):
        verify_checkpoint(body, other.public_key)
    for name, value in {"at": 9, "clock": "x", "head": "0" * 64, "log": "0" * 32}.items():
        with pytest.raises(VerificationError, match="does not hold"):
            verify_checkpoint({**body, name: value}, key.public_key)


async def test_a_start_wants_the_same_key(tmp_path: Path) -> None:
    key, other = make_key(), make_key()
    await write_whole(tmp_path / "audit", key, rounds=1)
    log = make_log(tmp_path / "audit")
    made = make_checkpoints(log, await log.open(), other)
    with pytest.raises(NotReadyError, match=r"checkpoint \d+ is signed by another key.*log seal"):
        await made.start()
    await log.close()


class Failing:
    """A log key in a device that is away now and then."""

    in_process = False

    def __init__(self) -> None:
        self.key = make_key()
        self.public_key = self.key.public_key
        self.away = False

    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        if self.away:
            raise DeviceError("token is away", device="token", operation="sign")
        return await self.key.sign(digest, options)


async def test_a_device_that_is_away_is_told_and_tried_again(tmp_path: Path) -> None:
    clock, key = SimClock(), Failing()
    log = make_log(tmp_path / "audit", clock=clock, boot=BOOT)
    made = make_checkpoints(log, await log.open(), key, clock=clock)  # type: ignore[arg-type]
    await made.start()
    key.away = True
    await pass_a_minute(clock)
    assert made.trouble == "token is away"
    key.away = False
    await pass_a_minute(clock)
    await until(lambda: not made.trouble)
    assert len(checkpoints_of(tmp_path / "audit")) == 2
    await made.close()
    await log.close()


async def test_a_device_that_signs_too_late_breaks_no_log(tmp_path: Path) -> None:
    class Slow(Failing):
        def __init__(self) -> None:
            super().__init__()
            self.asked, self.go = asyncio.Event(), asyncio.Event()
            self.go.set()

        async def sign(self, digest: bytes, options: SignOptions) -> bytes:
            self.asked.set()
            await self.go.wait()
            return await super().sign(digest, options)

    clock, key = SimClock(), Slow()
    log = make_log(tmp_path / "audit", clock=clock, boot=BOOT, max_bytes=1 << 26)
    made = make_checkpoints(log, await log.open(), key, clock=clock)  # type: ignore[arg-type]
    await made.start()
    key.asked.clear()
    key.go.clear()
    await pass_a_minute(clock)
    await key.asked.wait()
    for _ in range(RECENT // 1000 + 1):
        seqs = await log.intend([intent(n) for n in range(500)])
        log.conclude([Outcome(seq, "done") for seq in seqs])
    key.go.set()
    await until_there_are(tmp_path / "audit", 2)  # not that one, the next
    await until(lambda: not made.trouble)
    await made.close()
    await log.close()
    assert codes(verify(tmp_path / "audit", key.public_key)) == set()
    again = make_log(tmp_path / "audit", clock=clock, boot=BOOT)
    await again.open()
    await again.close()


async def test_a_file_elsewhere_gets_each_and_knows_an_old_log(tmp_path: Path) -> None:
    key, copy = make_key(), tmp_path / "copy.log"
    directory = tmp_path / "audit"
    clock = SimClock()
    place = FilePlace(copy, clock=clock, log=get_logger("audit"))

    async def once(notes: int) -> None:
        log = make_log(directory)
        made = make_checkpoints(log, await log.open(), key, places=[place])
        try:
            await made.start()
            for _ in range(notes):
                log.note("something", {})
            await made.close()
        finally:
            await log.close()

    await once(5)
    (name,) = (one.name for one in directory.glob("audit-*.log"))
    old = (directory / name).read_bytes()
    await once(5)
    assert [parse(x) for x in copy.read_bytes().splitlines()] == checkpoints_of(directory)
    newest = (directory / name).read_bytes()
    (directory / name).write_bytes(old)
    with pytest.raises(NotReadyError, match=r"has seen more than this log.*an older one was put"):
        await once(0)
    (directory / name).unlink()
    with pytest.raises(NotReadyError, match="is of another log"):
        await once(0)
    (directory / name).write_bytes(newest)
    copy.write_bytes(copy.read_bytes()[:-40])
    await once(1)
    assert copy.read_bytes().splitlines()[-1] == checkpoints_of_last(directory)


def checkpoints_of_last(directory: Path) -> bytes:
    found = [line.rstrip(b"\n") for line in read_all(directory) if b'"kind":"checkpoint"' in line]
    return found[-1]


async def test_a_place_that_is_no_checkpoint_file_is_refused(tmp_path: Path) -> None:
    place = FilePlace(tmp_path / "copy", clock=SimClock(), log=get_logger("audit"))
    assert await place.last() is None
    (tmp_path / "copy").write_bytes(b"torn")
    assert await place.last() is None
    (tmp_path / "copy").write_bytes(b"something else\n")
    with pytest.raises(NotReadyError, match="its last line"):
        await place.last()


async def test_a_place_that_is_away_holds_nothing_up(tmp_path: Path) -> None:
    clock = SimClock()
    place = FilePlace(tmp_path / "no" / "copy", clock=clock, log=get_logger("audit"))
    task = asyncio.ensure_future(place.run())  # noqa: TID251 - is cancelled below
    for number in range(MAX_WAITING + 5):
        place.push(b"%d" % number)
    with pytest.raises(UnavailableError, match="cannot be written"):
        await place.flush()
    await until(lambda: place.trouble)
    (tmp_path / "no").mkdir()
    await clock.advance(timedelta(seconds=2))
    await until(lambda: not place.trouble)
    lines = (tmp_path / "no" / "copy").read_bytes().splitlines()
    assert lines == [b"%d" % n for n in range(5, MAX_WAITING + 5)]
    task.cancel()


async def test_syslog_gets_the_record_as_it_stands(tmp_path: Path) -> None:
    key = make_key()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "log"))
        receiver.setblocking(False)
        settings = SyslogSettings("unix", path=str(tmp_path / "log"))
        place = SyslogPlace(settings, clock=SimClock(), log=get_logger("audit"))
        log = make_log(tmp_path / "audit")
        made = make_checkpoints(log, await log.open(), key, places=[place])
        await made.start()
        async with asyncio.timeout(10):
            data = await asyncio.get_running_loop().sock_recv(receiver, 65536)
        await made.close()
        await log.close()
    head, _, rest = data.partition(b" - ")
    assert head.startswith(b"<38>1 ")
    assert b" spire-hw-signer " in head
    assert json.loads(rest) == json.loads(checkpoint_lines(tmp_path / "audit")[0])
    assert await place.last() is None


def checkpoint_lines(directory: Path) -> list[bytes]:
    return [line for line in read_all(directory) if b'"kind":"checkpoint"' in line]


class Wall(SimClock):
    """A clock whose wall somebody moves."""

    def jump(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)


@pytest.mark.parametrize(("jump_s", "way"), [(301, "ahead"), (-301, "back")])
async def test_a_clock_that_jumps_is_not_believed_until_it_is_right(
    tmp_path: Path, jump_s: float, way: str
) -> None:
    clock, key = Wall(), make_key()
    log = make_log(tmp_path / "audit", clock=clock, boot=BOOT)
    made = make_checkpoints(log, await log.open(), key, clock=clock)
    await made.start()
    clock.jump(299)
    assert not made.clock_fault
    clock.jump(-299 + jump_s)
    assert f"went {way} by 301 s" in made.clock_fault
    await pass_a_minute(clock)
    found = await until_there_are(tmp_path / "audit", 2)
    assert way in found[1].body["clock"]
    assert made.clock_fault
    clock.jump(-jump_s)
    assert not made.clock_fault
    clock.jump(jump_s)
    made.accept_clock()
    assert not made.clock_fault
    await made.close()
    await log.close()


@pytest.mark.parametrize(
    ("boot", "jump_s", "fault"),
    [
        (BOOT, 3600, True),
        (BOOT, -3600, True),
        (BOOT, 60, False),
        (NEXT_BOOT, -3600, True),
        (NEXT_BOOT, 3600, False),
    ],
)
async def test_the_last_checkpoint_counts_over_restarts(
    tmp_path: Path, boot: str, jump_s: float, fault: bool
) -> None:
    clock, key = Wall(), make_key()
    for number in range(2):
        log = make_log(tmp_path / "audit", clock=clock, boot=boot if number else BOOT)
        made = make_checkpoints(log, await log.open(), key, clock=clock)
        await made.start()
        assert bool(made.clock_fault) is (fault and number == 1)
        await made.close()
        await log.close()
        clock.jump(jump_s)


async def test_settings_of_syslog_are_values() -> None:
    assert replace(SyslogSettings("udp", "h", 514), facility=3).facility == 3
