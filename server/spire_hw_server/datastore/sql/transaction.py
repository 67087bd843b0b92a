"""What a function that runs in a transaction is given."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.engine import Connection

    from spire_hw_server.datastore.records import ChangeKind, Node


class Transaction:
    """One transaction: the connection, the time it started and what it changed.

    Attributes:
        driver: SQLite's own connection, None when all goes through SQLAlchemy's.
        now: the time it started.
        changes: what caches have to look at, by kind and key.
    """

    def __init__(self, connection: Connection | sqlite3.Connection, now: datetime) -> None:
        self._connection = connection
        self.driver = connection if isinstance(connection, sqlite3.Connection) else None
        self.now = now
        self.changes: dict[tuple[ChangeKind, str], Node | None] = {}

    @property
    def connection(self) -> Connection:
        """Return SQLAlchemy's connection; a transaction of prepared statements has none."""
        if isinstance(self._connection, sqlite3.Connection):
            raise NotImplementedError("this transaction runs prepared statements only")
        return self._connection

    @property
    def now_s(self) -> int:
        """Return the time in seconds since 1970."""
        return int(self.now.timestamp())

    def changed(self, kind: ChangeKind, key: str, node: Node | None = None) -> None:
        """Note something caches have to look at; a node as it is now spares our own the look."""
        self.changes[kind, key] = node
