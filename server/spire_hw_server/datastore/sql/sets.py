"""Sets of selectors and trust domains: digests, JSON, and the four ways to match them in SQL."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, exists, func, not_, select

from spire_hw.errors import InvalidInputError, SpireHwError
from spire_hw_server.datastore.records import Match

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Column, ColumnElement, CursorResult, Table

    from spire_hw.selector import Selector

_MAX_ASKED: Final = 1000


@lru_cache(maxsize=4096)
def selector_digest(selector: Selector) -> bytes:
    """Return the digest a selector is found by; most of a node's are those of many others."""
    kind, value = selector.type.encode(), selector.value.encode()
    framed = len(kind).to_bytes(4, "big") + kind + len(value).to_bytes(4, "big") + value
    return hashlib.sha256(framed).digest()


def similar_digest(spiffe_id: str, parent_id: str, selectors: Iterable[Selector]) -> bytes:
    """Return the digest that two similar entries share."""
    parts = [spiffe_id, parent_id]
    for selector in sorted(set(selectors)):
        parts += selector
    return _digest(parts)


def _digest(parts: Iterable[str]) -> bytes:
    state = hashlib.sha256()
    for part in parts:
        data = part.encode()
        state.update(len(data).to_bytes(4, "big"))
        state.update(data)
    return state.digest()


def encode_selectors(selectors: Iterable[Selector]) -> str:
    """Return selectors as JSON: a list of [type, value]."""
    return encode_list([selector.type, selector.value] for selector in selectors)


def encode_list(items: Iterable[Any]) -> str:
    """Return a list as ASCII JSON, "" when it is empty."""
    values = list(items)
    return json.dumps(values, separators=(",", ":")) if values else ""


def decode_list(text: str) -> list[Any]:
    """Return what `encode_list` was given."""
    values: list[Any] = json.loads(text) if text else []
    return values


def matching(
    members: Table, owner: Column[Any], member: Column[Any], how: Match, asked: Sequence[Any]
) -> ColumnElement[bool]:
    """Return the condition that the set of a row matches.

    Args:
        members: table of (owner, member) pairs.
        owner: its column that is the row number of the set's owner.
        member: its column that holds the member.
        how: kind of match.
        asked: the set to match with, in the form `member` has.

    Raises:
        InvalidInputError: the set is empty or too large.
    """
    wanted = list(dict.fromkeys(asked))
    if not wanted:
        raise InvalidInputError("an empty set cannot be matched with")
    if len(wanted) > _MAX_ASKED:
        raise InvalidInputError(f"more than {_MAX_ASKED} items to match with")
    parent = next(iter(owner.foreign_keys)).column
    hit = member.in_(wanted)
    holders = select(owner).where(hit)
    other = members.alias()
    stranger = exists().where(
        and_(other.c[owner.name] == parent, not_(other.c[member.name].in_(wanted)))
    )
    complete = holders.group_by(owner).having(func.count() == len(wanted))
    match how:
        case Match.ANY:
            return parent.in_(holders)
        case Match.SUBSET:
            return and_(parent.in_(holders), not_(stranger))
        case Match.SUPERSET:
            return parent.in_(complete)
        case Match.EXACT:
            return and_(parent.in_(complete), not_(stranger))


def seconds_of(moment: datetime) -> int:
    """Return a moment as whole seconds since 1970."""
    return int(moment.timestamp())


def optional_seconds(moment: datetime | None) -> int | None:
    """Return a moment as whole seconds since 1970; None stays None."""
    return None if moment is None else int(moment.timestamp())


def moment_of(seconds: int) -> datetime:
    """Return whole seconds since 1970 as a moment in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def optional_moment(seconds: int | None) -> datetime | None:
    """Return whole seconds since 1970 as a moment in UTC; None stays None."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def new_row(result: CursorResult[Any]) -> int:
    """Return the number of the row an INSERT made."""
    key = result.inserted_primary_key
    if key is None:
        raise SpireHwError("the database did not tell the number of a new row")
    number: int = key[0]
    return number
