"""CA journals: one row for each server."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sqlalchemy import delete, insert, select, update

from spire_hw.errors import NotFoundError
from spire_hw_server.datastore.records import JournalRow
from spire_hw_server.datastore.sql.models import ca_journals
from spire_hw_server.datastore.sql.sets import new_row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw_server.datastore.sql.transaction import Transaction


def find(tx: Transaction, x509_authority_ids: Sequence[str]) -> JournalRow | None:
    """Return a journal by its active authority; see `Datastore.find_journal`."""
    wanted = [i for i in dict.fromkeys(x509_authority_ids) if i]
    if not wanted:
        return None
    row = tx.connection.execute(
        select(ca_journals)
        .where(ca_journals.c.active_x509_authority_id.in_(wanted))
        .order_by(ca_journals.c.row_id.desc())
        .limit(1)
    ).one_or_none()
    if row is None:
        return None
    return JournalRow(row.row_id, row.active_x509_authority_id, bytes(row.data))


def save(tx: Transaction, journal: JournalRow) -> JournalRow:
    """Store a journal; see `Datastore.save_journal`."""
    values = {
        "active_x509_authority_id": journal.active_x509_authority_id,
        "data": journal.data,
    }
    if not journal.row_id:
        result = tx.connection.execute(insert(ca_journals).values(values))
        return replace(journal, row_id=new_row(result))
    changed = tx.connection.execute(
        update(ca_journals).where(ca_journals.c.row_id == journal.row_id).values(values)
    )
    if changed.rowcount != 1:
        raise _missing(journal.row_id)
    return journal


def list_all(tx: Transaction) -> list[JournalRow]:
    """Return all journals, oldest first; see `Datastore.list_journals`."""
    rows = tx.connection.execute(select(ca_journals).order_by(ca_journals.c.row_id))
    return [JournalRow(r.row_id, r.active_x509_authority_id, bytes(r.data)) for r in rows]


def delete_one(tx: Transaction, row_id: int) -> None:
    """Delete a journal; see `Datastore.delete_journal`."""
    gone = tx.connection.execute(delete(ca_journals).where(ca_journals.c.row_id == row_id))
    if gone.rowcount != 1:
        raise _missing(row_id)


def _missing(row_id: int) -> NotFoundError:
    return NotFoundError(f"there is no CA journal {row_id}")
