"""The writing thread of SQLite, and what its own connections do when a statement fails."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import structlog

from spire_hw.errors import InvalidInputError, NotFoundError, UnavailableError
from spire_hw.selector import Selector
from spire_hw.spiffeid import TrustDomain
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import KeyRole, Match, Node, NodeFilter
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.datastore.sql.writer import Writer
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_server.datastore.interface import Datastore

pytestmark = pytest.mark.asyncio

TD = TrustDomain("example.org")
KEYS = {KeyRole.SVID: b"k" * 32}


def make_node(name: str = "n") -> Node:
    return Node(
        agent_id=TD.member("spire", "agent", "tpm", name),
        attestation_type="tpm",
        serial_number="1",
        expires_at=SimClock().now() + timedelta(hours=1),
        selectors=(Selector("tpm", "a"),),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "d"


@pytest_asyncio.fixture
async def store(path: Path) -> AsyncIterator[Datastore]:
    config = DatastoreConfig("sqlite3", str(path))
    store = await open_datastore(config, clock=SimClock(), log=structlog.get_logger())
    yield store
    await store.close()


def rename(path: Path, old: str, new: str) -> None:
    """Rename a table behind the store's back."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"ALTER TABLE {old} RENAME TO {new}")


async def test_failed_write_stores_nothing_and_the_next_works(store: Datastore, path: Path) -> None:
    rename(path, "changes", "gone")
    with pytest.raises(UnavailableError, match="no such table"):
        await store.put_node(make_node(), KEYS)
    rename(path, "gone", "changes")
    with pytest.raises(NotFoundError):
        await store.get_node(make_node().agent_id)
    assert await store.find_node(make_node("other").agent_id, KEYS) is None
    assert await store.put_node(make_node(), KEYS) == await store.get_node(make_node().agent_id)


async def test_failed_look_is_named_and_the_next_works(store: Datastore, path: Path) -> None:
    await store.put_node(make_node(), KEYS)
    rename(path, "nodes", "gone")
    with pytest.raises(UnavailableError, match="no such table"):
        await store.get_node(make_node().agent_id)
    rename(path, "gone", "nodes")
    assert (await store.get_node(make_node().agent_id)).serial_number == "1"


async def test_value_that_does_not_fit_is_refused(store: Datastore) -> None:
    for serial in ("9" * 256, "\0", "\u0661"):
        with pytest.raises(InvalidInputError, match="cannot be stored"):
            await store.put_node(replace(make_node(), serial_number=serial))
    assert await store.find_node(make_node().agent_id) is None


@pytest.mark.parametrize("count", [0, 1, 2, 64, 65, 200])
async def test_any_number_of_rows_goes_in(store: Datastore, count: int) -> None:
    selectors = tuple(sorted(Selector("tpm", f"s{i}") for i in range(count)))
    await store.put_node(replace(make_node("other"), selectors=(Selector("tpm", "else"),)))
    for marks in (selectors, (Selector("tpm", "new"), *selectors)):
        node = replace(make_node(), selectors=marks)
        await store.put_node(node, KEYS)
        assert set((await store.get_node(node.agent_id)).selectors) == set(marks)
        if marks:
            where = NodeFilter(selectors=(Match.EXACT, marks))
            assert await store.count_nodes(where) == 1


async def test_look_sees_what_was_written_before_it(store: Datastore) -> None:
    for number in range(20):
        node = make_node(str(number))
        await store.put_node(node)
        assert (await store.get_node(node.agent_id)).agent_id == node.agent_id


async def test_statements_are_logged_when_the_operator_asks(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = DatastoreConfig("sqlite3", str(path), log_sql=True)
    store = await open_datastore(config, clock=SimClock(), log=structlog.get_logger())
    await store.put_node(make_node(), KEYS)
    assert await store.find_node(make_node().agent_id, KEYS) is not None
    await store.close()
    assert any("INSERT INTO node_keys" in line for line in caplog.messages)


async def test_write_of_a_caller_that_went_away_happens_or_not_as_a_whole(
    store: Datastore,
) -> None:
    attempts = [asyncio.ensure_future(store.put_node(make_node(str(i)))) for i in range(8)]  # noqa: TID251
    await asyncio.sleep(0)
    for attempt in attempts:
        attempt.cancel()
    await asyncio.gather(*attempts, return_exceptions=True)
    await store.put_node(make_node("last"))
    found = await store.count_nodes(NodeFilter())
    assert 1 <= found <= len(attempts) + 1
    assert await store.last_change() == found


async def test_writer_skips_what_nobody_waits_for_and_reports_what_was_done() -> None:
    writer = Writer("test", together=lambda _: pytest.fail("none of these shares a commit"))
    started, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def slow() -> str:
        started.set()
        go_on.wait()
        return "slow"

    def never() -> str:
        raise AssertionError("nobody waits for this")

    first = writer.run(slow, done.append)
    await asyncio.to_thread(started.wait)
    second = writer.run(never, done.append)
    third = writer.run(lambda: "third", done.append)
    first.cancel()
    second.cancel()
    go_on.set()
    assert await third == "third"
    assert done == ["slow", "third"]
    await asyncio.to_thread(writer.close)
    with pytest.raises(UnavailableError):
        writer.run(slow, done.append)
