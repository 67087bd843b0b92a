"""Whatever was acknowledged is there after kill -9, and nothing is there by halves."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import structlog

from spire_hw.clock import SystemClock
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import ChangeKind, EntryFilter, Match, NodeFilter, Page
from spire_hw_server.datastore.sql.store import open_datastore

if TYPE_CHECKING:
    from pathlib import Path

WRITER = """
import asyncio, sys
import structlog
from spire_hw.clock import SystemClock
from spire_hw.selector import Selector
from spire_hw.spiffeid import TrustDomain
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import Entry
from spire_hw_server.datastore.sql.store import open_datastore

structlog.configure(logger_factory=structlog.ReturnLoggerFactory())


async def main():
    td = TrustDomain("example.org")
    store = await open_datastore(
        DatastoreConfig("sqlite3", sys.argv[1]), clock=SystemClock(), log=structlog.get_logger()
    )
    number = 0
    while True:
        selectors = (Selector("a", str(number)), Selector("b", "1"))
        entry = Entry("", td.member("w", f"{sys.argv[2]}-{number}"), td.member("p"), selectors)
        stored = await store.create_entry(entry)
        print(stored.entry_id, flush=True)
        number += 1


asyncio.run(main())
"""

CALLERS = 12
MANY = f"""
import asyncio, os, sys
import structlog
from datetime import timedelta
from spire_hw.clock import SystemClock
from spire_hw.selector import Selector
from spire_hw.spiffeid import TrustDomain
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import KeyRole, Node
from spire_hw_server.datastore.sql.store import open_datastore

structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
td = TrustDomain("example.org")


async def work(store, clock):
    while True:
        digest = os.urandom(32)
        agent_id = td.member("spire", "agent", "tpm", digest.hex())
        ends = clock.now() + timedelta(hours=1)
        marks = (Selector("tpm", digest.hex()),)
        node = Node(agent_id, "tpm", "1", ends, selectors=marks)
        await store.put_node(node, {{KeyRole.ATTESTATION: digest}})
        print(agent_id.text, flush=True)


async def main():
    clock = SystemClock()
    store = await open_datastore(
        DatastoreConfig("sqlite3", sys.argv[1]), clock=clock, log=structlog.get_logger()
    )
    await asyncio.gather(*(work(store, clock) for _ in range({CALLERS})))


asyncio.run(main())
"""
GROUPS = """
import sqlite3, sys
from datetime import UTC, datetime
from functools import partial
from spire_hw_server.datastore.sql.group import run_together

driver = sqlite3.connect(sys.argv[1], isolation_level=None)
driver.execute("PRAGMA journal_mode = WAL")
driver.execute("CREATE TABLE IF NOT EXISTS t (a, b)")


def insert(name, number, tx):
    tx.driver.execute("INSERT INTO t VALUES (?, ?)", (name, number))
    if number == 3:
        raise ValueError("undone alone")
    tx.driver.execute("INSERT INTO t VALUES (?, ?)", (name, -number))


number = 0
while True:
    name = f"{sys.argv[2]}-{number}"
    run_together(driver, [partial(insert, name, i) for i in range(1, 9)], datetime.now(UTC))
    print(name, flush=True)
    number += 1
"""


def write_until_killed(path: Path, round_: int, program: str = WRITER) -> list[str]:
    """Return what was acknowledged before the kill."""
    words = [sys.executable, "-c", program, str(path), str(round_)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdout is not None
        first = [process.stdout.readline().strip() for _ in range(5 + 7 * round_)]
        process.kill()
        return first + process.stdout.read().split()


@pytest.mark.asyncio
async def test_acknowledged_entries_survive_kill(tmp_path: Path) -> None:
    path = tmp_path / "datastore.sqlite3"
    acknowledged: list[str] = []
    for round_ in range(4):
        acknowledged += write_until_killed(path, round_)
    config = DatastoreConfig("sqlite3", str(path))
    store = await open_datastore(config, clock=SystemClock(), log=structlog.get_logger())
    entries = (await store.list_entries(EntryFilter(), Page())).entries
    assert set(acknowledged) <= {e.entry_id for e in entries}
    assert len(entries) <= len(acknowledged) + 4
    for entry in entries:
        where = EntryFilter(selectors=(Match.EXACT, entry.selectors))
        found = (await store.list_entries(where, Page())).entries
        assert entry in found
    changes = await store.list_changes(0, 10_000)
    assert [c.event_id for c in changes] == list(range(1, len(entries) + 1))
    assert [c.key for c in changes] == [e.entry_id for e in entries]
    assert {c.kind for c in changes} == {ChangeKind.ENTRY}
    await store.close()


def test_writes_that_share_a_commit_survive_kill_together(tmp_path: Path) -> None:
    path = tmp_path / "d"
    acknowledged: set[str] = set()
    for round_ in range(4):
        acknowledged.update(write_until_killed(path, round_, GROUPS))
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT a, b FROM t ORDER BY a, b").fetchall()
    stored = {name for name, _ in rows}
    assert acknowledged <= stored
    assert len(stored) <= len(acknowledged) + 4
    whole = sorted(sign * i for i in range(1, 9) if i != 3 for sign in (1, -1))
    assert rows == [(name, number) for name in sorted(stored) for number in whole]


@pytest.mark.asyncio
async def test_acknowledged_nodes_of_many_callers_survive_kill(tmp_path: Path) -> None:
    path = tmp_path / "datastore.sqlite3"
    acknowledged: set[str] = set()
    for round_ in range(4):
        acknowledged.update(write_until_killed(path, round_, MANY))
    config = DatastoreConfig("sqlite3", str(path))
    store = await open_datastore(config, clock=SystemClock(), log=structlog.get_logger())
    nodes = (await store.list_nodes(NodeFilter(), Page())).nodes
    assert acknowledged <= {node.agent_id.text for node in nodes}
    assert len(nodes) <= len(acknowledged) + 4 * CALLERS
    for node in nodes:
        where = NodeFilter(selectors=(Match.EXACT, node.selectors))
        assert (await store.list_nodes(where, Page())).nodes == [node]
        digest = bytes.fromhex(node.selectors[0].value)
        assert await store.find_by_attestation_key(digest) == node
    changes = await store.list_changes(0, 10_000)
    assert [c.event_id for c in changes] == list(range(1, len(nodes) + 1))
    assert [c.key for c in changes] == [node.agent_id.text for node in nodes]
    await store.close()
