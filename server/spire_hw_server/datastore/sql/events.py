"""Changes in the order they became visible: what caches of every server follow.

The counter's row is locked until the transaction ends, so numbers have no gaps and no number
becomes visible after a higher one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import bindparam, delete, insert, select, update

from spire_hw_server.datastore.interface import Change, ChangeKind
from spire_hw_server.datastore.sql.models import changes, counters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import Connection

_COUNTER = "change"
_LAST = select(counters.c.value).where(counters.c.name == bindparam("counter"))
_COUNT_UP = (
    update(counters)
    .where(counters.c.name == bindparam("counter"))
    .values(value=counters.c.value + bindparam("made"))
)
_INSERT = insert(changes)


def record(connection: Connection, made: Sequence[tuple[ChangeKind, str]], now_s: int) -> int:
    """Store changes as the last thing of a transaction; return the last number, 0 for none."""
    unique = list(dict.fromkeys(made))
    if not unique:
        return 0
    connection.execute(_COUNT_UP, {"counter": _COUNTER, "made": len(unique)})
    last = last_change(connection)
    first = last - len(unique) + 1
    connection.execute(
        _INSERT,
        [
            {"event_id": first + i, "kind": kind.value, "key": key, "created_at": now_s}
            for i, (kind, key) in enumerate(unique)
        ],
    )
    return last


def last_change(connection: Connection) -> int:
    """Return the number of the last change."""
    value = connection.scalar(_LAST, {"counter": _COUNTER})
    return int(value or 0)


def list_changes(connection: Connection, after: int, limit: int) -> list[Change]:
    """Return at most `limit` changes with numbers above `after`."""
    rows = connection.execute(
        select(changes.c.event_id, changes.c.kind, changes.c.key)
        .where(changes.c.event_id > after)
        .order_by(changes.c.event_id)
        .limit(limit)
    )
    return [Change(row.event_id, ChangeKind(row.kind), row.key) for row in rows]


def prune(connection: Connection, made_before_s: int) -> int:
    """Delete changes made before a moment."""
    return connection.execute(delete(changes).where(changes.c.created_at < made_before_s)).rowcount
