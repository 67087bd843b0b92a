"""Runs transactions in worker threads: one writer for SQLite, retries after conflicts.

A function given to `read` or `write` is a whole transaction; it may run more than once and does
nothing but ask the database. What it changed is written to the `changes` table in the same
transaction, numbered in the order transactions become visible.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import exc, text

from spire_hw.aio.watch import Watch
from spire_hw.errors import (
    AlreadyExistsError,
    InvalidInputError,
    NotReadyError,
    SpireHwError,
    UnavailableError,
)
from spire_hw_server.datastore.sql import events
from spire_hw_server.datastore.sql.dialects import Opened, open_engine, write_options
from spire_hw_server.datastore.sql.group import run_together
from spire_hw_server.datastore.sql.prepared import translated
from spire_hw_server.datastore.sql.schema import migrate
from spire_hw_server.datastore.sql.transaction import Transaction
from spire_hw_server.datastore.sql.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw_server.datastore.config import DatastoreConfig
    from spire_hw_server.datastore.records import Change
    from spire_hw_server.datastore.sql.group import Made

T = TypeVar("T")

_TRIES: Final = 6
_CLOSED: Final = "the datastore is closed"
# SQLSTATE classes and MySQL numbers of a transaction that lost against another one.
_DAMAGED: Final = ("file is not a database", "database disk image is malformed")
_CONFLICT_STATES: Final = frozenset({"40001", "40P01", "55P03"})
_CONFLICT_NUMBERS: Final = frozenset({1205, 1213, 1020})


class Database:
    """An open database; made by `open_database`."""

    def __init__(
        self, opened: Opened, replica: Opened | None, *, clock: Clock, log: Logger
    ) -> None:
        self._opened = opened
        self._replica = replica
        self._clock = clock
        self._log = log
        self._readers = ThreadPoolExecutor(opened.threads, thread_name_prefix="datastore")
        self._writer = Writer("datastore-write", self._together) if opened.one_writer else None
        self._direct: dict[bool, sqlite3.Connection] = {}  # by whether it writes
        self._closed = False
        self.changed: Watch[int] = Watch(0)
        self.recent = events.Recent()

    async def read(self, function: Callable[[Transaction], T], *, stale: bool = False) -> T:
        """Run a transaction that only reads.

        Args:
            function: the transaction.
            stale: a replica's answer is good enough.
        """
        opened = self._replica if stale and self._replica is not None else self._opened
        once = partial(self._once, opened, function, False)
        return (await self._in_thread(partial(self._attempts, once)))[0]

    async def glance(self, function: Callable[[Transaction], T]) -> T:
        """Read a row or two with prepared statements; each sees what is stored when it runs.

        In SQLite it runs right here: a reader waits for nobody there, and takes less time than
        the way to another thread and back.
        """
        direct = self._direct.get(False)
        if direct is None:
            return await self.read(function)
        if self._closed:
            raise UnavailableError(_CLOSED)
        try:
            return function(Transaction(direct, self._clock.now().astimezone(UTC)))
        except (exc.SQLAlchemyError, ValueError, OverflowError) as e:
            if isinstance(e, SpireHwError):
                raise
            # Busy, or worse: the way that waits, tries again and names what is wrong.
            return await self.read(function)

    async def write(self, function: Callable[[Transaction], T], *, prepared: bool = False) -> T:
        """Run a transaction that may write; local caches are woken when it changed something.

        Args:
            function: the transaction.
            prepared: it runs prepared statements only, which SQLite takes without SQLAlchemy.
        """
        direct = self._direct.get(True) if prepared else None
        once = (
            partial(self._once, self._opened, function, True)
            if direct is None
            else partial(self._once_direct, direct, function)
        )
        work = partial(self._attempts, once)
        if self._writer is not None:
            joint = None if direct is None else function
            return (await self._writer.run(work, self._announce, joint))[0]
        loop = asyncio.get_running_loop()

        def announced() -> tuple[T, list[Change]]:
            # From here, because a caller that went away does not announce what was stored.
            made = work()
            loop.call_soon_threadsafe(self._announce, made)
            return made

        return (await self._in_thread(announced))[0]

    def open_direct(self) -> None:
        """Open the connections that need no SQLAlchemy, where the database has them.

        Raises:
            UnavailableError: the database cannot be opened.
        """
        if self._opened.direct is not None:
            for writes in (False, True):
                self._direct[writes] = self._opened.direct()
            self._direct[False].execute("PRAGMA busy_timeout = 0")

    def _announce(self, made: tuple[object, list[Change]]) -> None:
        _, changes = made
        if changes:
            self.recent.add(changes)
            self.changed.set(max(changes[-1].event_id, self.changed.value))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise UnavailableError(_CLOSED)
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    def _attempts(self, once: Callable[[], T]) -> T:
        last: Exception
        for _ in range(_TRIES):
            try:
                return once()
            except exc.IntegrityError as e:
                # Someone else was first; run again, the function then sees and names it.
                last = e
            except exc.DBAPIError as e:
                if not _is_conflict(e):
                    raise _translated(e) from e
                last = e
            except exc.TimeoutError as e:
                raise UnavailableError("all database connections are in use") from e
            except exc.StatementError as e:
                raise InvalidInputError(f"cannot be stored: {e.orig}") from e
            except (ValueError, OverflowError) as e:
                if isinstance(e, SpireHwError):
                    raise
                raise InvalidInputError(f"cannot be stored: {e}") from e
        if isinstance(last, exc.IntegrityError):
            raise AlreadyExistsError("it conflicts with something stored") from last
        raise UnavailableError("the database is too busy; try again") from last

    def _once(
        self, opened: Opened, function: Callable[[Transaction], T], writes: bool
    ) -> tuple[T, list[Change]]:
        with opened.engine.connect() as connection:
            if writes:
                write_options(connection)
            with connection.begin():
                now = self._clock.now().astimezone(UTC)
                transaction = Transaction(connection, now)
                result = function(transaction)
                changes = events.record(transaction)
        return result, changes

    def _once_direct(
        self, driver: sqlite3.Connection, function: Callable[[Transaction], T]
    ) -> tuple[T, list[Change]]:
        transaction = Transaction(driver, self._clock.now().astimezone(UTC))
        try:
            driver.execute("BEGIN IMMEDIATE")
            result = function(transaction)
            changes = events.record(transaction)
            driver.execute("COMMIT")
        except sqlite3.Error as e:
            raise translated(e) from e
        finally:
            if driver.in_transaction:
                driver.rollback()
        return result, changes

    def _together(self, functions: Sequence[Callable[[Transaction], Any]]) -> list[Made | None]:
        return run_together(self._direct[True], functions, self._clock.now().astimezone(UTC))

    async def close(self) -> None:
        """Wait for what runs and close every connection."""
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._dispose)

    def _dispose(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._readers.shutdown(wait=True)
        for connection in self._direct.values():
            connection.close()
        for opened in (self._opened, self._replica):
            if opened is not None:
                opened.engine.dispose()


async def open_database(config: DatastoreConfig, *, clock: Clock, log: Logger) -> Database:
    """Connect, migrate the schema where needed, and return the database.

    Raises:
        InvalidInputError: a connection string is not usable.
        NotReadyError: the schema is not one this program can use.
        UnavailableError: the database or its driver is not there.
    """
    if config.log_sql:
        logging.getLogger("sqlalchemy.engine").setLevel(logging.INFO)
    opened = open_engine(config, config.connection_string)
    replica = (
        open_engine(config, config.ro_connection_string) if config.ro_connection_string else None
    )

    database = Database(opened, replica, clock=clock, log=log)

    def prepare() -> tuple[str, str]:
        try:
            found = migrate(opened.engine, allowed=not config.disable_migration)
        except exc.DBAPIError as e:
            error = _translated(e)
            if isinstance(error, NotReadyError) and opened.engine.dialect.name == "sqlite":
                raise NotReadyError(f"{config.connection_string}: {error.message}") from e
            raise error from e
        database.open_direct()
        return found

    try:
        before, now = await asyncio.to_thread(prepare)
    except BaseException:
        await database.close()
        raise
    if before != now:
        log.info("Database schema migrated", before=before or "empty", schema=now)
    return database


def ping(transaction: Transaction) -> None:
    """Ask the database for nothing."""
    transaction.connection.execute(text("SELECT 1"))


def _is_conflict(error: exc.DBAPIError) -> bool:
    original = error.orig
    if getattr(original, "sqlstate", None) in _CONFLICT_STATES:
        return True
    arguments = getattr(original, "args", ())
    if arguments and arguments[0] in _CONFLICT_NUMBERS:
        return True
    return str(original).startswith(("database is locked", "database table is locked"))


def _translated(error: exc.DBAPIError) -> SpireHwError:
    if isinstance(error, exc.DataError):
        return InvalidInputError("cannot be stored: a value does not fit the database")
    if (
        isinstance(error, (exc.OperationalError, exc.InterfaceError))
        or error.connection_invalidated
    ):
        lines = str(error.orig).strip().splitlines()
        return UnavailableError(f"the database is not usable: {lines[0] if lines else 'no reason'}")
    if str(error.orig).startswith(_DAMAGED):
        return NotReadyError(
            f"the database is damaged ({error.orig}); restore it from a backup, or correct "
            "connection_string"
        )
    return SpireHwError(f"the database refused a statement ({type(error.orig).__name__})")
