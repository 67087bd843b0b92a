"""Writes to SQLite that share a commit: each stored or refused by itself, none by halves."""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import threading
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import structlog

from spire_hw.bundle.bundle import Bundle
from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw.selector import Selector
from spire_hw.spiffeid import TrustDomain
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import KeyInUseError, KeyRole, Match, Node, NodeFilter
from spire_hw_server.datastore.sql.group import run_together
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.datastore.sql.writer import Writer
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.sql.transaction import Transaction

TD = TrustDomain("example.org")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
WAL_HEADER, FRAME_HEADER, PAGE = 32, 24, 4096


def make_node(name: str) -> Node:
    return Node(
        agent_id=TD.member("spire", "agent", "tpm", name),
        attestation_type="tpm",
        serial_number="1",
        expires_at=SimClock().now() + timedelta(hours=1),
        selectors=(Selector("tpm", name),),
    )


def key_of(name: str) -> dict[KeyRole, bytes]:
    return {KeyRole.SVID: name.encode().ljust(32)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "d"


@pytest_asyncio.fixture
async def store(path: Path) -> AsyncIterator[Datastore]:
    config = DatastoreConfig("sqlite3", str(path))
    store = await open_datastore(config, clock=SimClock(), log=structlog.get_logger())
    await store.set_bundle(Bundle(TD))
    yield store
    await store.close()


def put_all(store: Datastore, nodes: Sequence[Node]) -> list[asyncio.Future[Node]]:
    """Start to store nodes, each with a key of its own."""
    return [
        asyncio.ensure_future(store.put_node(n, key_of(n.agent_id.path)))  # noqa: TID251
        for n in nodes
    ]


@asynccontextmanager
async def busy(store: Datastore) -> AsyncIterator[None]:
    """Keep the writing thread busy, so that what is written in the block piles up."""
    writing, go_on = threading.Event(), threading.Event()

    def change(bundle: Bundle) -> Bundle:
        writing.set()
        assert go_on.wait(30)
        return bundle

    first = asyncio.ensure_future(store.update_bundle(TD, change))  # noqa: TID251
    try:
        assert await asyncio.to_thread(writing.wait, 30)
        yield
        await asyncio.sleep(0)
    finally:
        go_on.set()
    await first


def commits(path: Path) -> int:
    """Count the commits in the write-ahead log (SQLite, "WAL-mode File Format", 1.3)."""
    frames = path.with_name(path.name + "-wal").read_bytes()[WAL_HEADER:]
    size = FRAME_HEADER + PAGE
    return sum(any(frames[i + 4 : i + 8]) for i in range(0, len(frames), size))


async def check_whole(store: Datastore, names: Sequence[str]) -> None:
    """Check that exactly these nodes are stored, each with its selectors, its key, its change."""
    assert await store.count_nodes(NodeFilter()) == len(names)
    for name in names:
        where = NodeFilter(selectors=(Match.EXACT, make_node(name).selectors))
        assert await store.count_nodes(where) == 1
        key = key_of(make_node(name).agent_id.path)
        with pytest.raises(KeyInUseError):
            await store.find_node(make_node("stranger").agent_id, key)
    changes = [c for c in await store.list_changes(0, 1000) if "tpm" in c.key]
    assert [c.key for c in changes] == [make_node(name).agent_id.text for name in names]
    numbers = [c.event_id for c in await store.list_changes(0, 1000)]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.asyncio
async def test_writes_that_pile_up_share_commits_and_are_announced_in_order(
    store: Datastore, path: Path
) -> None:
    names = [f"n{i:02}" for i in range(20)]
    async with busy(store):
        before, last = commits(path), await store.last_change()
        waiting = put_all(store, [make_node(name) for name in names])
    assert [n.agent_id for n in await asyncio.gather(*waiting)] == [
        make_node(name).agent_id for name in names
    ]
    assert commits(path) - before == 2  # sixteen and four
    told = store.recent_changes(last)
    assert [c.event_id for c in told] == list(range(last + 1, last + 21))
    assert [c.key for c in told] == [make_node(name).agent_id.text for name in names]
    assert store.changed.value == told[-1].event_id
    await check_whole(store, names)


@pytest.mark.asyncio
async def test_who_fails_fails_alone(store: Datastore) -> None:
    nodes = [make_node(name) for name in "abcde"]
    nodes[2] = replace(nodes[2], serial_number="9" * 256)
    async with busy(store):
        waiting = put_all(store, nodes)
        twice = store.put_node(make_node("f"), key_of(nodes[0].agent_id.path))
        waiting.insert(3, asyncio.ensure_future(twice))  # noqa: TID251
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results.pop(2), InvalidInputError)
    assert isinstance(results.pop(2), KeyInUseError)
    assert results == [await store.get_node(n.agent_id) for n in nodes if n != nodes[2]]
    await check_whole(store, "abde")


@pytest.mark.asyncio
async def test_who_went_away_before_is_left_out(store: Datastore) -> None:
    async with busy(store):
        waiting = put_all(store, [make_node(name) for name in "abc"])
        await asyncio.sleep(0)
        waiting[1].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await check_whole(store, "ac")


@pytest.mark.asyncio
async def test_writes_wait_for_another_server_together(store: Datastore, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        async with busy(store):
            waiting = put_all(store, [make_node(name) for name in "abc"])
        other.execute("BEGIN IMMEDIATE")
        waiting += put_all(store, [make_node(name) for name in "def"])
        done, _ = await asyncio.wait(waiting[3:], timeout=0.2)
        assert not done
        other.execute("COMMIT")
    await asyncio.gather(*waiting)
    await check_whole(store, "abcdef")


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond a size, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.asyncio
async def test_commit_that_fails_stores_none_and_each_is_told(store: Datastore, path: Path) -> None:
    with ExitStack() as limits:
        async with busy(store):
            waiting = put_all(store, [make_node(name) for name in "abc"])
            wal = path.with_name(path.name + "-wal")
            limits.enter_context(full_disk(wal.stat().st_size))
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(r) for r in results] == [UnavailableError] * 3
    await check_whole(store, [])
    await asyncio.gather(*put_all(store, [make_node(name) for name in "abc"]))
    await check_whole(store, "abc")


@pytest.fixture
def driver(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    with closing(connection):
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b)")
        connection.execute("CREATE TABLE u (a REFERENCES t)")
        yield connection


def insert(value: int, tx: Transaction) -> int:
    assert tx.driver is not None
    tx.driver.execute("INSERT INTO t VALUES (?, NULL)", [value])
    return value


def fill(tx: Transaction) -> None:
    assert tx.driver is not None
    (pages,) = tx.driver.execute("PRAGMA page_count").fetchone()
    tx.driver.execute(f"PRAGMA max_page_count = {pages}")
    tx.driver.execute("INSERT INTO t VALUES (99, zeroblob(1000000))")


def interrupt(tx: Transaction) -> None:
    assert tx.driver is not None
    tx.driver.set_progress_handler(lambda: 1, 1)
    try:
        tx.driver.execute("INSERT INTO t VALUES (99, NULL)")
    finally:
        tx.driver.set_progress_handler(None, 1)


def orphan(tx: Transaction) -> None:
    """Add a row for which the commit fails."""
    assert tx.driver is not None
    tx.driver.execute("PRAGMA defer_foreign_keys = ON")
    tx.driver.execute("INSERT INTO u VALUES (99)")


@pytest.mark.parametrize(
    ("fails", "told"),
    [(fill, "disk is full"), (interrupt, "interrupted"), (orphan, "FOREIGN KEY")],
)
def test_transaction_that_sqlite_ends_stores_nothing(
    driver: sqlite3.Connection, fails: Callable[[Transaction], None], told: str
) -> None:
    with pytest.raises(sqlite3.Error, match=told):
        run_together(driver, [partial(insert, 1), fails, partial(insert, 2)], NOW)
    assert not driver.in_transaction
    assert driver.execute("SELECT a FROM t").fetchall() == []
    assert driver.execute("SELECT a FROM u").fetchall() == []
    assert run_together(driver, [partial(insert, 1), partial(insert, 1)], NOW) == [(1, []), None]
    assert driver.execute("SELECT a FROM t").fetchall() == [(1,)]


@pytest.mark.asyncio
async def test_writer_tells_what_was_done_of_who_went_away_while_it_was_done(
    driver: sqlite3.Connection,
) -> None:
    writer = Writer("test", partial(run_together, driver, now=NOW))
    started, go_on = [threading.Event(), threading.Event()], threading.Event()
    done: list[object] = []

    def slow(which: int, _: Transaction | None = None) -> str:
        started[which].set()
        assert go_on.wait(30)
        go_on.clear()
        return "slow"

    def never() -> tuple[int, list[object]]:
        raise AssertionError("runs with others")

    first = writer.run(partial(slow, 0), done.append)
    await asyncio.to_thread(started[0].wait, 30)
    second = writer.run(never, done.append, partial(insert, 1))
    third = writer.run(never, done.append, partial(slow, 1))
    fourth = writer.run(never, done.append, partial(insert, 2))
    go_on.set()
    assert await first == "slow"
    await asyncio.to_thread(started[1].wait, 30)
    third.cancel()
    assert not second.done()
    go_on.set()
    assert await fourth == (2, [])
    assert second.result() == (1, [])
    assert done == ["slow", (1, []), ("slow", []), (2, [])]
    assert driver.execute("SELECT a FROM t").fetchall() == [(1,), (2,)]
    await asyncio.to_thread(writer.close)
