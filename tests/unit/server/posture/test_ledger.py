"""What is known of nodes, over a real store: good heartbeats, IMA lists that grow, what is damaged."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import structlog

from spire_hw.posture.evidence import (
    BootFacts,
    Counters,
    EkFacts,
    Evidence,
    ImaEntry,
    ImaFacts,
    ImaState,
    Occasion,
    Tier,
)
from spire_hw.posture.verdict import Action, Check, NodeState, Verdict
from spire_hw.spiffeid import SpiffeId, TrustDomain, agent_id
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import Node, Page, PostureUpdate
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.posture.history import update
from spire_hw_server.posture.judge import NodeJudge
from spire_hw_server.posture.ledger import Ledger
from spire_hw_server.posture.policies import Policies
from spire_hw_server.postureconfig import PostureSettings
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.posture.outcome import Outcome

pytestmark = pytest.mark.asyncio

TD = TrustDomain("example.org")
NODE = agent_id(TD, "tpm", "aa" * 32)
LOG = structlog.get_logger()
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
PCRS = {("sha256", n): bytes([n + 1]) * 32 for n in range(16)}
BOOT = BootFacts(log_sha256="ab" * 32, bank="sha256", explained=(0, 4, 7))


def entry(number: int) -> ImaEntry:
    return ImaEntry(b"/bin/%d" % number, "sha256", bytes([number % 256]) * 32, "ima-ng")


def ima(start: int, *numbers: int) -> ImaFacts:
    count = start + len(numbers)
    state = ImaState(count, bytes([count % 256]) * 32, b"d" * 32)
    return ImaFacts(start, state, tuple(entry(n) for n in numbers))


def evidence(clock: SimClock, **changes: Any) -> Evidence:
    passed = clock.monotonic()
    counters = Counters(1000 + round(passed * 1000), 7, 0, safe=True, firmware_version=1)
    plain = Evidence(
        made_at=clock.now(),
        occasion=Occasion.HEARTBEAT,
        tier=Tier.QUOTE,
        ek=EkFacts("aa" * 32, ("ca",)),
        ak_public=b"AK",
        counters=counters,
        pcrs=PCRS,
        boot_id="one",
    )
    return replace(plain, **changes)


class Desk:
    """A ledger and a judge over one store."""

    def __init__(self, store: Datastore, clock: SimClock) -> None:
        self.store = store
        self.clock = clock
        self.anew()

    def anew(self) -> None:
        """Forget what is in memory, as a server does that is started again."""
        policies = Policies(store=self.store, policy_dir=None, clock=self.clock, log=LOG)
        self.ledger = Ledger(self.store, clock=self.clock, log=LOG)
        self.judge = NodeJudge(
            self.store,
            self.ledger,
            policies,
            PostureSettings(given=True),
            clock=self.clock,
            log=LOG,
            on_change=lambda _: None,
        )

    async def show(self, shown: Evidence) -> Outcome:
        """Let evidence come, and do with it what a heartbeat does."""
        known = await self.ledger.get(NODE)
        outcome = self.judge.assess(known, shown, None)
        if known is not None and outcome.is_routine and outcome.memory is not None:
            self.ledger.sighted(NODE, known, outcome.memory, outcome.evidence)
        else:
            await self.judge.record(NODE, outcome, "heartbeat")
        return outcome

    async def paths(self) -> list[bytes]:
        return [e.path for e in await self.ledger.ima_entries(NODE)]


@pytest_asyncio.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    clock = SimClock(NOW)
    config = DatastoreConfig("sqlite3", str(tmp_path / "d"))
    store = await open_datastore(config, clock=clock, log=LOG)
    await store.put_node(Node(NODE, "tpm", "1", NOW + timedelta(hours=1)))
    yield Desk(store, clock)
    await store.close()


async def test_good_heartbeats_are_written_together_and_survive(desk: Desk) -> None:
    await desk.show(evidence(desk.clock))
    changes = await desk.store.last_change()
    await desk.clock.advance(timedelta(minutes=1))
    await desk.show(evidence(desk.clock))
    stored = await desk.store.get_posture(NODE)
    assert stored is not None
    assert stored.last_good_at == NOW
    await desk.ledger.flush()
    assert await desk.store.last_change() == changes
    desk.anew()
    known = await desk.ledger.get(NODE)
    assert known is not None
    assert known.memory is not None
    assert known.memory.last == replace(evidence(desk.clock))
    assert known.posture.last_good_at == desk.clock.now()
    page = await desk.store.list_evidence(NODE, Page())
    assert len(page.records) == 1


async def test_what_was_not_written_yet_counts_although_the_node_changed(desk: Desk) -> None:
    await desk.show(evidence(desk.clock))
    await desk.clock.advance(timedelta(minutes=1))
    await desk.show(evidence(desk.clock))
    desk.ledger.forget(NODE)
    known = await desk.ledger.get(NODE)
    assert known is not None
    assert known.memory is not None
    assert known.memory.last.made_at == desk.clock.now()


async def test_facts_of_the_boot_log_stay_while_the_boot_lasts(desk: Desk) -> None:
    await desk.show(evidence(desk.clock, boot=BOOT))
    await desk.clock.advance(timedelta(minutes=1))
    outcome = await desk.show(evidence(desk.clock))
    assert outcome.evidence.boot == BOOT
    assert outcome.is_routine
    await desk.clock.advance(timedelta(minutes=1))
    other = dict(PCRS) | {("sha256", 4): b"x" * 32}
    changed = desk.judge.assess(await desk.ledger.get(NODE), evidence(desk.clock, pcrs=other), None)
    assert changed.evidence.boot is None


async def test_ima_list_grows_part_by_part_and_is_put_together(desk: Desk) -> None:
    await desk.show(evidence(desk.clock, ima=ima(0, 1, 2)))
    await desk.ledger.flush()
    for number in range(3, 43):
        await desk.clock.advance(timedelta(minutes=1))
        await desk.show(evidence(desk.clock, ima=ima(number - 1, number)))
        await desk.ledger.flush()
    wanted = [b"/bin/%d" % n for n in range(1, 43)]
    assert await desk.paths() == wanted
    assert len(await desk.store.list_ima(NODE)) < 40
    desk.anew()
    assert await desk.paths() == wanted
    known = await desk.ledger.get(NODE)
    assert known is not None
    assert known.memory is not None
    assert known.memory.ima == ima(41, 42).state


async def test_entries_that_wait_are_stored_with_whatever_comes_next(desk: Desk) -> None:
    await desk.show(evidence(desk.clock, ima=ima(0, 1)))
    await desk.clock.advance(timedelta(minutes=1))
    await desk.show(evidence(desk.clock, ima=ima(1, 2)))
    await desk.clock.advance(timedelta(minutes=1))
    # A change of a PCR is no routine: it is stored at once, with all that waits.
    other = dict(PCRS) | {("sha256", 15): b"x" * 32}
    await desk.show(evidence(desk.clock, pcrs=other, ima=ima(2, 3)))
    desk.anew()
    assert await desk.paths() == [b"/bin/1", b"/bin/2", b"/bin/3"]


async def test_new_boot_starts_a_new_list(desk: Desk) -> None:
    await desk.show(evidence(desk.clock, ima=ima(0, 1, 2)))
    await desk.clock.advance(timedelta(minutes=1))
    counters = replace(evidence(desk.clock).counters or Counters(0, 0, 0, False, 0), reset_count=8)
    shown = evidence(desk.clock, counters=counters, boot_id="two", ima=ima(0, 9))
    await desk.show(shown)
    desk.anew()
    assert await desk.paths() == [b"/bin/9"]
    assert len((await desk.store.list_evidence(NODE, Page())).records) == 2


async def test_bad_entries_are_not_taken_into_the_list(desk: Desk) -> None:
    await desk.show(evidence(desk.clock, ima=ima(0, 1)))
    await desk.clock.advance(timedelta(minutes=1))
    known = await desk.ledger.get(NODE)
    assert known is not None
    good = desk.judge.assess(known, evidence(desk.clock, ima=ima(1, 2)), None)
    check = Check("ima", False, "ima: a file is unknown", "ima_unknown_file", Action.QUARANTINE)
    bad = replace(
        good,
        verdict=Verdict("", 0, "", (check,)),
        standing=replace(good.standing, state=NodeState.QUARANTINED, reasons=(check.code,)),
        memory=known.memory,
    )
    await desk.judge.record(NODE, bad, "heartbeat")
    desk.anew()
    assert await desk.paths() == [b"/bin/1"]
    known = await desk.ledger.get(NODE)
    assert known is not None
    assert known.memory is not None
    assert known.memory.ima == ima(0, 1).state


async def test_machines_that_booted_the_same_share_its_facts(desk: Desk) -> None:
    one = desk.ledger.shared(evidence(desk.clock, boot=BOOT))
    two = desk.ledger.shared(evidence(desk.clock, boot=replace(BOOT)))
    assert one.boot is two.boot
    lying = desk.ledger.shared(evidence(desk.clock, boot=replace(BOOT, secure_boot=True)))
    assert lying.boot is not None
    assert lying.boot.secure_boot


@pytest.mark.parametrize(
    ("column", "value"),
    [("evidence", b"not deflated"), ("memory", "{}"), ("memory", '{"version":9}'), ("memory", "")],
)
async def test_what_cannot_be_read_is_as_if_it_had_never_been(
    desk: Desk, tmp_path: Path, column: str, value: object
) -> None:
    await desk.show(evidence(desk.clock))
    with closing(sqlite3.connect(tmp_path / "d")) as raw, raw:
        raw.execute(f"UPDATE node_postures SET {column} = ?", (value,))  # noqa: S608 - ours
    desk.anew()
    known = await desk.ledger.get(NODE)
    assert known is not None
    assert known.memory is None
    assert known.standing.state is NodeState.ATTESTED


async def test_large_evidence_is_kept_by_its_digest_alone(desk: Desk) -> None:
    many = tuple(
        entry(n)._replace(digest=hashlib.sha256(b"%d" % n).digest(), path=b"/%d" % n)
        for n in range(20_000)
    )
    state = ImaState(len(many), b"p" * 32, b"d" * 32)
    shown = evidence(desk.clock, ima=ImaFacts(0, state, many))
    outcome = desk.judge.assess(None, shown, None)
    made: PostureUpdate = update(NODE, outcome, "attestation")
    assert made.record is not None
    assert made.record.document is None
    assert len(made.record.evidence_sha256) == 64
    assert made.ima is not None


async def test_ledger_keeps_a_bounded_number_of_nodes(desk: Desk) -> None:
    small = Ledger(desk.store, clock=desk.clock, log=LOG, limit=2)
    ids: list[SpiffeId] = []
    for name in ("b", "c", "d"):
        ids.append(agent_id(TD, "tpm", name * 64))
        await desk.store.put_node(Node(ids[-1], "tpm", "1", NOW + timedelta(hours=1)))
        outcome = desk.judge.assess(None, evidence(desk.clock), None)
        await desk.store.set_posture(update(ids[-1], outcome, "heartbeat"))
    first = [await small.get(i) for i in ids]
    again = [await small.get(i) for i in ids[1:]]
    assert again[0] is first[1]
    assert again[1] is first[2]
    assert await small.get(ids[0]) is not first[0]
