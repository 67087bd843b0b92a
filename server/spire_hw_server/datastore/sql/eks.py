"""TPMs that were enrolled by the hash of their endorsement key."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from sqlalchemy import delete, insert, select, update

from spire_hw.errors import InvalidInputError, NotFoundError
from spire_hw_server.datastore.interface import EnrolledEk
from spire_hw_server.datastore.sql.models import enrolled_eks
from spire_hw_server.datastore.sql.sets import moment_of

if TYPE_CHECKING:
    from spire_hw_server.datastore.sql.transaction import Transaction

_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MAX_COMMENT: Final = 1024


def allow(tx: Transaction, ek: EnrolledEk) -> EnrolledEk:
    """Enroll a TPM; see `Datastore.allow_ek`."""
    if _HASH.fullmatch(ek.ek_hash) is None:
        raise InvalidInputError("EK hash is not 64 lower-case hexadecimal digits")
    if len(ek.comment) > _MAX_COMMENT:
        raise InvalidInputError(f"comment is longer than {_MAX_COMMENT} characters")
    query = select(enrolled_eks).where(enrolled_eks.c.ek_hash == ek.ek_hash).with_for_update()
    row = tx.connection.execute(query).one_or_none()
    if row is None:
        tx.connection.execute(
            insert(enrolled_eks).values(ek_hash=ek.ek_hash, comment=ek.comment, created_at=tx.now_s)
        )
        return replace(ek, created_at=moment_of(tx.now_s))
    tx.connection.execute(
        update(enrolled_eks).where(enrolled_eks.c.row_id == row.row_id).values(comment=ek.comment)
    )
    return replace(ek, created_at=moment_of(row.created_at))


def deny(tx: Transaction, ek_hash: str) -> None:
    """Take a TPM off the list; see `Datastore.deny_ek`."""
    gone = 0
    if _HASH.fullmatch(ek_hash) is not None:
        statement = delete(enrolled_eks).where(enrolled_eks.c.ek_hash == ek_hash)
        gone = tx.connection.execute(statement).rowcount
    if gone != 1:
        raise NotFoundError("there is no enrolled TPM with that EK hash")


def list_all(tx: Transaction) -> list[EnrolledEk]:
    """Return all enrolled TPMs, oldest first; see `Datastore.list_eks`."""
    rows = tx.connection.execute(select(enrolled_eks).order_by(enrolled_eks.c.row_id))
    return [EnrolledEk(row.ek_hash, row.comment, moment_of(row.created_at)) for row in rows]


def is_allowed(tx: Transaction, ek_hash: str) -> bool:
    """Tell whether a TPM is enrolled; see `Datastore.is_ek_allowed`."""
    if _HASH.fullmatch(ek_hash) is None:
        return False
    query = select(enrolled_eks.c.row_id).where(enrolled_eks.c.ek_hash == ek_hash)
    return tx.connection.execute(query).one_or_none() is not None
