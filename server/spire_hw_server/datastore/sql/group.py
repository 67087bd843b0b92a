"""Several writes to SQLite in one transaction: one commit for all, a savepoint for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from spire_hw_server.datastore.sql import events
from spire_hw_server.datastore.sql.transaction import Transaction

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from spire_hw_server.datastore.records import Change

# What a function returned, and what it changed.
Made: TypeAlias = "tuple[Any, list[Change]]"


def run_together(
    driver: sqlite3.Connection, functions: Sequence[Callable[[Transaction], Any]], now: datetime
) -> list[Made | None]:
    """Run functions one after the other and commit once.

    Returns:
        What each made, in their order; None for one that failed, of which nothing is stored.

    Raises:
        Exception: nothing of any of them is stored: the transaction could not begin or be
            committed, or SQLite ended it (disk full, I/O error, out of memory).

    Source: SQLite, "Savepoints", and "Response To Errors Within A Transaction".
    """
    try:
        driver.execute("BEGIN IMMEDIATE")
        made = [_under_savepoint(driver, function, now) for function in functions]
        driver.execute("COMMIT")
    finally:
        if driver.in_transaction:
            driver.rollback()
    return made


def _under_savepoint(
    driver: sqlite3.Connection, function: Callable[[Transaction], Any], now: datetime
) -> Made | None:
    driver.execute("SAVEPOINT one")
    transaction = Transaction(driver, now)
    made: Made | None = None
    try:
        result = function(transaction)
        made = result, events.record(transaction)
    except Exception:
        if not driver.in_transaction:  # it took those before it along
            raise
        driver.execute("ROLLBACK TO one")
    driver.execute("RELEASE one")
    return made
