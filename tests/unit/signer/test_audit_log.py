"""The audit log: durable before anything is done, repaired after a crash, never rewritten."""

from __future__ import annotations

import asyncio
import os
import resource
import stat
import subprocess
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import InvalidInputError, NotReadyError, UnavailableError
from spire_hw_signer.audit.folder import Folder, file_names
from spire_hw_signer.audit.log import LogHead, Outcome, Refused
from spire_hw_signer.audit.record import Kind, Record, parse
from spire_hw_signer.audit.start import BrokenLogError
from spire_hw_sim.auditrig import intent, make_log, read_all, sign_some, verify
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from pathlib import Path

FILE = "audit-0000000000000001.log"
BOOTS = [f"{n}1234567-89ab-cdef-0123-456789abcdef" for n in range(10)]
pytestmark = pytest.mark.asyncio


def records(directory: Path) -> list[Record]:
    return [parse(line.rstrip(b"\n")) for line in read_all(directory)]


def kinds(directory: Path) -> list[str]:
    return [record.kind.value for record in records(directory)]


async def test_what_is_intended_is_on_the_disk_first(tmp_path: Path) -> None:
    log = make_log(tmp_path / "audit")
    await log.open()
    seqs = await log.intend([intent(1), intent(2)])
    assert [r.seq for r in records(tmp_path / "audit") if r.kind is Kind.INTENT] == seqs
    assert log.head.seq == seqs[-1]
    head = log.conclude([Outcome(seqs[0], "done"), Outcome(seqs[1], "failed", "device away")])
    assert head == log.head
    log.refuse([Refused(intent(), "rate", 5, count=9)])
    log.note("policy_loaded", {"policy": "p" * 600})
    await log.close()
    expected = ["start", "note", "intent", "intent", "outcome", "outcome", "refusal", "note"]
    assert kinds(tmp_path / "audit") == expected
    made = records(tmp_path / "audit")
    assert (made[5].body["intent"], made[5].body["reason"]) == (seqs[1], "device away")
    assert (made[6].body["class"], made[6].body["count"]) == (5, 9)
    assert len(made[7].body["fields"]["policy"]) < 600
    assert verify(tmp_path / "audit").findings == []


async def test_room_is_taken_ahead_and_given_back(tmp_path: Path) -> None:
    log = make_log(tmp_path / "audit", max_bytes=8 * 1024)
    await log.open()
    (first,) = file_names(tmp_path / "audit")
    if not fallocates(tmp_path):
        pytest.skip("the file system sets no room aside")
    assert log.reserve(1)
    assert not log.reserve(3), "with what is kept for one already, that goes beyond the file"
    begun = log.begin([intent()], reserved=True)
    log.conclude([Outcome(seq, "done") for seq in await log.on_disk(begun)])
    held = (tmp_path / "audit" / first).stat()
    assert held.st_blocks * 512 > held.st_size + 64 * 1024
    while len(file_names(tmp_path / "audit")) < 2:
        had_room = log.reserve(1)
        begun = log.begin([intent()], reserved=had_room)
        log.conclude([Outcome(seq, "done") for seq in await log.on_disk(begun)])
    assert not had_room, "a new file has none yet"
    assert log.reserve(1)
    log.conclude([Outcome(seq, "done") for seq in await log.intend([intent()])])
    await log.close()
    assert not log.reserve(1)
    for name in file_names(tmp_path / "audit"):
        left = (tmp_path / "audit" / name).stat()
        assert left.st_blocks * 512 < left.st_size + 16 * 1024
    assert verify(tmp_path / "audit").findings == []


async def test_what_is_cut_off_takes_the_room_with_it(tmp_path: Path) -> None:
    if not fallocates(tmp_path):
        pytest.skip("the file system sets no room aside")
    folder = Folder(tmp_path / "audit")
    folder.hold()
    folder.append(FILE, b"1\n")
    assert folder.room
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, hard))
    try:
        # A part is written, the rest is not.
        with pytest.raises(OSError, match="File too large"):
            folder.append(FILE, b"22\n")
        # What was written is cut off, and still there is no place for the rest.
        with pytest.raises(OSError, match="File too large"):
            folder.append(FILE, b"22\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.room == 0
    folder.append(FILE, b"22\n")
    assert folder.room
    folder.release()
    assert (tmp_path / "audit" / FILE).read_bytes() == b"1\n22\n"


@pytest.mark.parametrize("damage", [b"1\nforeign\n", b"1"])
async def test_what_somebody_else_did_is_left_when_room_is_given_back(
    tmp_path: Path, damage: bytes
) -> None:
    folder = Folder(tmp_path / "audit")
    folder.hold()
    folder.append(FILE, b"1\n")
    path = tmp_path / "audit" / FILE
    path.write_bytes(damage)
    folder.release()
    assert path.read_bytes() == damage


def fallocates(directory: Path) -> bool:
    """Tell whether blocks can be taken beyond the end of a file."""
    place = directory / "probe"
    place.touch()
    tool = subprocess.run(  # noqa: S603
        ["fallocate", "--keep-size", "--length", "65536", str(place)],  # noqa: S607
        check=False,
        capture_output=True,
    )
    return tool.returncode == 0


async def test_heads_that_are_handed_out_are_on_the_disk(tmp_path: Path) -> None:
    log = make_log(tmp_path / "audit")
    await log.open()
    for number in range(5):
        seqs = await log.intend([intent(number)])
        head = log.conclude([Outcome(seqs[0], "done")])
        assert head.seq <= len(read_all(tmp_path / "audit"))
        assert head.seq >= seqs[0]
        assert await log.hash_at(head.seq) == head.hash
    assert await log.hash_at(10_000) is None
    await log.close()


async def test_many_callers_share_writes_and_keep_one_order(tmp_path: Path) -> None:
    log = make_log(tmp_path / "audit")
    await log.open()

    async def caller(number: int) -> None:
        for _ in range(10):
            seqs = await log.intend([intent(number), intent(number)])
            log.conclude([Outcome(seq, "done") for seq in seqs])

    await asyncio.gather(*(caller(n) for n in range(16)))
    await log.close()
    report = verify(tmp_path / "audit")
    assert report.findings == []
    assert (report.kinds["intent"], report.kinds["outcome"], report.open) == (320, 320, 0)


async def test_files_and_directory_are_the_users_alone(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "audit"
    log = make_log(directory)
    await log.open()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for one in directory.iterdir():
        assert stat.S_IMODE(one.stat().st_mode) == 0o600
    await log.close()
    directory.chmod(0o755)
    with pytest.raises(NotReadyError, match="chmod 0700"):
        await make_log(directory).open()


async def test_a_file_whose_name_is_not_on_the_disk_takes_nothing(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "audit")
    folder.hold()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    try:
        # Room for the file, none for its directory.
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
        for _ in range(2):
            with pytest.raises(OSError, match="Too many open files"):
                folder.append("audit-1.log", b"x\n")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (folder.path / "audit-1.log").read_bytes() == b""
    folder.append("audit-1.log", b"x\n")
    assert (folder.path / "audit-1.log").read_bytes() == b"x\n"
    folder.release()


async def test_one_writer(tmp_path: Path) -> None:
    first = make_log(tmp_path / "audit")
    await first.open()
    second = make_log(tmp_path / "audit")
    with pytest.raises(UnavailableError, match="in use by another process"):
        await second.open()
    await second.close()
    await first.close()
    third = make_log(tmp_path / "audit")
    await third.open()
    await third.close()


async def test_a_log_is_opened_once_and_refuses_while_it_is_not(tmp_path: Path) -> None:
    log = make_log(tmp_path / "audit")
    with pytest.raises(UnavailableError, match="audit log unavailable: it is not open"):
        await log.intend([intent()])
    await log.open()
    with pytest.raises(NotReadyError, match="opened before"):
        await log.open()
    assert await log.intend([]) == []
    await log.close()
    with pytest.raises(UnavailableError, match="it is closed"):
        await log.intend([intent()])


async def test_only_open_intents_are_concluded(tmp_path: Path) -> None:
    log = make_log(tmp_path / "audit")
    await log.open()
    (seq,) = await log.intend([intent()])
    log.conclude([Outcome(seq, "done")])
    for wrong in (seq, 1, 99):
        with pytest.raises(InvalidInputError, match="no open intent"):
            log.conclude([Outcome(wrong, "done")])
    with pytest.raises(InvalidInputError, match=r"not a word"):
        log.note("Not A Word", {})
    with pytest.raises(InvalidInputError, match="own"):
        log.note("opened", {})
    await log.close()
    assert verify(tmp_path / "audit").findings == []


async def test_a_caller_that_goes_away_leaves_a_failed_intent(tmp_path: Path) -> None:
    log = make_log(tmp_path / "audit")
    await log.open()
    task = asyncio.ensure_future(log.intend([intent()]))  # noqa: TID251 - is cancelled below
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await log.close()
    last = records(tmp_path / "audit")[-1]
    assert (last.kind, last.body["result"]) == (Kind.OUTCOME, "failed")
    assert last.body["reason"] == "the caller went away"


async def test_rotation_carries_head_and_open_intents_over(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    log = make_log(directory, max_bytes=4000)
    await log.open()
    held = await log.intend([intent()])
    await sign_some(log, 20)
    names = file_names(directory)
    assert len(names) > 3
    log.conclude([Outcome(held[0], "done")])
    await log.close()
    report = verify(directory)
    assert report.findings == []
    assert (report.open, report.files) == (0, len(file_names(directory)))
    for name in names:
        first = parse((directory / name).read_bytes().splitlines()[0])
        assert name == f"audit-{first.seq:016d}.log"
        assert first.kind is (Kind.START if first.seq == 1 else Kind.ROTATION)
        if first.kind is Kind.ROTATION:
            assert first.body["open"][0] == held[0]
    assert stat.S_IMODE((directory / names[0]).stat().st_mode) == 0o400
    again = make_log(directory, max_bytes=4000)
    await again.open()
    assert again.head.seq > report.head.seq
    assert await again.hash_at(held[0]) is not None
    await again.close()


async def test_files_begin_anew_with_age(tmp_path: Path) -> None:
    clock = SimClock()
    log = make_log(tmp_path / "audit", clock=clock, boot=BOOTS[0])
    await log.open()
    await sign_some(log, 1)
    await clock.advance(timedelta(days=1))
    await sign_some(log, 1)
    await log.close()
    assert len(file_names(tmp_path / "audit")) == 2
    assert verify(tmp_path / "audit").findings == []


async def test_intents_without_outcome_are_told_at_the_next_start(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    log = make_log(directory)
    await log.open()
    seqs = await log.intend([intent(1), intent(2)])
    await log.close()
    again = make_log(directory)
    found = await again.open()
    assert list(found.chain.open) == []
    await sign_some(again, 1)
    await again.close()
    unknown = [r for r in records(directory) if r.body.get("result") == "unknown"]
    assert [r.body["intent"] for r in unknown] == seqs
    report = verify(directory)
    assert (report.findings, report.unknown) == ([], 2)


async def test_the_monotonic_clock_never_goes_back_within_a_boot(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    clock = SimClock()
    await clock.advance(timedelta(hours=1))
    for one, boot in ((clock, BOOTS[0]), (SimClock(), BOOTS[0]), (SimClock(), BOOTS[1])):
        log = make_log(directory, clock=one, boot=boot)
        await log.open()
        await log.close()
    made = records(directory)
    assert made[-1].mono == 0
    assert [r.mono for r in made[:-1]] == [3_600_000_000] * (len(made) - 1)
    assert verify(directory).findings == []


async def test_a_torn_last_record_is_cut_off_and_told(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    log = make_log(directory)
    await log.open()
    await sign_some(log, 2)
    await log.close()
    (name,) = file_names(directory)
    path = directory / name
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in (1, len(last) // 2, len(last) - 1):
        path.write_bytes(whole[:-cut])
        again = make_log(directory)
        found = await again.open()
        assert found.torn is not None
        assert found.torn["bytes"] == len(last) - cut
        await again.close()
        report = verify(directory)
        assert {f.code for f in report.findings} == {"recovery"}
        assert report.verdict.value == "holds"
        recovery = next(r for r in records(directory) if r.kind is Kind.RECOVERY)
        assert bytes.fromhex(recovery.body["content"]) == last[: len(last) - cut]


async def test_more_than_one_bad_record_stops_the_start(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    log = make_log(directory)
    await log.open()
    await sign_some(log, 2)
    await log.close()
    path = directory / file_names(directory)[0]
    whole = path.read_bytes()
    path.write_bytes(whole + b"garbage\nmore\n")
    with pytest.raises(BrokenLogError, match=r"line \d+: .* log seal") as e:
        await make_log(directory).open()
    assert e.value.chain.head.seq == len(whole.splitlines())
    assert path.read_bytes() == whole + b"garbage\nmore\n"
    path.write_bytes(whole + b"garbage\n")
    again = make_log(directory)
    await again.open()
    await again.close()
    assert verify(directory).verdict.value == "holds"


async def test_a_new_file_without_its_first_record_is_given_up(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    log = make_log(directory, max_bytes=4000)
    await log.open()
    await sign_some(log, 10)
    await log.close()
    newest = directory / file_names(directory)[-1]
    for content in (b"", b'{"boot'):
        newest.chmod(0o400)
        (directory / "audit-0000000000009999.log").write_bytes(content)
        report = verify(directory)
        assert (report.verdict.value, {f.code for f in report.findings}) == ("holds", {"torn"})
        again = make_log(directory, max_bytes=4000)
        await again.open()
        assert stat.S_IMODE(newest.stat().st_mode) == 0o600
        await again.close()
        assert verify(directory).verdict.value == "holds"


async def test_a_file_that_does_not_continue_the_one_before_it(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    log = make_log(directory, max_bytes=4000)
    await log.open()
    await sign_some(log, 10)
    await log.close()
    names = file_names(directory)
    before = directory / names[-2]
    lines = before.read_bytes().splitlines(keepends=True)
    before.chmod(0o600)
    before.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(BrokenLogError, match="does not continue"):
        await make_log(directory).open()


@pytest.mark.parametrize("damage", ["grown", "cut", "deleted"])
async def test_somebody_elses_hand_is_noticed_at_the_next_write(
    tmp_path: Path, damage: str
) -> None:
    directory = tmp_path / "audit"
    log = make_log(directory)
    await log.open()
    path = directory / file_names(directory)[0]
    match damage:
        case "grown":
            path.write_bytes(path.read_bytes() + b"x")
        case "cut":
            path.write_bytes(path.read_bytes()[:-10])
        case _:
            path.unlink()
    with pytest.raises(UnavailableError, match=r"audit log unavailable: .*(changed|deleted)"):
        await log.intend([intent()])
    assert log.trouble
    with pytest.raises(UnavailableError):
        await log.intend([intent()])
    await log.close()


async def test_an_empty_log_has_the_empty_head() -> None:
    assert str(LogHead()) == f"0:{'0' * 64}"
