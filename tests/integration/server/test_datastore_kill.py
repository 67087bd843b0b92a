"""Whatever was acknowledged is there after kill -9, and nothing is there by halves."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import structlog

from spire_hw.clock import SystemClock
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.interface import ChangeKind, EntryFilter, Match, Page
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
from spire_hw_server.datastore.interface import Entry
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


def write_until_killed(path: Path, round_: int) -> list[str]:
    """Return the entry ids that were acknowledged before the kill."""
    words = [sys.executable, "-c", WRITER, str(path), str(round_)]
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
