"""Prints what the store costs beside a bare SQLite commit, and what asking the entry graph costs.

Run: python tests/bench/bench_datastore.py
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from spire_hw.clock import SystemClock
from spire_hw.selector import Selector
from spire_hw.spiffeid import TrustDomain, server_id
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import Entry
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.entries import EntryCache, EntryGraph

TD = TrustDomain("example.org")
START = datetime(2026, 1, 1, tzinfo=UTC)
WRITES, AGENTS, PER_AGENT, ALIASES = 300, 2000, 20, 200


def say(line: str) -> None:
    """Write one result."""
    sys.stdout.write(line + "\n")


def bare_commit_s(directory: Path) -> float:
    """Return the time of one durable commit without us: the limit."""
    connection = sqlite3.connect(directory / "bare", isolation_level=None)
    for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "CREATE TABLE t (a)"):
        connection.execute(statement)
    start = time.perf_counter()
    for _ in range(WRITES):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("COMMIT")
    result = (time.perf_counter() - start) / WRITES
    connection.close()
    return result


async def bench_store(directory: Path) -> None:
    """Print what creating, reading and loading entries costs."""
    limit = bare_commit_s(directory)
    config = DatastoreConfig("sqlite3", str(directory / "d"))
    log = structlog.get_logger()
    store = await open_datastore(config, clock=SystemClock(), log=log)
    entry = Entry("", TD.member("w"), TD.member("p"), (Selector("unix", "uid:1"),))
    stored = await store.create_entry(entry)
    start = time.perf_counter()
    for i in range(WRITES):
        stored = await store.create_entry(replace(entry, spiffe_id=TD.member("w", str(i))))
    create = (time.perf_counter() - start) / WRITES
    say(f"create_entry        {create * 1e3:8.2f} ms   {create / limit:5.1f} of a bare commit")
    start = time.perf_counter()
    for _ in range(WRITES):
        await store.get_entry(stored.entry_id)
    say(f"get_entry           {(time.perf_counter() - start) / WRITES * 1e3:8.2f} ms")
    cache = EntryCache(store, trust_domain=TD, clock=SystemClock(), log=log)
    start = time.perf_counter()
    await cache.start()
    say(f"load, each entry    {(time.perf_counter() - start) / WRITES * 1e6:8.1f} us")
    await cache.close()
    await store.close()


def bench_graph() -> None:
    """Print what a look-up and a change cost with thousands of agents."""
    graph = EntryGraph(TD)
    agents = [TD.member("spire", "agent", "tpm", f"{i:064x}") for i in range(AGENTS)]
    entries = [
        Entry(
            f"e{i}-{j}",
            TD.member("w", str(i), str(j)),
            agent,
            (Selector("unix", f"uid:{j}"),),
            created_at=START + timedelta(seconds=j),
        )
        for i, agent in enumerate(agents)
        for j in range(PER_AGENT)
    ]
    for i in range(ALIASES):
        selectors = (Selector("tpm", "all"), Selector("tpm", f"rack:{i}"))
        entries.append(Entry(f"a{i}", TD.member("alias", str(i)), server_id(TD), selectors))
    for entry in entries:
        graph.put_entry(entry)
    for i, agent in enumerate(agents):
        graph.put_node(agent, [Selector("tpm", "all"), Selector("tpm", f"rack:{i % ALIASES}")])
    for name in ("first look-up", "look-up"):
        start = time.perf_counter()
        for agent in agents:
            graph.authorized(agent)
        say(f"{name:<19} {(time.perf_counter() - start) / AGENTS * 1e6:8.1f} us")
    start = time.perf_counter()
    for entry in entries[:AGENTS]:
        graph.put_entry(replace(entry, revision_number=1))
    say(f"change              {(time.perf_counter() - start) / AGENTS * 1e6:8.1f} us")


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(bench_store(Path(name)))
    bench_graph()
