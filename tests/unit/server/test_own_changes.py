"""What a server wrote itself reaches its caches from memory, in order, mixed with what others wrote."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import structlog

from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import Change, ChangeKind, Node
from spire_hw_server.datastore.sql.events import Recent
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.entries import EntryCache
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_server.datastore.interface import Datastore

TD = TrustDomain("example.org")
LOG = structlog.get_logger()


def agent(name: str) -> SpiffeId:
    return TD.member("spire", "agent", "tpm", name)


def make_node(name: str, *selectors: str) -> Node:
    chosen = tuple(Selector.parse(s) for s in selectors)
    return Node(agent(name), "tpm", "1", datetime(2027, 1, 1, tzinfo=UTC), selectors=chosen)


def change(number: int) -> Change:
    return Change(number, ChangeKind.NODE, str(number))


def seen(cache: EntryCache, name: str) -> list[str]:
    return sorted(str(s) for s in cache.node_selectors(agent(name)))


@pytest_asyncio.fixture
async def stores(tmp_path: Path) -> AsyncIterator[tuple[Datastore, Datastore]]:
    """Two servers over the same database."""
    config = DatastoreConfig("sqlite3", str(tmp_path / "d"))
    ours = await open_datastore(config, clock=SimClock(), log=LOG)
    theirs = await open_datastore(config, clock=SimClock(), log=LOG)
    yield ours, theirs
    await ours.close()
    await theirs.close()


@pytest_asyncio.fixture
async def cache(stores: tuple[Datastore, Datastore]) -> AsyncIterator[EntryCache]:
    cache = EntryCache(stores[0], trust_domain=TD, clock=SimClock(), log=LOG)
    await cache.start()
    yield cache
    await cache.close()


def test_numbers_with_a_gap_begin_anew() -> None:
    recent = Recent(limit=4)
    recent.add([change(3), change(4)])
    recent.add([change(5)])
    assert [c.event_id for c in recent.since(2)] == [3, 4, 5]
    assert [c.event_id for c in recent.since(4)] == [5]
    assert recent.since(5) == recent.since(9) == recent.since(1) == []
    recent.add([change(7)])
    assert recent.since(4) == []
    assert [c.event_id for c in recent.since(6)] == [7]
    recent.add([change(2)])  # a backup was restored
    assert recent.since(6) == []
    assert [c.event_id for c in recent.since(1)] == [2]


def test_only_so_many_are_remembered() -> None:
    recent = Recent(limit=4)
    for number in range(1, 100):
        recent.add([change(number)])
        assert len(recent.since(max(0, number - 4))) == min(number, 4)
    assert recent.since(50) == []


@pytest.mark.asyncio
async def test_own_changes_carry_the_node_and_skip_the_database(
    stores: tuple[Datastore, Datastore], cache: EntryCache
) -> None:
    ours, _ = stores
    node = await ours.put_node(make_node("a", "tpm:x"))
    assert ours.recent_changes(0) == [Change(1, ChangeKind.NODE, node.agent_id.text, node)]
    await cache.refresh_own()
    assert seen(cache, "a") == ["tpm:x"]
    await ours.ban_node(node.agent_id)
    await cache.refresh_own()
    assert seen(cache, "a") == []
    assert ours.recent_changes(1)[0].node == await ours.get_node(node.agent_id)
    await ours.delete_node(node.agent_id)
    assert ours.recent_changes(2) == [Change(3, ChangeKind.NODE, node.agent_id.text)]
    await ours.put_node(replace(node, selectors=(Selector.parse("tpm:y"),)))
    await cache.refresh_own()
    assert seen(cache, "a") == ["tpm:y"]


@pytest.mark.asyncio
async def test_changes_of_another_server_between_own_ones_are_read(
    stores: tuple[Datastore, Datastore], cache: EntryCache
) -> None:
    ours, theirs = stores
    await ours.put_node(make_node("a", "tpm:x"))
    await theirs.ban_node(agent("a"))
    await theirs.put_node(make_node("b", "tpm:z"))
    await ours.put_node(make_node("c", "tpm:w"))
    await cache.refresh_own()
    assert [seen(cache, name) for name in "abc"] == [[], ["tpm:z"], ["tpm:w"]]
