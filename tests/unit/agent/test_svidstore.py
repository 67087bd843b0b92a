"""Outside stores follow the entries of an agent, also when they fail for a while."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.bundle.bundle import Bundle
from spire_hw.errors import UnavailableError
from spire_hw.log import get_logger
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_agent.cache import Cache, Svid
from spire_hw_agent.entry import AgentEntry
from spire_hw_agent.svidstore import SvidStores
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.plugin.svidstore import StoredX509Svid

DOMAIN = TrustDomain("example.org")
WEB = SpiffeId.parse("spiffe://example.org/web")
NOW = datetime(2026, 11, 1, tzinfo=UTC)


class Store:
    """A store in memory that fails on demand."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, ...], StoredX509Svid] = {}
        self.away = False
        self.calls = 0

    async def put_x509_svid(self, svid: StoredX509Svid, metadata: Sequence[str]) -> None:
        self._check()
        self.held[tuple(metadata)] = svid

    async def delete_x509_svid(self, metadata: Sequence[str]) -> None:
        self._check()
        self.held.pop(tuple(metadata), None)

    def _check(self) -> None:
        self.calls += 1
        if self.away:
            raise UnavailableError("the store is away")


def entry(name: str = "web", *, store: bool = True, kind: str = "vault") -> AgentEntry:
    return AgentEntry(
        entry_id="e1",
        spiffe_id=WEB,
        selectors=frozenset({Selector(kind, f"name:{name}"), Selector(kind, "a:b")}),
        federates_with=(),
        hint="",
        revision=1,
        created_at=0,
        store_svid=store,
    )


def svid(serial: bytes = b"leaf") -> Svid:
    end = NOW + timedelta(hours=1)
    return Svid(WEB, (serial,), b"key", end, end, 1)


class Rig:
    def __init__(self) -> None:
        self.cache = Cache(Bundle(DOMAIN))
        self.store = Store()
        self.clock = SimClock(NOW)
        self.stores = SvidStores(
            self.cache, {"vault": self.store}, clock=self.clock, log=get_logger("svid_store")
        )

    def has(self, found: AgentEntry, document: Svid) -> None:
        self.cache.set_entries([found])
        self.cache.put_svids({found.entry_id: document})


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.mark.asyncio
async def test_a_new_svid_is_put_once_over_the_old_one(rig: Rig) -> None:
    rig.has(entry(), svid())
    for _ in range(3):
        await rig.stores.store_once()
    assert rig.store.calls == 1
    assert rig.store.held["a:b", "name:web"].chain == (b"leaf",)
    rig.has(entry(), svid(b"newer"))
    await rig.stores.store_once()
    assert rig.store.held["a:b", "name:web"].chain == (b"newer",)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "later",
    [[], [entry(store=False)], [replace(entry(), entry_id="e2")]],
    ids=["gone", "not stored", "another entry"],
)
async def test_what_nobody_asks_for_any_more_is_taken_out(rig: Rig, later: Any) -> None:
    rig.has(entry(), svid())
    await rig.stores.store_once()
    rig.cache.set_entries(later)
    await rig.stores.store_once()
    assert rig.store.held == {}


@pytest.mark.asyncio
async def test_an_entry_that_moved_leaves_nothing_at_its_old_place(rig: Rig) -> None:
    rig.has(entry("web"), svid())
    await rig.stores.store_once()
    rig.has(entry("shop"), svid())
    await rig.stores.store_once()
    assert set(rig.store.held) == {("a:b", "name:shop")}


@pytest.mark.asyncio
async def test_a_store_that_is_away_is_tried_again_later_and_not_all_the_time(rig: Rig) -> None:
    rig.store.away = True
    rig.has(entry(), svid())
    for _ in range(5):
        await rig.stores.store_once()
    assert rig.store.calls == 1
    rig.store.away = False
    await rig.clock.advance(timedelta(seconds=6))
    await rig.stores.store_once()
    assert rig.store.held
    rig.store.away = True
    rig.cache.set_entries([])
    await rig.stores.store_once()
    assert rig.store.held
    rig.store.away = False
    await rig.clock.advance(timedelta(seconds=6))
    await rig.stores.store_once()
    assert not rig.store.held


@pytest.mark.asyncio
async def test_a_store_nobody_configured_is_told_once(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    rig.has(entry(kind="other"), svid())
    for _ in range(3):
        await rig.stores.store_once()
    assert rig.store.calls == 0
    assert capsys.readouterr().out.count("SVIDStore that is not configured") == 1


def test_such_entries_are_for_no_workload_and_always_have_an_svid(rig: Rig) -> None:
    rig.cache.set_entries([entry()])
    assert rig.cache.matching(entry().selectors) == []
    assert rig.cache.due(NOW) == [entry()]
    rig.cache.put_svids({"e1": svid()})
    assert rig.cache.due(NOW) == []
