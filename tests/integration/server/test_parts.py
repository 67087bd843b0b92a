"""Parts of the server alone over a real store: node cache, housekeeping, own SVID, health."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.aio.tasks import Tasks
from spire_hw.config.host import HealthSettings
from spire_hw.errors import NotFoundError, NotReadyError, SpireHwError, UnavailableError
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key
from spire_hw.log import get_logger
from spire_hw.rpc.probes import Health, HealthListener
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_server.api.nodes import NodeCache
from spire_hw_server.ca.authority import Issuer
from spire_hw_server.ca.identity import ServerIdentity
from spire_hw_server.ca.profile import Profile
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import Entry, JoinToken, Node
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.housekeeping import Housekeeping, HousekeepingSettings
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_server.datastore.interface import Datastore

pytestmark = pytest.mark.asyncio

TD = TrustDomain("example.org")
LOG = get_logger("test")


@pytest.fixture
def clock() -> SimClock:
    return SimClock()


@pytest.fixture
def config(tmp_path: Path) -> DatastoreConfig:
    return DatastoreConfig("sqlite3", str(tmp_path / "db.sqlite3"))


@pytest_asyncio.fixture
async def store(config: DatastoreConfig, clock: SimClock) -> AsyncIterator[Datastore]:
    opened = await open_datastore(config, clock=clock, log=LOG)
    yield opened
    await opened.close()


def node(clock: SimClock, number: int = 1, **fields: object) -> Node:
    base = Node(
        SpiffeId(f"spiffe://example.org/spire/agent/x/{number}"),
        "x",
        str(number),
        clock.now() + timedelta(hours=1),
    )
    return replace(base, **fields)  # type: ignore[arg-type]


async def test_a_local_change_of_a_node_is_seen_at_once(store: Datastore, clock: SimClock) -> None:
    cache = NodeCache(store, clock=clock, log=LOG)
    await cache.start()
    one = node(clock)
    assert await cache.get(one.agent_id) is None
    await store.put_node(one)
    found = await cache.get(one.agent_id)
    assert found is not None
    assert await cache.get(one.agent_id) is found
    await store.ban_node(one.agent_id)
    banned = await cache.get(one.agent_id)
    assert banned is not None
    assert banned.banned
    await store.delete_node(one.agent_id)
    assert await cache.get(one.agent_id) is None


async def test_another_servers_ban_is_seen_at_the_next_poll(
    config: DatastoreConfig, store: Datastore, clock: SimClock
) -> None:
    other = await open_datastore(config, clock=clock, log=LOG)
    one = node(clock)
    await store.put_node(one)
    cache = NodeCache(store, clock=clock, log=LOG)
    await cache.start()
    assert await cache.get(one.agent_id) is not None
    tasks = Tasks(lambda name, error: None)
    tasks.start("nodes", cache.run())
    await other.ban_node(one.agent_id)
    async with asyncio.timeout(20):
        while True:
            found = await cache.get(one.agent_id)
            if found is not None and found.banned:
                break
            await clock.advance(timedelta(seconds=1))
    await tasks.close()
    await other.close()


async def test_the_node_cache_is_bounded(store: Datastore, clock: SimClock) -> None:
    cache = NodeCache(store, clock=clock, log=LOG, limit=2)
    await cache.start()
    for number in range(4):
        await store.put_node(node(clock, number))
    for number in range(4):
        assert await cache.get(node(clock, number).agent_id) is not None
    assert len(cache._nodes) == 2


async def test_a_store_that_is_away_empties_the_node_cache(
    config: DatastoreConfig, store: Datastore, clock: SimClock
) -> None:
    away = await open_datastore(config, clock=clock, log=LOG)
    await store.put_node(node(clock))
    cache = NodeCache(away, clock=clock, log=LOG)
    await cache.start()
    assert await cache.get(node(clock).agent_id) is not None
    tasks = Tasks(lambda name, error: None)
    tasks.start("nodes", cache.run())
    await away.close()
    async with asyncio.timeout(20):
        while cache._nodes:
            await clock.advance(timedelta(seconds=1))
    with pytest.raises(SpireHwError):
        await cache.get(node(clock).agent_id)
    await tasks.close()


async def test_what_expired_is_deleted(store: Datastore, clock: SimClock) -> None:
    keep = HousekeepingSettings(nodes_after=timedelta(hours=2))
    housekeeping = Housekeeping(store, keep, clock=clock, log=LOG)
    entry = Entry(
        "gone", TD.member("w"), TD.member("p"), (Selector("a", "b"),), expires_at=clock.now()
    )
    await store.create_entry(entry)
    await store.create_join_token(JoinToken("gone", clock.now()))
    await store.put_node(node(clock, 1, can_reattest=True))
    await store.put_node(node(clock, 2))
    await store.put_node(node(clock, 3, can_reattest=True))
    await store.ban_node(node(clock, 3).agent_id)
    await housekeeping.tick()
    assert (await store.get_entry("gone")).entry_id == "gone"
    await clock.advance(timedelta(minutes=6))
    await housekeeping.tick()
    with pytest.raises(NotFoundError):
        await store.get_entry("gone")
    with pytest.raises(NotFoundError):
        await store.take_join_token("gone")
    await clock.advance(timedelta(hours=4))
    await housekeeping.tick()
    with pytest.raises(NotFoundError):
        await store.get_node(node(clock, 1).agent_id)
    assert not (await store.get_node(node(clock, 2).agent_id)).banned
    assert (await store.get_node(node(clock, 3).agent_id)).banned
    await clock.advance(timedelta(hours=13))
    await housekeeping.tick()
    await clock.advance(timedelta(hours=13))
    await housekeeping.tick()
    assert await store.list_changes(0, 10) == []


async def test_housekeeping_goes_on_after_a_failure(
    config: DatastoreConfig, clock: SimClock
) -> None:
    store = await open_datastore(config, clock=clock, log=LOG)
    housekeeping = Housekeeping(store, HousekeepingSettings(), clock=clock, log=LOG)
    await store.close()
    tasks = Tasks(lambda name, error: pytest.fail(f"{name}: {error}"))
    tasks.start("housekeeping", housekeeping.run())
    due = housekeeping._due["entries"]
    await clock.advance(timedelta(minutes=6))
    async with asyncio.timeout(20):
        while housekeeping._due["entries"] == due:
            await clock.advance(timedelta(minutes=1))
    await tasks.close()


async def _issuer(clock: SimClock) -> Issuer:
    issuer = Issuer(Profile(TD), clock)
    signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
    made = await issuer.self_signed(signer, clock.now(), timedelta(hours=24))
    issuer.use_x509(made.certificate, (), signer)
    return issuer


async def test_the_own_svid_is_renewed_at_half_of_its_life(clock: SimClock) -> None:
    identity = ServerIdentity(
        await _issuer(clock), KeyType.EC_P256, is_tainted=lambda _: False, clock=clock, log=LOG
    )
    with pytest.raises(NotReadyError):
        _ = identity.svid
    await identity.renew()
    first = identity.svid
    tasks = Tasks(lambda name, error: pytest.fail(f"{name}: {error}"))
    tasks.start("identity", identity.run())
    await clock.advance(timedelta(minutes=29))
    assert identity.svid is first
    async with asyncio.timeout(20):
        while identity.svid is first:
            await clock.advance(timedelta(seconds=5))
    assert identity.svid.issued_at >= first.issued_at + timedelta(minutes=30)
    assert identity.tls_identity().version == first.tls.version + 1
    assert identity.watch.value is identity.svid
    await tasks.close()


async def test_an_own_svid_that_cannot_be_renewed_is_kept(clock: SimClock) -> None:
    issuer = await _issuer(clock)
    identity = ServerIdentity(
        issuer, KeyType.EC_P256, is_tainted=lambda _: False, clock=clock, log=LOG
    )
    await identity.renew()
    first = identity.svid
    await clock.advance(timedelta(hours=25))
    await identity.tick()
    assert identity.svid is first


async def test_issuing_needs_authorities(clock: SimClock) -> None:
    issuer = Issuer(Profile(TD), clock)
    with pytest.raises(NotReadyError):
        _ = issuer.x509
    spki = b"\x30\x00"
    for attempt in (
        issuer.x509_svid(spki=spki, spiffe_id=TD.member("w"), ttl=timedelta(hours=1)),
        issuer.downstream_ca(spki, timedelta(hours=1)),
        issuer.jwt_svid(spiffe_id=TD.member("w"), audience=["a"], ttl=timedelta(hours=1)),
    ):
        with pytest.raises(SpireHwError, match="active yet"):
            await attempt


async def test_health_tells_what_is_wrong_and_when_it_is_over(clock: SimClock) -> None:
    fault = {"quick": "", "costly": "token is away"}

    async def quick() -> None:
        if fault["quick"]:
            raise UnavailableError(fault["quick"])

    async def costly() -> None:
        if fault["costly"]:
            raise UnavailableError(fault["costly"])

    health = Health(quick={"quick": quick}, costly={"costly": costly}, clock=clock, log=LOG)
    assert await health.faults() == {"costly": "not checked yet", "quick": ""}
    assert await health.is_live()
    tasks = Tasks(lambda name, error: pytest.fail(f"{name}: {error}"))
    tasks.start("health", health.run())
    async with asyncio.timeout(20):
        while (await health.faults())["costly"] != "token is away":
            await clock.advance(timedelta(0))
        assert not await health.is_healthy()
        fault["costly"] = ""
        while not await health.is_healthy():
            await clock.advance(timedelta(seconds=1))
    fault["quick"] = "gone"
    assert not await health.is_live()
    assert not await health.is_healthy()
    await tasks.close()


async def test_a_taken_health_port_is_told(clock: SimClock) -> None:
    health = Health(quick={}, costly={}, clock=clock, log=LOG)
    first = HealthListener(health, HealthSettings("127.0.0.1", 0, "/live", "/ready"))
    await first.start()
    second = HealthListener(health, HealthSettings("127.0.0.1", first.port, "/live", "/ready"))
    with pytest.raises(UnavailableError, match=str(first.port)):
        await second.start()
    await first.close()
