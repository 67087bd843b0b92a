"""TPMs that were enrolled by the hash of their endorsement key."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import delete, insert, select, update

from spire_hw.errors import InvalidInputError, NotFoundError
from spire_hw_server.datastore.records import MAX_EK_COMMENT, MAX_EK_OWNER, EkChange, EnrolledEk
from spire_hw_server.datastore.sql.models import enrolled_eks
from spire_hw_server.datastore.sql.sets import moment_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw_server.datastore.sql.transaction import Transaction

_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PART: Final = 500


def allow(tx: Transaction, ek: EnrolledEk) -> EnrolledEk:
    """Enroll a TPM; see `Datastore.allow_ek`."""
    enroll(tx, [ek])
    query = select(enrolled_eks.c.created_at).where(enrolled_eks.c.ek_hash == ek.ek_hash)
    return replace(ek, created_at=moment_of(tx.connection.execute(query).scalar_one()))


def enroll(tx: Transaction, eks: Sequence[EnrolledEk]) -> list[EkChange]:
    """Enroll TPMs; see `Datastore.enroll_eks`."""
    changes = compare(tx, eks, lock=True)
    added = [ek for ek, change in zip(eks, changes, strict=True) if change is EkChange.ADDED]
    if added:
        rows = [{**_columns(ek), "created_at": tx.now_s} for ek in added]
        tx.connection.execute(insert(enrolled_eks), rows)
    for ek, change in zip(eks, changes, strict=True):
        if change is EkChange.UPDATED:
            where = enrolled_eks.c.ek_hash == ek.ek_hash
            tx.connection.execute(update(enrolled_eks).where(where).values(**_columns(ek)))
    return changes


def compare(tx: Transaction, eks: Sequence[EnrolledEk], *, lock: bool = False) -> list[EkChange]:
    """Return what enrolling TPMs would do to the list; `lock` for a writer."""
    for ek in eks:
        _check(ek)
    known: dict[str, EnrolledEk] = {}
    hashes = sorted({ek.ek_hash for ek in eks})
    if len(hashes) != len(eks):
        raise InvalidInputError("the same EK hash twice")
    for start in range(0, len(hashes), _PART):
        query = select(enrolled_eks).where(
            enrolled_eks.c.ek_hash.in_(hashes[start : start + _PART])
        )
        rows = tx.connection.execute(query.with_for_update() if lock else query)
        known |= {row.ek_hash: _decode(row) for row in rows}
    found = []
    for ek in eks:
        old = known.get(ek.ek_hash)
        if old is None:
            found.append(EkChange.ADDED)
        elif (old.comment, old.owner) == (ek.comment, ek.owner):
            found.append(EkChange.UNCHANGED)
        else:
            found.append(EkChange.UPDATED)
    return found


def _check(ek: EnrolledEk) -> None:
    if _HASH.fullmatch(ek.ek_hash) is None:
        raise InvalidInputError("EK hash is not 64 lower-case hexadecimal digits")
    if len(ek.comment) > MAX_EK_COMMENT:
        raise InvalidInputError(f"comment is longer than {MAX_EK_COMMENT} characters")
    if len(ek.owner) > MAX_EK_OWNER:
        raise InvalidInputError(f"owner is longer than {MAX_EK_OWNER} characters")


def _columns(ek: EnrolledEk) -> dict[str, str]:
    return {"ek_hash": ek.ek_hash, "comment": ek.comment, "owner": ek.owner}


def _decode(row: Any) -> EnrolledEk:
    # Rows from before there were owners have none.
    return EnrolledEk(row.ek_hash, row.comment, moment_of(row.created_at), row.owner or "")


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
    return [_decode(row) for row in rows]


def is_allowed(tx: Transaction, ek_hash: str) -> bool:
    """Tell whether a TPM is enrolled; see `Datastore.is_ek_allowed`."""
    if _HASH.fullmatch(ek_hash) is None:
        return False
    query = select(enrolled_eks.c.row_id).where(enrolled_eks.c.ek_hash == ek_hash)
    return tx.connection.execute(query).one_or_none() is not None
