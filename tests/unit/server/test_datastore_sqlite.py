"""What is particular to the SQLite file: its mode, its pragmas, whose file it is."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import structlog
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from spire_hw.bundle.bundle import Bundle
from spire_hw.errors import ErrorKind, NotReadyError, SpireHwError, UnavailableError
from spire_hw.spiffeid import TrustDomain
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.sql.dialects import open_engine
from spire_hw_server.datastore.sql.models import bundles, metadata
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_server.datastore.interface import Datastore

TD = TrustDomain("example.org")
LOG = structlog.get_logger()


def config_of(path: Path, **options: Any) -> DatastoreConfig:
    return DatastoreConfig("sqlite3", str(path), **options)


async def open_at(path: Path, **options: Any) -> Datastore:
    return await open_datastore(config_of(path, **options), clock=SimClock(), log=LOG)


def modes_in(directory: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mode & 0o777 for p in directory.iterdir()}


@pytest_asyncio.fixture
async def path(tmp_path: Path) -> Path:
    """Give the file of a migrated, closed database."""
    path = tmp_path / "datastore.sqlite3"
    await (await open_at(path)).close()
    return path


@pytest.mark.asyncio
async def test_files_are_private(tmp_path: Path) -> None:
    path = tmp_path / "d"
    store = await open_at(path)
    await store.set_bundle(Bundle(TD))
    assert modes_in(tmp_path) == {"d": 0o600, "d-wal": 0o600, "d-shm": 0o600}
    await store.close()
    path.chmod(0o644)
    await (await open_at(path)).close()
    assert modes_in(tmp_path) == {"d": 0o600}


@pytest.mark.asyncio
async def test_commits_are_durable_and_keys_enforced(path: Path) -> None:
    engine = open_engine(config_of(path), str(path)).engine
    with engine.connect() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "trusted_schema")
        }
    engine.dispose()
    assert found == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "trusted_schema": 0,
    }


@pytest.mark.asyncio
async def test_migrations_make_exactly_the_models(path: Path) -> None:
    engine = open_engine(config_of(path), str(path)).engine
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


@pytest.mark.asyncio
async def test_symlink_and_missing_directory_are_refused(tmp_path: Path, path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    for target in (link, tmp_path / "none" / "d", tmp_path):
        with pytest.raises(UnavailableError):
            await open_at(target)


@pytest.mark.asyncio
async def test_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(SpireHwError):
        await open_at(path)
    assert path.read_bytes() == b"not a database" * 100


@pytest.mark.asyncio
async def test_database_of_upstream_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE attested_node_entries (id integer)")
    with pytest.raises(NotReadyError, match="upstream"):
        await open_at(path)
    connection = sqlite3.connect(path)
    tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
    connection.close()
    assert tables == [("attested_node_entries",)]


@pytest.mark.asyncio
async def test_migration_can_be_switched_off(tmp_path: Path, path: Path) -> None:
    await (await open_at(path, disable_migration=True)).close()
    with pytest.raises(NotReadyError, match="disable_migration"):
        await open_at(tmp_path / "new", disable_migration=True)


@pytest.mark.asyncio
async def test_damaged_bundle_is_named(path: Path) -> None:
    store = await open_at(path)
    await store.set_bundle(Bundle(TD))
    engine = open_engine(config_of(path), str(path)).engine
    for damage in (b"{", b"{}", b'{"x509": [1], "jwt": []}', b"\xff"):
        with engine.begin() as connection:
            connection.execute(bundles.update().values(authorities=damage))
        with pytest.raises(SpireHwError, match=r"example\.org") as caught:
            await store.get_bundle(TD)
        assert caught.value.kind is ErrorKind.INTERNAL
    engine.dispose()
    await store.close()


@pytest.mark.asyncio
async def test_readers_go_on_while_a_transaction_writes(path: Path) -> None:
    store = await open_at(path)
    await store.set_bundle(Bundle(TD, sequence=1))
    writing, go_on = threading.Event(), threading.Event()

    def change(bundle: Bundle) -> Bundle:
        writing.set()
        assert go_on.wait(30)
        return Bundle(TD, refresh_hint_s=9, sequence=bundle.sequence)

    async def read_meanwhile() -> None:
        assert await asyncio.to_thread(writing.wait, 30)
        assert (await store.get_bundle(TD)).refresh_hint_s == 0
        go_on.set()

    changed, _ = await asyncio.gather(store.update_bundle(TD, change), read_meanwhile())
    assert (await store.get_bundle(TD)) == changed
    assert changed.refresh_hint_s == 9
    await store.close()
