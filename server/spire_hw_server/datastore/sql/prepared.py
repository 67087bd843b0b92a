"""Statements of the hot paths: written with SQLAlchemy, in SQLite run by the driver's own cursor.

SQLAlchemy takes 40 to 60 us of CPU for each execution, SQLite itself 5 to 10. With other databases
the way there and back decides, and SQLAlchemy runs the statement.
"""

from __future__ import annotations

import sqlite3
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import LargeBinary, String, TypeDecorator, exc
from sqlalchemy.dialects.sqlite import pysqlite

from spire_hw.errors import SpireHwError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import Delete, Insert, Select, Update
    from sqlalchemy.types import TypeEngine

    from spire_hw_server.datastore.sql.transaction import Transaction

_SQLITE: Final = pysqlite.dialect()
_ROWS_AT_ONCE: Final = 64


class Prepared:
    """A statement whose parameters are all given by name when it runs; made once per process."""

    def __init__(self, statement: Select[Any] | Insert | Update | Delete) -> None:
        self._statement = statement
        compiled = statement.compile(dialect=_SQLITE)
        self._sql = compiled.string
        self._writers = [
            (name, _writer(compiled.binds[name].type)) for name in compiled.positiontup or ()
        ]
        row = f"({', '.join('?' * len(self._writers))})"
        self._row_more = f", {row}" if self._sql.endswith(f" VALUES {row}") else None
        self._readers = [
            column.type.dialect_impl(_SQLITE).result_processor(_SQLITE, None)
            for column in statement.exported_columns
        ]

    def fetch(self, tx: Transaction, **parameters: Any) -> Sequence[Sequence[Any]]:
        """Return the rows: columns in the order the statement names them."""
        if tx.driver is None:
            return tx.connection.execute(self._statement, parameters).all()
        cursor = self._execute(tx.driver.execute, self._values(parameters))
        try:
            return [self._row(row) for row in cursor]
        except sqlite3.Error as e:
            raise translated(e) from e

    def run(self, tx: Transaction, *parameters: Mapping[str, Any]) -> None:
        """Run a statement that gives no rows, once for each set of parameters."""
        if tx.driver is None:
            if parameters:
                tx.connection.execute(self._statement, parameters)
        elif len(parameters) == 1:
            self._execute(tx.driver.execute, self._values(parameters[0]))
        elif self._row_more is not None and 1 < len(parameters) <= _ROWS_AT_ONCE:
            # One statement: the interpreter is let go and taken back for each.
            sql = self._sql + self._row_more * (len(parameters) - 1)
            values = [value for one in parameters for value in self._values(one)]
            self._execute(tx.driver.execute, values, sql)
        else:
            self._execute(tx.driver.executemany, [self._values(one) for one in parameters])

    def insert(self, tx: Transaction, parameters: Mapping[str, Any]) -> int:
        """Run an INSERT of one row and return the number the database gave it."""
        if tx.driver is None:
            key = tx.connection.execute(self._statement, parameters).inserted_primary_key
            number = None if key is None else key[0]
        else:
            number = self._execute(tx.driver.execute, self._values(parameters)).lastrowid
        if number is None:
            raise SpireHwError("the database did not tell the number of a new row")
        return int(number)

    def _values(self, parameters: Mapping[str, Any]) -> list[Any]:
        return [
            parameters[name] if write is None else write(parameters[name])
            for name, write in self._writers
        ]

    def _row(self, row: Sequence[Any]) -> Sequence[Any]:
        return [
            value if read is None else read(value)
            for value, read in zip(row, self._readers, strict=True)
        ]

    def _execute(
        self, execute: Callable[[str, Any], sqlite3.Cursor], values: Sequence[Any], sql: str = ""
    ) -> sqlite3.Cursor:
        try:
            return execute(sql or self._sql, values)
        except sqlite3.Error as e:
            raise translated(e) from e


def _writer(kind: TypeEngine[Any]) -> Callable[[Any], Any] | None:
    """Return what makes a value fit to be stored, None where it is already.

    SQLite's driver takes text and bytes as they are; SQLAlchemy would wrap each.
    """
    if isinstance(kind, TypeDecorator) and isinstance(kind.impl_instance, (String, LargeBinary)):
        if type(kind).process_bind_param is TypeDecorator.process_bind_param:
            return None
        return partial(kind.process_bind_param, dialect=_SQLITE)
    return kind.dialect_impl(_SQLITE).bind_processor(_SQLITE)


def translated(error: sqlite3.Error) -> BaseException:
    """Return an error of SQLite's as SQLAlchemy's, which is what callers know."""
    return exc.DBAPIError.instance(None, None, error, sqlite3.Error, hide_parameters=True)
