"""The audit log of a signer under full disks, crashes and hands that change it; orders that lie."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import secrets
import sys
import urllib.request
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from spire_hw._pb import hw_signer_admin_pb2 as pb
from spire_hw._pb import hw_signer_pb2 as signer_pb
from spire_hw.clock import SystemClock
from spire_hw.errors import ErrorKind, NotReadyError, SpireHwError, UnavailableError
from spire_hw.log import get_logger
from spire_hw.rpc.client import connect_unix
from spire_hw_signer.audit.chain import LogHead
from spire_hw_signer.audit.folder import file_names
from spire_hw_signer.audit.log import AuditLog, Outcome, Refused
from spire_hw_signer.audit.places import FilePlace
from spire_hw_signer.audit.record import Kind, parse
from spire_hw_signer.audit.seal import examine, seal
from spire_hw_signer.audit.start import BrokenLogError
from spire_hw_signer.audit.verify import Verdict, Witness
from spire_hw_signer.orders import Action, Order, SignedOrder
from spire_hw_signer.policyfile import load_policy
from spire_hw_sim.auditrig import (
    codes,
    intent,
    make_checkpoints,
    make_key,
    make_log,
    read_all,
    sign_some,
    until,
    verify,
    write_whole,
)
from spire_hw_sim.disks import CannotMountError, fill, read_only, small_disk
from spire_hw_sim.signer import CLIENT_ID, SignerRig, client_policy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from spire_hw_signer.audit.record import Record

pytestmark = pytest.mark.asyncio
DIGEST: Final = bytes(range(32))
KILLS: Final = 8
ADMIN: Final = "/spire_hw.signer.v1.SignerAdmin/"
NAMES: Final = ("alice", "bob", "carol")
FILE: Final = "audit-0000000000000001.log"


def records(directory: Path) -> list[Record]:
    return [parse(line.rstrip(b"\n")) for line in read_all(directory)]


# -- 108: the disk takes nothing ---------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of its own with room for half a megabyte."""
    try:
        with small_disk(tmp_path / "disk") as place:
            yield place
    except CannotMountError as e:
        pytest.skip(f"needs the right to mount: {e}")


async def fill_slack(log: AuditLog) -> UnavailableError:
    """Have things done until what the log had set aside is full, too; return the refusal."""
    for number in range(1000):
        try:
            (seq,) = await log.intend([intent(number)])
        except UnavailableError as e:
            return e
        log.conclude([Outcome(seq, "done")])
    raise AssertionError("the disk is not full")


async def test_fault_108_a_full_disk_refuses_and_recovers_by_itself(disk: Path) -> None:
    directory = disk / "audit"
    log = make_log(directory)
    await log.open()
    await sign_some(log, 5)
    filler = fill(disk)
    refusal = await fill_slack(log)
    assert refusal.message.startswith("audit log unavailable: No space left on device; make room")
    before = log.head
    with pytest.raises(UnavailableError, match="audit log unavailable"):
        await log.intend([intent(), intent()])
    log.refuse([Refused(intent(), "rate", 5)] * 3)
    log.note("policy_loaded", {})
    assert log.head == before
    whole = [parse(line) for line in b"".join(read_all(directory)).split(b"\n")[: before.seq]]
    assert whole[-1].seq == before.seq
    filler.unlink()
    await until(lambda: not log.trouble)
    (seq,) = await log.intend([intent()])
    log.conclude([Outcome(seq, "done")])
    await log.close()
    report = verify(directory, witnesses=[Witness(before, "a client")])
    assert (report.findings, report.witnessed, report.open) == ([], 1, 0)
    failed = [r for r in records(directory) if r.body.get("reason") == "audit log unavailable"]
    assert len(failed) == 1
    again = next(r for r in records(directory) if r.body.get("event") == "log_available")
    assert again.body["fields"]["lost"] == "3"


async def test_fault_108_a_disk_that_fills_up_under_many_callers(disk: Path) -> None:
    """Whatever was let through is in the log, whatever is in the log holds."""
    directory = disk / "audit"
    log = make_log(directory, max_bytes=64 * 1024)
    await log.open()
    through: list[int] = []
    refused = 0

    async def caller(number: int) -> None:
        nonlocal refused
        for _ in range(60):
            try:
                (seq,) = await log.intend([intent(number)])
            except UnavailableError:
                refused += 1
                await asyncio.sleep(0)
            else:
                through.append(seq)
                log.conclude([Outcome(seq, "done")])

    await asyncio.gather(*(caller(n) for n in range(16)))
    assert refused > 0
    for name in file_names(directory)[:2]:  # an operator moves old files away
        (directory / name).unlink()
    await until(lambda: not log.trouble)
    await sign_some(log, 1)
    await log.close()
    report = verify(directory)
    assert codes(report) == {"start_missing"}
    assert report.verdict is Verdict.HOLDS
    kept = {r.seq: r for r in records(directory) if r.kind is Kind.INTENT}
    first = min(kept)
    assert set(kept) >= {seq for seq in through if seq >= first}


async def test_fault_108_a_disk_that_is_full_at_the_start(disk: Path) -> None:
    directory = disk / "audit"
    await write_whole(directory, make_key(), rounds=1)
    filler = fill(disk)
    log = make_log(directory)
    with contextlib.suppress(UnavailableError):
        await log.open()
        await fill_slack(log)
    assert log.trouble
    await log.close()
    filler.unlink()
    again = make_log(directory)
    await again.open()
    await again.close()
    assert verify(directory).verdict is Verdict.HOLDS


async def test_fault_108_a_limit_of_the_file_size(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    log = make_log(directory)
    await log.open()
    await sign_some(log, 2)
    size = (directory / FILE).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
    try:
        with pytest.raises(UnavailableError, match=r"File too large; raise the limit"):
            await log.intend([intent()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await until(lambda: not log.trouble)
    await log.close()
    assert verify(directory).findings == []


async def test_fault_108_a_read_only_file_system(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    await write_whole(directory, make_key(), rounds=1)
    log = make_log(directory)
    try:
        with read_only(directory):
            with pytest.raises(NotReadyError, match="cannot be used: Read-only file system"):
                await log.open()
            await log.close()
    except CannotMountError as e:
        pytest.skip(f"needs the right to mount: {e}")
    assert verify(directory).findings == []


async def test_fault_108_a_signer_signs_nothing_it_cannot_write_down(
    tmp_path: Path, disk: Path
) -> None:
    more = f'audit {{ directory = "{disk}/audit" }}'
    policy = client_policy(raw="true")
    async with SignerRig(tmp_path / "s", keys="disk", policy=policy, more=more) as rig:
        await rig.generate("x509-CA-A")
        filler = fill(disk)
        refused = False
        for _ in range(1000):
            result = await rig.sign("x509-CA-A", digest=DIGEST)
            if result.refusal.code:
                refused = True
                break
        assert refused
        assert result.refusal.code == ErrorKind.UNAVAILABLE.value
        assert "audit log unavailable" in result.refusal.message
        assert not result.signature
        request = signer_pb.AttestOwnKeyRequest(key_id="x509-CA-A", nonce=bytes(16))
        channel, attest = await rig.channel(), "/spire_hw.signer.v1.Custody/AttestOwnKey"
        with pytest.raises(SpireHwError) as caught:
            await channel.unary(attest, request, signer_pb.AttestOwnKeyResponse, timeout_s=20)
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        filler.unlink()
        await until(lambda: not rig.signer.audit.trouble)
        assert (await rig.sign("x509-CA-A", digest=DIGEST)).signature
    assert verify(disk / "audit").findings == []


async def test_fault_108_what_is_signed_while_the_disk_fails_does_not_leave(tmp_path: Path) -> None:
    """There was room, so the device signed while the record was written; the write failed."""
    policy = client_policy(raw="true")
    async with SignerRig(tmp_path / "s", keys="disk", policy=policy) as rig:
        await rig.generate("x509-CA-A")
        log = rig.signer.audit
        has_room = log.reserve(1)
        begun = log.begin([intent()], reserved=has_room)
        (seq,) = await log.on_disk(begun)
        if not has_room:
            pytest.skip("the file system sets no room aside")
        log.conclude([Outcome(seq, "done")])
        await rig.sign("x509-CA-A", digest=DIGEST)
        # The outcome goes with the next batch; it must not be what the disk refuses.
        await until(lambda: records(log.directory)[-1].kind is Kind.OUTCOME)
        before = log.head
        size = max(one.stat().st_size for one in log.directory.glob("*.log"))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
        try:
            result = await rig.sign("x509-CA-A", digest=DIGEST)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not result.signature
        assert result.refusal.code == ErrorKind.UNAVAILABLE.value
        assert "audit log unavailable: File too large" in result.refusal.message
        await until(lambda: not log.trouble)
        assert (await rig.sign("x509-CA-A", digest=DIGEST)).signature
    assert verify(log.directory).findings == []
    since = [r for r in records(log.directory) if r.seq > before.seq and r.kind is Kind.OUTCOME]
    reasons = [r.body["reason"] for r in since if r.body["result"] == "failed"]
    assert reasons == ["audit log unavailable"]


async def test_fault_108_a_log_that_fails_once_room_is_kept_says_so_in_the_end(
    tmp_path: Path,
) -> None:
    log = make_log(tmp_path / "audit")
    await log.open()
    if not log.reserve(2):
        pytest.skip("the file system sets no room aside")
    (file,) = log.directory.glob("*.log")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, hard))
    try:
        log.note("policy_loaded", {})
        await until(lambda: bool(log.trouble))
        # The device was asked for these two; it may have signed, and nothing of it leaves.
        with pytest.raises(UnavailableError, match="File too large"):
            log.begin([intent(1), intent(2)], reserved=True)
        with pytest.raises(UnavailableError, match="File too large"):
            log.begin([intent(3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await until(lambda: not log.trouble)
    # What was kept was given back: as much can be kept as ever.
    kept = 0
    while log.reserve(1):
        kept += 1
    assert kept > 200
    await log.close()
    found = [parse(line.rstrip(b"\n")) for line in read_all(log.directory)]
    intents = [r.seq for r in found if r.kind is Kind.INTENT]
    outcomes = {r.body["intent"]: r.body["reason"] for r in found if r.kind is Kind.OUTCOME}
    assert len(intents) == 2
    assert outcomes == dict.fromkeys(intents, "audit log unavailable")
    with pytest.raises(UnavailableError, match="it is closed"):
        log.begin([intent(4)], reserved=True)


# -- 109, 110: crashes -------------------------------------------------------------------------


async def kill_while_writing(directory: Path, after: int) -> LogHead:
    """Run a process that writes, kill it some records later; return the last head it promised."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "spire_hw_sim.auditrig",
        str(directory),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    heads: list[LogHead] = []
    while len(heads) < after:
        line = await process.stdout.readline()
        assert line, "the writer ended by itself"
        heads += heads_in(line)
    process.kill()
    heads += heads_in(await process.stdout.read())
    await process.wait()
    return heads[-1]


def heads_in(output: bytes) -> list[LogHead]:
    """Return the heads among whole lines; others are the process's log."""
    words = [line.partition(b":") for line in output.splitlines()]
    return [LogHead(int(s), bytes.fromhex(h.decode())) for s, _, h in words if len(h) == 64]


@pytest.mark.slow
async def test_fault_109_killed_again_and_again_the_chain_holds(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    seen: list[Witness] = []
    for number in range(KILLS):
        head = await kill_while_writing(directory, 1 + secrets.randbelow(25))
        seen.append(Witness(head, f"run {number}"))
        report = verify(directory, witnesses=seen)
        assert report.verdict is Verdict.HOLDS, report.findings
        assert report.witnessed == len(seen)
    log = make_log(directory)
    await log.open()
    await log.close()
    report = verify(directory, witnesses=seen)
    assert (report.verdict, report.open) == (Verdict.HOLDS, 0)
    assert codes(report) <= {"recovery"}
    outcomes = [r.body["intent"] for r in records(directory) if r.kind is Kind.OUTCOME]
    assert len(outcomes) == len(set(outcomes)) == report.kinds["intent"]


async def test_fault_109_a_crash_between_record_and_signature(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    log = make_log(directory)
    await log.open()
    await sign_some(log, 1)
    (seq,) = await log.intend([intent(9)])
    lines = read_all(directory)
    await log.close()
    os.truncate(directory / FILE, sum(map(len, lines)))  # as if killed there
    report = verify(directory)
    assert (report.findings, report.open) == ([], 1)
    again = make_log(directory)
    await again.open()
    await again.close()
    made = [r for r in records(directory) if r.kind is Kind.OUTCOME and r.body["intent"] == seq]
    assert [r.body["result"] for r in made] == ["unknown"]
    report = verify(directory)
    assert (report.findings, report.unknown, report.open) == ([], 1, 0)


async def test_fault_110_the_last_record_torn_at_every_byte(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    await write_whole(directory, make_key(), rounds=1)
    lines = read_all(directory)
    whole = b"".join(lines)
    last = len(lines[-1])
    for missing in (*range(1, last, 37), last - 1):
        (directory / FILE).write_bytes(whole[:-missing])
        log = make_log(directory)
        found = await log.open()
        await log.close()
        assert found.torn is not None
        report = verify(directory)
        assert (report.verdict, codes(report)) == (Verdict.HOLDS, {"recovery"})
        assert records(directory)[len(lines)].body["bytes"] == last - missing


async def test_fault_110_two_bad_records_stop_the_start_until_sealed(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    await write_whole(directory, make_key(), rounds=1)
    lines = read_all(directory)
    content = b"".join(lines[:-2]) + b"\x00" * 100 + b"\n" + lines[-1][:50]
    (directory / FILE).write_bytes(content)
    with pytest.raises(BrokenLogError, match=r"log verify .* log seal"):
        await make_log(directory).open()
    assert (directory / FILE).read_bytes() == content
    damage = examine(directory)
    seal(directory, damage, operators=["uid=0"], comment="disk", clock=SystemClock())
    log = make_log(directory)
    await log.open()
    await log.close()
    assert (directory / FILE).read_bytes() == content
    assert verify(directory).verdict is Verdict.SEALED


# -- 111: somebody changes the log --------------------------------------------------------------


async def test_fault_111_the_start_finds_a_change_at_every_record(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    await write_whole(directory, make_key(), rounds=2)
    lines = read_all(directory)
    for place in range(len(lines) - 2):
        changes = {
            "taken out": lines[:place] + lines[place + 1 :],
            "doubled": [*lines[: place + 1], *lines[place:]],
            "swapped": [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]],
            "edited": [*lines[:place], lines[place].replace(b"2", b"3"), *lines[place + 1 :]],
        }
        for what, changed in changes.items():
            (directory / FILE).write_bytes(b"".join(changed))
            log = make_log(directory)
            with pytest.raises(BrokenLogError):
                await log.open()
            await log.close()
            assert verify(directory).verdict is Verdict.BROKEN, (what, place)


async def test_fault_111_cut_or_put_back_the_other_place_knows(tmp_path: Path) -> None:
    """A log that ends early holds in itself; at every boundary the copy elsewhere tells."""
    directory, key = tmp_path / "audit", make_key()
    copy = FilePlace(tmp_path / "copy", clock=SystemClock(), log=get_logger("audit"))

    async def run() -> None:
        log = make_log(directory)
        try:
            made = make_checkpoints(log, await log.open(), key, places=[copy])
            await made.start()
            await sign_some(log, 2)
            await made.close()
        finally:
            await log.close()

    await run()
    known = (tmp_path / "copy").read_bytes()
    lines = read_all(directory)
    last = json.loads(known.splitlines()[-1])["at"]
    for place in range(1, last - 3):
        (directory / FILE).write_bytes(b"".join(lines[:place]))
        with pytest.raises(NotReadyError, match=r"audit log does not hold: .* cut off"):
            await run()
        (tmp_path / "copy").write_bytes(known)
    (directory / FILE).write_bytes(b"".join(lines))
    await run()


async def test_fault_111_a_signer_with_an_old_log_does_not_start(tmp_path: Path) -> None:
    more = f'audit {{ checkpoint_file = "{tmp_path}/copy" }}'
    rig = SignerRig(tmp_path / "s", keys="disk", policy=client_policy(raw="true"), more=more)
    audit = tmp_path / "s" / "data" / "audit"
    async with rig:
        await rig.generate("x509-CA-A")
    old = (audit / FILE).read_bytes()
    await rig.restart()
    assert (await rig.sign("x509-CA-A", digest=DIGEST)).signature
    await rig.hang_up()
    await rig.stop()
    (audit / FILE).write_bytes(old)
    with pytest.raises(NotReadyError, match="an older one was put back"):
        await rig.restart()


# -- 113: the clock -----------------------------------------------------------------------------


class WallClock(SystemClock):
    """The machine's time, with a wall clock that somebody sets."""

    ahead = timedelta()

    def now(self) -> datetime:  # type: ignore[explicit-override]
        return datetime.now(UTC) + self.ahead  # noqa: TID251 - a clock


async def test_fault_113_over_a_restart_the_last_checkpoint_tells(tmp_path: Path) -> None:
    clock = WallClock()
    rig = SignerRig(tmp_path / "s", keys="disk", policy=client_policy(raw="true"), clock=clock)
    async with rig:
        await rig.generate("x509-CA-A")
    clock.ahead = timedelta(minutes=-6)
    await rig.restart()
    status = await ask(rig, "GetStatus", pb.GetStatusRequest(), pb.Status)
    assert "went back by 360 s" in status.clock_fault.replace("359 s", "360 s")
    done = await direct(rig, Action.CLOCK_ACCEPT)
    assert done.message.startswith("the clock is right")
    status = await ask(rig, "GetStatus", pb.GetStatusRequest(), pb.Status)
    assert not status.clock_fault
    await rig.stop()
    assert verify(tmp_path / "s" / "data" / "audit").findings == []


async def test_fault_113_a_clock_that_was_ahead_leaves_nothing_behind(tmp_path: Path) -> None:
    clock = WallClock()
    clock.ahead = timedelta(hours=20)
    text = client_policy(raw="true", active_window='"1s"', sign_rate='{ "*" = "100/s burst 2" }')
    rig = SignerRig(tmp_path / "s", keys="disk", policy=text, clock=clock)
    now = datetime.now(UTC)  # noqa: TID251 - real certificates
    rig.identity = rig.authority.identity(
        CLIENT_ID, start=now - timedelta(hours=1), end=now + timedelta(hours=23)
    )
    async with rig:
        assert not (await rig.generate("x509-CA-A")).refusal.reason
        assert (await rig.sign("x509-CA-A", digest=bytes(32))).signature
        clock.ahead = timedelta()
        await direct(rig, Action.CLOCK_ACCEPT)
        for _ in range(5):  # rates go on, and the key is not in use for 20 hours
            await asyncio.sleep(0.02)
            assert (await rig.sign("x509-CA-A", digest=bytes(32))).signature
        await asyncio.sleep(1.1)
        assert not (await rig.generate("x509-CA-A")).refusal.reason
        await rig.restart()
        status = await ask(rig, "GetStatus", pb.GetStatusRequest(), pb.Status)
        assert not status.clock_fault
        assert not rig.signer._clock_fault()
        assert not (await rig.generate("x509-CA-A")).refusal.reason


# -- 115: orders --------------------------------------------------------------------------------


class Room:
    """A signer whose operators have to agree, two of three."""

    def __init__(self, folder: Path, **how: Any) -> None:
        self.keys = {name: Ed25519PrivateKey.generate() for name in NAMES}
        lines = []
        folder.mkdir()
        for name, key in self.keys.items():
            file = folder / f"{name}.pub"
            file.write_bytes(
                key.public_key().public_bytes(
                    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
                )
            )
            lines.append(f'{name} = "{file}"')
        more = f"operators {{ required = 2 keys {{ {' '.join(lines)} }} }}".replace('" ', '"\n')
        policy = client_policy(raw="true")
        self.rig = SignerRig(folder / "s", policy=policy, more=more.replace("{ ", "{\n"), **how)
        self.audit = folder / "s" / "data" / "audit"

    async def order(self, action: Action, target: str = "", **changes: Any) -> Order:
        status = await ask(self.rig, "GetStatus", pb.GetStatusRequest(), pb.Status)
        made = Order(
            action=action,
            target=target,
            expires=datetime.now(UTC) + timedelta(hours=1),  # noqa: TID251 - real certificates
            log=status.log_id,
            head=LogHead(status.log_head.seq, status.log_head.hash),
            nonce=secrets.token_hex(16),
            comment="in a test",
        )
        return replace(made, **changes)

    def signed(self, order: Order, *names: str) -> SignedOrder:
        made = SignedOrder(order)
        for name in names or ("alice", "bob"):
            made = made.sign(name, self.keys[name])
        return made

    async def submit(self, made: SignedOrder) -> Any:
        request = pb.CarryOutRequest(order=made.encode())
        return await ask(self.rig, "CarryOut", request, pb.CarryOutResponse)

    async def refused(self, made: SignedOrder) -> str:
        """Have an order refused; return the code, which is in the log, too."""
        with pytest.raises(SpireHwError) as caught:
            await self.submit(made)
        assert caught.value.kind is ErrorKind.PERMISSION_DENIED
        code = caught.value.message.rpartition("[")[2].rstrip("]")
        written = [r for r in records(self.audit) if r.kind is Kind.ORDER][-1]
        assert (written.body["accepted"], written.body["reason"]) == (0, code)
        assert written.body["nonce"] == made.order.nonce
        return code


async def ask(rig: SignerRig, method: str, request: Any, answer: Any) -> Any:
    async with connect_unix(rig.admin_socket) as channel:
        return await channel.unary(ADMIN + method, request, answer, timeout_s=20)


async def direct(rig: SignerRig, action: Action, target: str = "") -> Any:
    request = pb.CarryOutRequest(
        direct=pb.CarryOutRequest.Direct(action=action.value, target=target)
    )
    return await ask(rig, "CarryOut", request, pb.CarryOutResponse)


@contextlib.asynccontextmanager
async def room_of(folder: Path, **how: Any) -> AsyncIterator[Room]:
    room = Room(folder, **how)
    async with room.rig:
        yield room
    assert verify(room.audit).findings == []


@pytest.mark.hsm
async def test_fault_115_orders_that_are_refused_leave_the_keys(tmp_path: Path) -> None:
    async with room_of(tmp_path / "r") as room:
        first = (await room.rig.generate("x509-CA-A")).public_key.fingerprint
        second = (await room.rig.generate("x509-CA-A")).public_key.fingerprint
        target = await retained(room.rig)
        restore, destroy = Action.KEY_RESTORE, Action.KEY_DESTROY
        order = await room.order(destroy, target)
        assert await room.refused(SignedOrder(order)) == "too_few"
        assert await room.refused(room.signed(order, "alice")) == "too_few"
        mallory = Ed25519PrivateKey.generate()
        forged = room.signed(order).sign("mallory", mallory)
        assert await room.refused(forged) == "unknown_operator"
        twice = SignedOrder(order).sign("alice", room.keys["alice"])
        assert await room.refused(twice.sign("bob", room.keys["alice"])) == "signature"
        for changes, code in (
            ({"expires": datetime(2020, 1, 1, tzinfo=UTC)}, "expired"),
            ({"expires": order.expires + timedelta(days=8)}, "too_long"),
            ({"head": LogHead(order.head.seq, bytes(32))}, "other_head"),
            ({"head": LogHead(10**9, order.head.hash)}, "other_head"),
            ({"log": "0" * 32}, "other_log"),
        ):
            assert await room.refused(room.signed(replace(order, **changes))) == code
        with pytest.raises(SpireHwError, match=r"needs an order signed by 2 of alice, bob, carol"):
            await direct(room.rig, destroy, target)
        assert await fingerprints(room.rig) == {first: True, second: False}
        # What two have signed is done, once.
        made = room.signed(await room.order(restore, target), "carol", "bob")
        done = await room.submit(made)
        assert done.message.startswith(f"x509-CA-A is {first} again")
        assert await fingerprints(room.rig) == {first: False, second: True}
        assert await room.refused(made) == "replayed"
        assert (await room.rig.sign("x509-CA-A", digest=DIGEST)).fingerprint == first
        # Nor after a restart.
        await room.rig.restart()
        assert await room.refused(made) == "replayed"
        gone = room.signed(await room.order(destroy, await retained(room.rig)))
        assert "is destroyed" in (await room.submit(gone)).message
        assert await fingerprints(room.rig) == {first: False}


async def retained(rig: SignerRig) -> str:
    """Return the replaced generation as orders name it."""
    listed = await ask(rig, "ListKeys", pb.ListKeysRequest(), pb.ListKeysResponse)
    (key,) = (key for key in listed.keys if key.retained)
    return f"{key.owner}/{key.public_key.id}@{key.generation}"


async def fingerprints(rig: SignerRig) -> dict[str, bool]:
    """Return all keys; the replaced ones are true."""
    listed = await ask(rig, "ListKeys", pb.ListKeysRequest(), pb.ListKeysResponse)
    return {key.public_key.fingerprint: key.retained for key in listed.keys}


async def test_fault_115_one_operator_may_shut_out_but_not_let_in(tmp_path: Path) -> None:
    async with room_of(tmp_path / "r", keys="disk") as room:
        await room.rig.generate("x509-CA-A")
        client = "spiffe://infra.example/spire-server-1"
        await direct(room.rig, Action.CLIENT_REVOKE, client)
        for again in (False, True):
            if again:
                await room.rig.restart()
            with pytest.raises(SpireHwError) as caught:
                await room.rig.sign("x509-CA-A", digest=DIGEST)
            assert caught.value.kind is ErrorKind.UNAUTHENTICATED
        with pytest.raises(SpireHwError, match="no_order"):
            await direct(room.rig, Action.CLIENT_UNREVOKE, client)
        await room.submit(room.signed(await room.order(Action.CLIENT_UNREVOKE, client)))
        assert (await room.rig.sign("x509-CA-A", digest=DIGEST)).signature


async def test_fault_115_the_policy_that_was_signed_and_no_other(tmp_path: Path) -> None:
    async with room_of(tmp_path / "r", keys="disk") as room:
        before = room.rig.signer.live.policy.hash
        room.rig.write_policy(client_policy(raw="true", max_in_flight="9"))
        wanted = load_policy(room.rig.policy_file).hash
        room.rig.write_policy(client_policy(raw="true", max_in_flight="10"))
        order = await room.order(Action.POLICY_RELOAD, wanted)
        with pytest.raises(SpireHwError, match="what was in force stays"):
            await room.submit(room.signed(order))
        assert room.rig.signer.live.policy.hash == before
        room.rig.write_policy(client_policy(raw="true", max_in_flight="9"))
        again = await room.order(Action.POLICY_RELOAD, wanted)
        assert wanted in (await room.submit(room.signed(again))).message
        assert room.rig.signer.live.policy.hash == wanted


async def test_fault_115_refused_orders_and_policies_without_one_are_alarms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room = Room(tmp_path / "r", keys="disk")
    telemetry = "telemetry { Prometheus { port = 0 } }"
    room.rig.config_file.write_text(f"{room.rig.config_file.read_text()}\n{telemetry}\n")
    room.rig.signer = room.rig._signer()
    async with room.rig:
        with pytest.raises(SpireHwError, match="no_order"):
            await direct(room.rig, Action.POLICY_RELOAD, "")
        order = await room.order(Action.POLICY_RELOAD)
        assert await room.refused(SignedOrder(order)) == "too_few"
        # The same policy again, and one that an order puts in force, change nothing by a signal.
        assert await room.rig.signer.reload()
        room.rig.write_policy(client_policy(raw="true", max_in_flight="9"))
        await room.submit(room.signed(order))
        capsys.readouterr()
        room.rig.write_policy(client_policy(raw="true", max_in_flight="10"))
        assert await room.rig.signer.reload()
        assert "the policy was changed without an order" in "".join(capsys.readouterr())
        metrics = await asyncio.to_thread(_metrics, room.rig.signer.telemetry.port)
    alarms = re.findall(r'^spire_signer_alarm{.*reason="(\w+)".*} (\d+)', metrics, re.MULTILINE)
    assert dict(alarms) == {"no_order": "2", "too_few": "1"}
    loaded = [
        one
        for file in room.audit.glob("audit-*.log")
        for one in map(json.loads, file.read_text().splitlines())
        if one.get("event") == "policy_loaded"
    ]
    assert [one["fields"]["by"] for one in loaded] == ["start", "SIGHUP", "order", "SIGHUP"]


def _metrics(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return bytes(answer.read()).decode()


async def test_fault_115_expiries_are_not_judged_by_a_clock_that_jumped(tmp_path: Path) -> None:
    clock = WallClock()
    async with room_of(tmp_path / "r", keys="disk", clock=clock) as room:
        order = await room.order(Action.POLICY_RELOAD)
        clock.ahead = timedelta(minutes=-10)
        assert await room.refused(room.signed(order)) == "clock"
        accept = room.signed(await room.order(Action.CLOCK_ACCEPT))
        assert "is right" in (await room.submit(accept)).message
        assert "the policy is" in (await room.submit(room.signed(order))).message


async def test_fault_115_files_that_are_no_order_are_told(tmp_path: Path) -> None:
    async with room_of(tmp_path / "r", keys="disk") as room:
        whole = room.signed(await room.order(Action.POLICY_RELOAD)).encode()
        for bad in (b"", b"{}", whole[:-2], whole.replace(b'"seq":', b'"seq": '), b"\xff" * 100):
            with pytest.raises(SpireHwError, match="order") as caught:
                await ask(room.rig, "CarryOut", pb.CarryOutRequest(order=bad), pb.CarryOutResponse)
            assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
