"""Brings the schema up to date at start, one server at a time, and refuses what it does not know."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from spire_hw.errors import NotReadyError, UnavailableError
from spire_hw_server.datastore.sql.dialects import write_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Connection, Engine

_LOCK_NAME: Final = "spire-hw-migration"
_LOCK_NUMBER: Final = 0x5350_4857
_LOCK_WAIT_S: Final = 300
_UPSTREAM_TABLE: Final = "attested_node_entries"
# Alembic keeps the running migration in module globals.
_alembic = threading.Lock()


def migrate(engine: Engine, *, allowed: bool) -> tuple[str, str]:
    """Migrate to the newest revision known here.

    Args:
        engine: the database.
        allowed: False refuses an old schema instead (`disable_migration`).

    Returns:
        The revision before ("" for an empty database) and the one now.

    Raises:
        NotReadyError: the schema is newer than this program, someone else's, or old and
            migration is not allowed.
    """
    script = _script()
    head = script.get_current_head() or ""
    with engine.connect() as plain, _locked(write_options(plain)) as connection:
        before = _revision(connection)
        if before == head:
            return before, head
        _check_known(connection, script, before)
        if not allowed:
            raise NotReadyError(
                f"the database schema is {before or 'missing'}, this program needs {head}, and"
                " disable_migration is set; migrate it or remove the setting"
            )
        config = _config()
        config.attributes["connection"] = connection
        with _alembic:
            command.upgrade(config, "head")
    return before, head


def _config() -> Config:
    config = Config()
    location = str(Path(__file__).parent / "migrations")
    config.set_main_option("script_location", location.replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@lru_cache(maxsize=1)
def _script() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _revision(connection: Connection) -> str:
    heads = MigrationContext.configure(connection).get_current_heads()
    if len(heads) > 1:
        raise NotReadyError(f"the database schema has several heads ({', '.join(heads)})")
    return heads[0] if heads else ""


def _check_known(connection: Connection, script: ScriptDirectory, revision: str) -> None:
    if revision:
        known = {found.revision for found in script.walk_revisions()}
        if revision not in known:
            raise NotReadyError(
                f"the database schema ({revision}) is newer than this program knows;"
                " start the newer release, or restore the backup made before it migrated"
            )
        return
    if inspect(connection).has_table(_UPSTREAM_TABLE):
        raise NotReadyError(
            "the database belongs to an upstream SPIRE server; give a database of its own and"
            " bring the entries over with `entry show -output json` and `entry create -data`"
        )


@contextmanager
def _locked(connection: Connection) -> Iterator[Connection]:
    """Hold the migration lock through one transaction."""
    dialect = connection.dialect.name
    if dialect == "mysql":
        held = connection.scalar(
            text("SELECT GET_LOCK(:name, :wait)"), {"name": _LOCK_NAME, "wait": _LOCK_WAIT_S}
        )
        connection.rollback()
        if held != 1:
            raise UnavailableError("another server is migrating the database; try again later")
        try:
            with connection.begin():
                yield connection
        finally:
            connection.execute(text("SELECT RELEASE_LOCK(:name)"), {"name": _LOCK_NAME})
            connection.rollback()
        return
    with connection.begin():
        if dialect == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _LOCK_NUMBER})
        yield connection
