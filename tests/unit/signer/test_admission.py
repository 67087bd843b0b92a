"""Refusals in the audit log: few for many, and nobody goes under among strangers."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.errors import UnavailableError
from spire_hw.log import get_logger
from spire_hw.telemetry.metrics import NO_METRICS
from spire_hw_signer.admission import Gate
from spire_hw_signer.audit.record import Kind, parse
from spire_hw_signer.policy import Denial, Policy, Reason
from spire_hw_sim.auditrig import intent, make_log, read_all
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_signer.audit.log import AuditLog
    from spire_hw_signer.audit.record import Record

pytestmark = pytest.mark.asyncio
POLICY = Policy({}, frozenset(), timedelta(minutes=2), "0" * 64)
NO_KEY = Denial(Reason.NO_KEY, "not found")
TBS = Denial(Reason.TBS, "another trust domain")


@pytest_asyncio.fixture
async def log(tmp_path: Path) -> AsyncIterator[AuditLog]:
    made = make_log(tmp_path / "audit")
    await made.open()
    yield made
    await made.close()


def gate_of(log: AuditLog, clock: SimClock) -> Gate:
    return Gate(lambda: POLICY, log, metrics=NO_METRICS, clock=clock, log=get_logger("test"))


async def refusals(log: AuditLog) -> list[Record]:
    await log.intend([intent()])  # what was refused before goes to the disk with it
    made = [parse(line.rstrip(b"\n")) for line in read_all(log.directory)]
    return [record for record in made if record.kind is Kind.REFUSAL]


async def test_what_a_client_tries_does_not_go_under_among_strangers(log: AuditLog) -> None:
    gate = gate_of(log, SimClock())
    for number in range(200):
        gate.stranger(f"192.0.2.{number}", UnavailableError("no certificate"))
    gate.refuse(intent(), TBS)
    found = await refusals(log)
    assert len(found) == 51
    assert found[-1].body["reason"] == "tbs_policy"


async def test_nor_among_key_ids_that_it_makes_up(log: AuditLog) -> None:
    gate = gate_of(log, SimClock())
    for number in range(200):
        gate.refuse(intent(key_id=f"x509-CA-{number}"), NO_KEY)
    gate.refuse(intent(), TBS)
    assert [r.body["reason"] for r in await refusals(log)] == ["no_key", "tbs_policy"]


async def test_a_record_tells_how_many_it_stands_for(log: AuditLog) -> None:
    clock = SimClock()
    gate = gate_of(log, clock)
    for _ in range(2):
        for _ in range(5):
            gate.refuse(intent(), TBS)
        await clock.advance(timedelta(seconds=1))
    assert [r.body["count"] for r in await refusals(log)] == [1, 5]
