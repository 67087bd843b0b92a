"""Changes in the order they became visible: what caches of every server follow.

The counter's row is locked until the transaction ends, so numbers have no gaps and no number
becomes visible after a higher one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import bindparam, delete, insert, select, update

from spire_hw_server.datastore.records import Change, ChangeKind
from spire_hw_server.datastore.sql.models import changes, counters
from spire_hw_server.datastore.sql.prepared import Prepared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import Connection

    from spire_hw_server.datastore.sql.transaction import Transaction

_COUNTER = "change"
_REMEMBERED = 1024
_LAST = select(counters.c.value).where(counters.c.name == bindparam("counter"))
_COUNT_UP = (
    update(counters)
    .where(counters.c.name == bindparam("counter"))
    .values(value=counters.c.value + bindparam("made"))
)
_COUNT = Prepared(_COUNT_UP.returning(counters.c.value))
_INSERT = Prepared(insert(changes))
_AFTER = (
    select(changes.c.event_id, changes.c.kind, changes.c.key)
    .where(changes.c.event_id > bindparam("after"))
    .order_by(changes.c.event_id)
    .limit(bindparam("wanted"))
)


def record(tx: Transaction) -> list[Change]:
    """Store what a transaction changed, as the last thing in it; return it with its numbers."""
    made = tx.changes
    if not made:
        return []
    first = _count_up(tx, len(made)) - len(made) + 1
    numbered = [
        Change(number, kind, key, node)
        for number, ((kind, key), node) in enumerate(made.items(), first)
    ]
    _INSERT.run(
        tx,
        *(
            {"event_id": c.event_id, "kind": c.kind.value, "key": c.key, "created_at": tx.now_s}
            for c in numbered
        ),
    )
    return numbered


def _count_up(tx: Transaction, made: int) -> int:
    """Return the number of the last of some new changes."""
    if tx.driver is not None or tx.connection.dialect.update_returning:
        ((last,),) = _COUNT.fetch(tx, counter=_COUNTER, made=made)
        return int(last)
    tx.connection.execute(_COUNT_UP, {"counter": _COUNTER, "made": made})
    return last_change(tx.connection)


class Recent:
    """The last changes made here, as long as their numbers have no gap; on one event loop."""

    def __init__(self, limit: int = _REMEMBERED) -> None:
        self._changes: list[Change] = []
        self._limit = limit

    def add(self, changes: Sequence[Change]) -> None:
        """Remember changes; what went before is forgotten where the numbers do not go on."""
        if self._changes and changes[0].event_id != self._changes[-1].event_id + 1:
            self._changes.clear()
        self._changes += changes
        if len(self._changes) > 2 * self._limit:
            del self._changes[: -self._limit]

    def since(self, after: int) -> list[Change]:
        """Return the changes from the one after a number on; empty when that one is not here."""
        if not self._changes or after + 1 < self._changes[0].event_id:
            return []
        return self._changes[after + 1 - self._changes[0].event_id :]


def last_change(connection: Connection) -> int:
    """Return the number of the last change."""
    value = connection.scalar(_LAST, {"counter": _COUNTER})
    return int(value or 0)


def list_changes(connection: Connection, after: int, limit: int) -> list[Change]:
    """Return at most `limit` changes with numbers above `after`."""
    rows = connection.execute(_AFTER, {"after": after, "wanted": limit})
    return [Change(row.event_id, ChangeKind(row.kind), row.key) for row in rows]


def prune(connection: Connection, made_before_s: int) -> int:
    """Delete changes made before a moment."""
    return connection.execute(delete(changes).where(changes.c.created_at < made_before_s)).rowcount
