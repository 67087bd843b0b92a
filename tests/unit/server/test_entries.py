from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import structlog
from sqlalchemy import update

from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain, server_id
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import Entry, Node
from spire_hw_server.datastore.sql.dialects import open_engine
from spire_hw_server.datastore.sql.models import counters
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.entries import EntryCache
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_server.datastore.interface import Datastore

TD = TrustDomain("example.org")
AGENT = TD.member("spire", "agent", "tpm", "a")
LOG = structlog.get_logger()


def make_entry(name: str, parent: SpiffeId = AGENT, *selectors: str) -> Entry:
    chosen = tuple(Selector.parse(s) for s in selectors or ("unix:uid:1",))
    return Entry("", TD.member(name), parent, chosen)


def make_node(*selectors: str, serial: str = "1") -> Node:
    chosen = tuple(Selector.parse(s) for s in selectors)
    expires_at = datetime(2027, 1, 1, tzinfo=UTC)
    return Node(AGENT, "tpm", serial, expires_at, selectors=chosen)


def names(cache: EntryCache) -> list[str]:
    return [e.spiffe_id.path[1:] for e in cache.authorized(AGENT).values()]


@pytest.fixture
def clock() -> SimClock:
    return SimClock()


@pytest.fixture
def config(tmp_path: Path) -> DatastoreConfig:
    return DatastoreConfig("sqlite3", str(tmp_path / "d"))


@pytest_asyncio.fixture
async def store(config: DatastoreConfig, clock: SimClock) -> AsyncIterator[Datastore]:
    store = await open_datastore(config, clock=clock, log=LOG)
    yield store
    await store.close()


@pytest_asyncio.fixture
async def other(config: DatastoreConfig, clock: SimClock) -> AsyncIterator[Datastore]:
    """Another server over the same database."""
    store = await open_datastore(config, clock=clock, log=LOG)
    yield store
    await store.close()


@pytest_asyncio.fixture
async def cache(store: Datastore, clock: SimClock) -> AsyncIterator[EntryCache]:
    cache = EntryCache(store, trust_domain=TD, clock=clock, log=LOG, full_reload_s=3600.0)
    await cache.start()
    yield cache
    await cache.close()


@pytest.mark.asyncio
async def test_start_loads_entries_and_nodes(store: Datastore, clock: SimClock) -> None:
    await store.put_node(make_node("tpm:x", "tpm:y"))
    await store.create_entry(make_entry("alias", server_id(TD), "tpm:x"))
    await store.create_entry(make_entry("foreign", server_id(TD), "tpm:x", "tpm:z"))
    await store.create_entry(make_entry("below", TD.member("alias")))
    await store.create_entry(make_entry("hidden", TD.member("foreign")))
    await store.create_entry(make_entry("own"))
    await store.create_entry(make_entry("nested", TD.member("own")))
    cache = EntryCache(store, trust_domain=TD, clock=clock, log=LOG)
    await cache.start()
    assert sorted(names(cache)) == ["below", "nested", "own"]
    assert cache.node_selectors(AGENT) == {Selector("tpm", "x"), Selector("tpm", "y")}
    await cache.close()


@pytest.mark.asyncio
async def test_local_write_wakes_the_cache(store: Datastore, cache: EntryCache) -> None:
    seen = cache.watch.version
    entry = await store.create_entry(make_entry("web"))
    await cache.watch.wait(seen)
    assert names(cache) == ["web"]
    assert cache.entry(entry.entry_id) == entry
    assert cache.by_spiffe_id(entry.spiffe_id) == (entry,)
    await store.delete_entry(entry.entry_id)
    await cache.refresh()
    assert names(cache) == []


@pytest.mark.asyncio
async def test_refresh_sees_what_another_server_committed(
    other: Datastore, cache: EntryCache
) -> None:
    entry = await other.create_entry(make_entry("web"))
    assert names(cache) == []
    await cache.refresh()
    assert names(cache) == ["web"]
    await other.delete_entry(entry.entry_id)
    await cache.refresh()
    assert names(cache) == []


@pytest.mark.asyncio
async def test_poll_sees_what_another_server_committed(
    other: Datastore, cache: EntryCache, clock: SimClock
) -> None:
    await other.create_entry(make_entry("web"))
    seen = cache.watch.version
    await clock.advance(timedelta(seconds=5))
    await cache.watch.wait(seen)
    assert names(cache) == ["web"]


@pytest.mark.asyncio
async def test_answer_stays_the_same_object_until_it_changes(
    store: Datastore, cache: EntryCache
) -> None:
    await store.put_node(make_node("tpm:x"))
    await store.create_entry(make_entry("web"))
    await cache.refresh()
    first = cache.authorized(AGENT)
    version = cache.version
    await store.create_entry(make_entry("elsewhere", TD.member("spire", "agent", "tpm", "b")))
    await cache.refresh()
    assert cache.authorized(AGENT) is first
    assert cache.version > version
    await store.put_node(make_node("tpm:x", serial="2"))
    await cache.refresh()
    assert cache.authorized(AGENT) is first
    await store.create_entry(make_entry("api"))
    await cache.refresh()
    assert len(cache.authorized(AGENT)) == 2
    assert len(first) == 1


@pytest.mark.asyncio
async def test_banned_node_gets_nothing_and_deleted_one_may_return(
    store: Datastore, cache: EntryCache
) -> None:
    await store.put_node(make_node("tpm:x"))
    await store.create_entry(make_entry("web"))
    await store.ban_node(AGENT)
    await cache.refresh()
    assert names(cache) == []
    assert cache.node_selectors(AGENT) == frozenset()
    await store.delete_node(AGENT)
    await cache.refresh()
    assert names(cache) == ["web"]


@pytest.mark.asyncio
async def test_many_changes_at_once_are_applied(store: Datastore, cache: EntryCache) -> None:
    for i in range(150):
        await store.create_entry(make_entry(f"e{i:03}"))
    await cache.refresh()
    assert sorted(names(cache)) == [f"e{i:03}" for i in range(150)]


@pytest.mark.asyncio
async def test_pruned_changes_make_the_cache_load_everything(
    other: Datastore, cache: EntryCache, clock: SimClock
) -> None:
    await other.create_entry(make_entry("lost"))
    await other.create_entry(make_entry("kept"))
    await other.prune_changes(clock.now() + timedelta(days=1))
    await cache.refresh()
    assert sorted(names(cache)) == ["kept", "lost"]
    await other.create_entry(make_entry("later"))
    await cache.refresh()
    assert sorted(names(cache)) == ["kept", "later", "lost"]


@pytest.mark.asyncio
async def test_restored_backup_makes_the_cache_load_everything(
    config: DatastoreConfig, other: Datastore, cache: EntryCache, clock: SimClock
) -> None:
    entry = await other.create_entry(make_entry("web"))
    await cache.refresh()
    await other.delete_entry(entry.entry_id)
    await other.prune_changes(clock.now() + timedelta(days=1))
    engine = open_engine(config, config.connection_string).engine
    with engine.begin() as connection:
        connection.execute(update(counters).values(value=0))
    engine.dispose()
    await cache.refresh()
    assert names(cache) == []


@pytest.mark.asyncio
async def test_everything_is_loaded_anew_after_a_while(
    config: DatastoreConfig, cache: EntryCache, other: Datastore, clock: SimClock
) -> None:
    await other.create_entry(make_entry("web"))
    await cache.refresh()
    engine = open_engine(config, config.connection_string).engine
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")
        connection.exec_driver_sql("DELETE FROM entries")
    engine.dispose()
    await cache.refresh()
    assert names(cache) == ["web"]
    await clock.advance(timedelta(hours=1))
    await cache.refresh()
    assert names(cache) == []


class Failing:
    """A log that counts."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.infos: list[str] = []

    def error(self, message: str, **_: Any) -> None:
        self.errors.append(message)

    def info(self, message: str, **_: Any) -> None:
        self.infos.append(message)


@pytest.mark.asyncio
async def test_store_that_is_away_is_reported_once_and_followed_again(
    config: DatastoreConfig, clock: SimClock
) -> None:
    log: Any = Failing()
    store = await open_datastore(config, clock=clock, log=LOG)
    cache = EntryCache(store, trust_domain=TD, clock=clock, log=log)
    await cache.start()
    await store.close()
    for _ in range(3):
        await clock.advance(timedelta(seconds=5))
    assert log.errors == ["Cannot follow the datastore"]
    assert names(cache) == []
    await cache.close()
