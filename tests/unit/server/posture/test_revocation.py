"""Looking at certificates again, over a real store: attestors that misbehave, nodes that change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import structlog

from spire_hw.errors import ErrorKind, Finding, InvalidInputError
from spire_hw.spiffeid import TrustDomain, agent_id
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import Node
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.posture.judge import NodeJudge
from spire_hw_server.posture.ledger import Ledger
from spire_hw_server.posture.policies import Policies
from spire_hw_server.posture.revocation import Revocation
from spire_hw_server.postureconfig import PostureSettings
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.records import Certificates

pytestmark = pytest.mark.asyncio

TD = TrustDomain("example.org")
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
FIRST, SECOND = agent_id(TD, "tpm", "aa" * 32), agent_id(TD, "tpm", "bb" * 32)
REVOKED = Finding("ek_revoked", "ek: certificate is revoked", ErrorKind.PERMISSION_DENIED)


class Maker:
    """An attestor whose lists have what a test says."""

    def __init__(self) -> None:
        self.version = 1
        self.revoked = {b"bad"}
        self.asked: list[bytes] = []
        self.while_asked: Callable[[bytes], Awaitable[None]] | None = None

    async def lists_version(self) -> int | None:
        return self.version

    async def recheck(self, certificates: Certificates) -> list[Finding]:
        ((der,),) = certificates
        self.asked.append(der)
        if self.while_asked is not None:
            await self.while_asked(der)
        return [REVOKED] if der in self.revoked else []


class Desk:
    """A store with nodes, and who looks at them."""

    def __init__(self, store: Datastore, clock: SimClock) -> None:
        self.store = store
        self.maker = Maker()
        settings, log = PostureSettings(given=True), structlog.get_logger()
        policies = Policies(store=store, policy_dir=None, clock=clock, log=log)
        ledger = Ledger(store, clock=clock, log=log)
        judge = NodeJudge(
            store, ledger, policies, settings, clock=clock, log=log, on_change=lambda _: None
        )
        self.revocation = Revocation(store, ledger, judge, settings, clock=clock, log=log)
        self.revocation.use({"tpm": self.maker})

    async def let_in(self, who: SpiffeId, der: bytes) -> None:
        node = Node(who, "tpm", "1", NOW + timedelta(hours=1))
        await self.store.put_node(node, certificates=((der,),))

    async def quarantine(self, who: SpiffeId) -> str:
        return (await self.store.get_node(who)).quarantine


@pytest.fixture
def clock() -> SimClock:
    return SimClock(NOW)


@pytest_asyncio.fixture
async def desk(tmp_path: Path, clock: SimClock) -> AsyncIterator[Desk]:
    config = DatastoreConfig("sqlite3", str(tmp_path / "d"))
    store = await open_datastore(config, clock=clock, log=structlog.get_logger())
    yield Desk(store, clock)
    await store.close()


async def test_an_attestor_that_breaks_down_over_one_node_spares_no_other(desk: Desk) -> None:
    await desk.let_in(FIRST, b"odd")
    await desk.let_in(SECOND, b"bad")

    async def break_down(der: bytes) -> None:
        if der == b"odd":
            raise ZeroDivisionError

    desk.maker.while_asked = break_down
    await desk.revocation.look()
    assert [await desk.quarantine(who) for who in (FIRST, SECOND)] == ["", "ek_revoked"]
    with pytest.raises(InvalidInputError, match=r"nodeattestor\(tpm\): failed unexpectedly"):
        await desk.revocation.findings(FIRST)


async def test_who_came_back_with_another_certificate_meanwhile_stays_in(desk: Desk) -> None:
    await desk.let_in(FIRST, b"bad")

    async def come_back(der: bytes) -> None:
        if der == b"bad":
            await desk.store.delete_node(FIRST)
            await desk.let_in(FIRST, b"good")

    desk.maker.while_asked = come_back
    await desk.revocation.look()
    assert desk.maker.asked == [b"bad", b"good"]
    assert await desk.quarantine(FIRST) == ""


async def test_nodes_are_looked_at_at_a_change_and_once_more_later(
    desk: Desk, clock: SimClock
) -> None:
    await desk.let_in(FIRST, b"good")
    looks = []
    for _ in range(10):
        desk.maker.asked.clear()
        await desk.revocation.look()
        looks.append(len(desk.maker.asked))
        if len(looks) == 2:
            desk.maker.version += 1
        await clock.advance(timedelta(seconds=60))
    # At the start, at the change, and after what was under way then has ended.
    assert looks == [1, 0, 1, 0, 0, 1, 0, 0, 0, 0]
