"""What a verification finds: any change at any record, and a log that others know better."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from spire_hw.clock import SystemClock
from spire_hw.errors import NotReadyError, UnavailableError
from spire_hw_signer.audit.chain import LogHead
from spire_hw_signer.audit.folder import file_names
from spire_hw_signer.audit.log import Outcome
from spire_hw_signer.audit.record import Kind, encode, parse
from spire_hw_signer.audit.seal import examine, seal
from spire_hw_signer.audit.start import BrokenLogError
from spire_hw_signer.audit.verify import Verdict, Witness
from spire_hw_sim.auditrig import (
    codes,
    intent,
    make_key,
    make_log,
    read_all,
    sign_some,
    verify,
    write_whole,
)

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_signer.audit.record import Record

pytestmark = pytest.mark.asyncio
NAME = "audit-0000000000000001.log"


def put(directory: Path, lines: list[bytes]) -> None:
    (directory / NAME).chmod(0o600)
    (directory / NAME).write_bytes(b"".join(lines))


async def test_a_log_of_many_starts_holds(tmp_path: Path) -> None:
    key = make_key()
    await write_whole(tmp_path / "audit", key, max_bytes=4000)
    report = verify(tmp_path / "audit", key.public_key)
    assert (report.findings, report.verdict) == ([], Verdict.HOLDS)
    assert report.files > 2
    assert report.checkpoints == report.kinds["checkpoint"] == 6
    assert report.head.seq == report.records == len(read_all(tmp_path / "audit"))


async def test_every_record_taken_out_doubled_swapped_or_edited_is_found(tmp_path: Path) -> None:
    directory, key = tmp_path / "audit", make_key()
    await write_whole(directory, key, rounds=2)
    lines = read_all(directory)
    for place in range(len(lines) - 1):
        changes = {
            "taken out": lines[:place] + lines[place + 1 :],
            "doubled": [*lines[: place + 1], *lines[place:]],
            "swapped": [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]],
            "edited": [*lines[:place], edited(lines[place]), *lines[place + 1 :]],
            "garbled": [*lines[:place], b"\x00\n", *lines[place + 1 :]],
        }
        for what, changed in changes.items():
            put(directory, changed)
            report = verify(directory)
            assert report.verdict is Verdict.BROKEN, (what, place)
    put(directory, lines)
    assert verify(directory, key.public_key).findings == []


def edited(line: bytes) -> bytes:
    """Return a record that says something else and is well formed."""
    record = parse(line.rstrip(b"\n"))
    members = {"time": "2020-01-01T00:00:00.000000Z"}
    made = type(record)(
        record.seq, members["time"], record.mono, record.boot, record.kind, record.prev, record.body
    )
    return encode(made) + b"\n"


async def test_a_log_cut_short_is_found_by_those_who_saw_more(tmp_path: Path) -> None:
    directory, key = tmp_path / "audit", make_key()
    await write_whole(directory, key)
    lines = read_all(directory)
    head = verify(directory, key.public_key).head
    copies = [r.body for r in map(whole, lines) if r.kind is Kind.CHECKPOINT]
    seen = [Witness(head, "server-1")]
    assert verify(directory, key.public_key, seen, copies).witnessed == 1 + len(copies)
    for place in range(1, len(lines)):
        put(directory, lines[:place])
        report = verify(directory, witnesses=seen)
        assert codes(report) == {"truncated"}
        assert "server-1 saw record" in report.findings[0].message
        if place < copies[-1]["at"]:
            assert "truncated" in codes(verify(directory, copies=copies))


def whole(line: bytes) -> Record:
    return parse(line.rstrip(b"\n"))


async def test_a_log_that_was_rewritten_is_found_by_key_and_witness(tmp_path: Path) -> None:
    honest, other = make_key(), make_key()
    await write_whole(tmp_path / "honest", honest)
    await write_whole(tmp_path / "forged", other)
    head = verify(tmp_path / "honest").head
    forged = tmp_path / "forged"
    assert verify(forged).verdict is Verdict.HOLDS
    assert "signature" in codes(verify(forged, honest.public_key))
    witness = Witness(LogHead(5, (await hash_of(tmp_path / "honest", 5)) or b""), "server-1")
    assert codes(verify(forged, witnesses=[witness])) == {"rewritten"}
    assert head.seq > 5


async def hash_of(directory: Path, seq: int) -> bytes | None:
    log = make_log(directory)
    await log.open()
    found = await log.hash_at(seq)
    await log.close()
    return found


async def test_a_log_without_checkpoints_does_not_pass_with_a_key(tmp_path: Path) -> None:
    log = make_log(tmp_path / "audit")
    await log.open()
    await log.close()
    assert codes(verify(tmp_path / "audit", make_key().public_key)) == {"no_checkpoint"}
    (tmp_path / "empty").mkdir()
    assert codes(verify(tmp_path / "empty")) == {"empty"}


async def test_copies_have_to_be_signed_too(tmp_path: Path) -> None:
    directory, key = tmp_path / "audit", make_key()
    await write_whole(directory, key)
    copies = [dict(r.body) for r in map(whole, read_all(directory)) if r.kind is Kind.CHECKPOINT]
    copies[0]["at"] += 1
    assert codes(verify(directory, key.public_key, copies=copies)) == {"copy_signature"}


async def test_older_files_may_be_taken_away_from_the_start_only(tmp_path: Path) -> None:
    directory, key = tmp_path / "audit", make_key()
    await write_whole(directory, key, max_bytes=3000)
    names = file_names(directory)
    assert len(names) > 3
    content = (directory / names[1]).read_bytes()
    (directory / names[0]).unlink()
    report = verify(directory, key.public_key)
    assert (codes(report), report.verdict) == ({"start_missing"}, Verdict.HOLDS)
    (directory / names[2]).unlink()
    assert verify(directory, key.public_key).verdict is Verdict.BROKEN
    (directory / names[1]).chmod(0o600)
    (directory / names[1]).write_bytes(b"".join(content.splitlines(keepends=True)[1:]))
    assert verify(directory).verdict is Verdict.BROKEN


async def test_repairs_stand_only_after_a_start(tmp_path: Path) -> None:
    """An attacker who lets an outcome be unknown does not pass for a crash."""
    directory = tmp_path / "audit"
    log = make_log(directory)
    await log.open()
    seqs = await log.intend([intent(1)])
    unknown = {"result": "unknown", "reason": "", "latency": 0}
    made = {"intent": seqs[0], "made_generation": 0, "made_fingerprint": "", **unknown}
    await log.record(Kind.OUTCOME, made)
    await log.record(
        Kind.RECOVERY, {"event": "torn", "bytes": 1, "digest": "0" * 64, "content": ""}
    )
    await log.close()
    report = verify(directory)
    assert {f.code for f in report.findings if f.verdict is Verdict.BROKEN} == {"recovery"}


async def test_a_start_that_leaves_intents_open_is_found(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    log = make_log(directory)
    await log.open()
    seqs = await log.intend([intent(1)])
    await log.record(Kind.NOTE, {"event": "opened", "fields": {}})
    log.conclude([Outcome(seqs[0], "done")])
    await log.close()
    assert codes(verify(directory)) == {"recovery"}


@pytest.mark.parametrize("place", [1, 5, 9])
async def test_a_sealed_log_goes_on_and_says_so_for_ever(tmp_path: Path, place: int) -> None:
    directory, key = tmp_path / "audit", make_key()
    await write_whole(directory, key, rounds=2)
    lines = read_all(directory)
    put(directory, lines[:place] + lines[place + 1 :])
    with pytest.raises(BrokenLogError):
        await make_log(directory).open()
    damage = examine(directory)
    assert (damage.is_broken, damage.good.head.seq) == (True, place)
    assert damage.seq > len(lines)
    head = seal(directory, damage, operators=["alice"], comment="looked", clock=SystemClock())
    assert head.seq == damage.seq
    log = make_log(directory)
    await log.open()
    await sign_some(log, 2)
    await log.close()
    report = verify(directory)
    assert report.verdict is Verdict.SEALED
    assert codes(report) >= {"sealed", "gap"}
    assert "sealed by alice: looked" in " ".join(f.message for f in report.findings)
    witness = Witness(LogHead(len(lines), b"\x01" * 32), "server-1")
    assert verify(directory, witnesses=[witness]).verdict is not Verdict.HOLDS
    # What was sealed may not change any more.
    (directory / NAME).chmod(0o600)
    (directory / NAME).write_bytes(b"".join(lines[:place]))
    assert verify(directory).verdict is Verdict.BROKEN


async def test_a_seal_is_not_for_another_state(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    await write_whole(directory, make_key(), rounds=1)
    damage = examine(directory)
    assert not damage.is_broken
    lines = read_all(directory)
    put(directory, lines[:-1])
    with pytest.raises(NotReadyError, match="not as it was"):
        seal(directory, damage, operators=["alice"], comment="x", clock=SystemClock())
    with pytest.raises(NotReadyError, match="no audit log"):
        examine(tmp_path)
    log = make_log(directory)
    await log.open()
    with pytest.raises(UnavailableError, match="in use"):
        seal(directory, damage, operators=["alice"], comment="x", clock=SystemClock())
    await log.close()
