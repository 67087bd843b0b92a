"""Join tokens: found by digest, gone when taken."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, delete, insert, select

from spire_hw.errors import AlreadyExistsError, InvalidInputError, NotFoundError
from spire_hw_server.datastore.records import Entry, JoinToken
from spire_hw_server.datastore.sql import entries as entry_queries
from spire_hw_server.datastore.sql.models import entries, join_tokens
from spire_hw_server.datastore.sql.sets import moment_of, seconds_of

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw_server.datastore.sql.transaction import Transaction


def create(tx: Transaction, token: JoinToken, alias: Entry | None) -> None:
    """Store a token and its alias; see `Datastore.create_join_token`."""
    if not token.value:
        raise InvalidInputError("join token is empty")
    digest = _digest(token.value)
    if _row(tx, digest) is not None:
        raise AlreadyExistsError("this join token exists already")
    alias_id = None if alias is None else entry_queries.create(tx, alias).entry_id
    tx.connection.execute(
        insert(join_tokens).values(
            digest=digest, expires_at=seconds_of(token.expires_at), alias_entry_id=alias_id
        )
    )


def take(tx: Transaction, value: str) -> JoinToken:
    """Delete a token and return it; see `Datastore.take_join_token`."""
    digest = _digest(value)
    row = _row(tx, digest)
    gone = tx.connection.execute(delete(join_tokens).where(join_tokens.c.digest == digest))
    if row is None or gone.rowcount != 1:
        raise NotFoundError("there is no such join token")
    if row.expires_at <= tx.now_s:
        _delete_alias(tx, row.alias_entry_id)
    return JoinToken(value, moment_of(row.expires_at))


def prune(tx: Transaction, expired_before: datetime) -> int:
    """Delete unused tokens with their aliases; see `Datastore.prune_join_tokens`."""
    rows = tx.connection.execute(
        select(join_tokens.c.row_id, join_tokens.c.alias_entry_id)
        .where(join_tokens.c.expires_at < seconds_of(expired_before))
        .with_for_update()
    ).all()
    for row in rows:
        tx.connection.execute(delete(join_tokens).where(join_tokens.c.row_id == row.row_id))
        _delete_alias(tx, row.alias_entry_id)
    return len(rows)


def _delete_alias(tx: Transaction, entry_id: str | None) -> None:
    if entry_id is not None:
        entry_queries.delete_where(tx, entries.c.entry_id == entry_id)


def _row(tx: Transaction, digest: bytes) -> Row[Any, Any, Any] | None:
    query = select(
        join_tokens.c.row_id, join_tokens.c.expires_at, join_tokens.c.alias_entry_id
    ).where(join_tokens.c.digest == digest)
    return tx.connection.execute(query.with_for_update()).one_or_none()


def _digest(value: str) -> bytes:
    return hashlib.sha256(value.encode()).digest()
