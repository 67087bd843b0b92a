"""Registration entries: one row each, with rows beside it for what is matched in sets."""

from __future__ import annotations

import re
import uuid
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ColumnElement, Row, bindparam, delete, func, insert, select, update

from spire_hw.errors import AlreadyExistsError, InvalidInputError, NotFoundError
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_server.datastore.records import (
    ChangeKind,
    Entry,
    EntryFilter,
    EntryPage,
    Page,
    SimilarEntryError,
)
from spire_hw_server.datastore.sql.models import (
    bundles,
    entries,
    entry_federations,
    entry_selectors,
)
from spire_hw_server.datastore.sql.pages import after_row, fetch_page
from spire_hw_server.datastore.sql.sets import (
    decode_list,
    encode_list,
    encode_selectors,
    matching,
    moment_of,
    new_row,
    optional_moment,
    optional_seconds,
    seconds_of,
    selector_digest,
    similar_digest,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from datetime import datetime

    from spire_hw_server.datastore.sql.transaction import Transaction

_ENTRY_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)
_MAX_TTL_S: Final = 2**31 - 1
_MAX_HINT: Final = 1024
_MAX_JSON_BYTES: Final = 8 << 20
_CHUNK: Final = 500
# Statements of the hot paths are built once; building one takes longer than running it.
_INSERT: Final = insert(entries)
_INSERT_SELECTORS: Final = insert(entry_selectors)
_BY_ID: Final = select(entries).where(entries.c.entry_id == bindparam("wanted"))
_LOCK_BY_ID: Final = _BY_ID.with_for_update()
_SIMILAR: Final = select(entries).where(entries.c.similar_digest == bindparam("wanted"))
_OWN: Final = frozenset({"entry_id", "revision_number", "created_at"})
_REPLACEABLE: Final = frozenset(f.name for f in fields(Entry)) - _OWN


def create(tx: Transaction, entry: Entry) -> Entry:
    """Store a new entry; see `Datastore.create_entry`."""
    entry = normalized(entry)
    if entry.entry_id and _ENTRY_ID.fullmatch(entry.entry_id) is None:
        raise InvalidInputError("entry id is not 1 to 255 of letters, digits, '.', '-' and '_'")
    similar = _similar(tx, entry)
    if similar is not None:
        raise SimilarEntryError(similar)
    if entry.entry_id and _row(tx, entry.entry_id) is not None:
        raise AlreadyExistsError(f'entry id "{entry.entry_id}" is taken')
    _check_federations(tx, entry.federates_with)
    stored = replace(
        entry,
        entry_id=entry.entry_id or str(uuid.uuid4()),
        revision_number=0,
        created_at=moment_of(tx.now_s),
    )
    values = _values(stored) | {
        "entry_id": stored.entry_id,
        "created_at": tx.now_s,
        "revision_number": 0,
    }
    result = tx.connection.execute(_INSERT, values)
    number = new_row(result)
    _insert_selectors(tx, number, stored)
    _insert_federations(tx, number, stored)
    tx.changed(ChangeKind.ENTRY, stored.entry_id)
    return stored


def get(tx: Transaction, entry_id: str) -> Entry:
    """Return an entry; see `Datastore.get_entry`."""
    row = _row(tx, entry_id)
    if row is None:
        raise _missing(entry_id)
    return _entry(row)


def get_many(tx: Transaction, entry_ids: Collection[str]) -> dict[str, Entry]:
    """Return those that exist; see `Datastore.get_entries`."""
    wanted = [i for i in dict.fromkeys(entry_ids) if _ENTRY_ID.fullmatch(i) is not None]
    found: dict[str, Entry] = {}
    for start in range(0, len(wanted), _CHUNK):
        query = select(entries).where(entries.c.entry_id.in_(wanted[start : start + _CHUNK]))
        for row in tx.connection.execute(query):
            found[row.entry_id] = _entry(row)
    return {i: found[i] for i in wanted if i in found}


def list_page(tx: Transaction, where: EntryFilter, page: Page) -> EntryPage:
    """Return a part of the entries; see `Datastore.list_entries`."""
    query = (
        select(entries)
        .where(entries.c.row_id > after_row(page), *_conditions(where))
        .order_by(entries.c.row_id)
    )
    rows, token = fetch_page(tx, query, page)
    return EntryPage([_entry(row) for row in rows], token)


def count(tx: Transaction, where: EntryFilter) -> int:
    """Return the number of entries; see `Datastore.count_entries`."""
    query = select(func.count()).select_from(entries).where(*_conditions(where))
    return int(tx.connection.scalar(query) or 0)


def update_one(tx: Transaction, entry: Entry, names: frozenset[str] | None) -> Entry:
    """Replace attributes of an entry; see `Datastore.update_entry`."""
    wanted = _REPLACEABLE if names is None else names
    if not wanted <= _REPLACEABLE:
        unknown = ", ".join(sorted(wanted - _REPLACEABLE))
        raise InvalidInputError(f"these attributes of an entry cannot be replaced: {unknown}")
    row = _row(tx, entry.entry_id, lock=True)
    if row is None:
        raise _missing(entry.entry_id)
    before = _entry(row)
    after = normalized(replace(before, **{name: getattr(entry, name) for name in wanted}))
    after = replace(after, revision_number=before.revision_number + 1)
    similar = _similar(tx, after)
    if similar is not None and similar.entry_id != after.entry_id:
        raise SimilarEntryError(similar)
    _check_federations(tx, set(after.federates_with) - set(before.federates_with))
    _store(tx, row.row_id, before, after)
    return after


def _store(tx: Transaction, number: int, before: Entry, after: Entry) -> None:
    values = _values(after) | {"revision_number": after.revision_number}
    tx.connection.execute(update(entries).where(entries.c.row_id == number).values(values))
    if after.selectors != before.selectors:
        tx.connection.execute(delete(entry_selectors).where(entry_selectors.c.entry_row == number))
        _insert_selectors(tx, number, after)
    if after.federates_with != before.federates_with:
        tx.connection.execute(
            delete(entry_federations).where(entry_federations.c.entry_row == number)
        )
        _insert_federations(tx, number, after)
    tx.changed(ChangeKind.ENTRY, after.entry_id)


def delete_one(tx: Transaction, entry_id: str) -> Entry:
    """Delete an entry; see `Datastore.delete_entry`."""
    row = _row(tx, entry_id, lock=True)
    if row is None:
        raise _missing(entry_id)
    _delete(tx, [(row.row_id, row.entry_id)])
    return _entry(row)


def prune(tx: Transaction, expired_before: datetime) -> int:
    """Delete what expired; see `Datastore.prune_entries`."""
    return delete_where(tx, entries.c.expires_at < seconds_of(expired_before))


def delete_where(tx: Transaction, condition: ColumnElement[bool]) -> int:
    """Delete the entries that meet a condition and return how many there were."""
    query = select(entries.c.row_id, entries.c.entry_id).where(condition).with_for_update()
    rows = tx.connection.execute(query).all()
    _delete(tx, [(row.row_id, row.entry_id) for row in rows])
    return len(rows)


def _delete(tx: Transaction, doomed: Sequence[tuple[int, str]]) -> None:
    """Delete entries given as (row number, entry id)."""
    for start in range(0, len(doomed), _CHUNK):
        numbers = [number for number, _ in doomed[start : start + _CHUNK]]
        tx.connection.execute(delete(entries).where(entries.c.row_id.in_(numbers)))
    for _, entry_id in doomed:
        tx.changed(ChangeKind.ENTRY, entry_id)


def federating(trust_domain: TrustDomain) -> ColumnElement[bool]:
    """Return the condition that an entry federates with a trust domain."""
    return entries.c.row_id.in_(
        select(entry_federations.c.entry_row).where(
            entry_federations.c.trust_domain == trust_domain.name
        )
    )


def dissociate(tx: Transaction, trust_domain: TrustDomain) -> None:
    """Take a trust domain out of every entry that federates with it."""
    query = select(entries).where(federating(trust_domain)).with_for_update()
    for row in tx.connection.execute(query).all():
        before = _entry(row)
        rest = tuple(td for td in before.federates_with if td != trust_domain)
        changed = replace(before, federates_with=rest, revision_number=before.revision_number + 1)
        _store(tx, row.row_id, before, changed)


def normalized(entry: Entry) -> Entry:
    """Return the entry as it is stored: selectors sorted, nothing twice, times in seconds.

    Raises:
        InvalidInputError: it cannot be stored.
    """
    if not entry.selectors:
        raise InvalidInputError("an entry needs at least one selector")
    for ttl_s in (entry.x509_svid_ttl_s, entry.jwt_svid_ttl_s):
        if not 0 <= ttl_s <= _MAX_TTL_S:
            raise InvalidInputError("SVID lifetime is not between 0 and 2147483647 seconds")
    if len(entry.hint) > _MAX_HINT:
        raise InvalidInputError(f"hint is longer than {_MAX_HINT} characters")
    expires_at = entry.expires_at
    return replace(
        entry,
        selectors=tuple(sorted(set(entry.selectors))),
        federates_with=tuple(dict.fromkeys(entry.federates_with)),
        dns_names=tuple(dict.fromkeys(entry.dns_names)),
        expires_at=None if expires_at is None else moment_of(seconds_of(expires_at)),
    )


def _conditions(where: EntryFilter) -> Iterator[ColumnElement[bool]]:
    if where.spiffe_id is not None:
        yield entries.c.spiffe_id == where.spiffe_id.text
    if where.parent_id is not None:
        yield entries.c.parent_id == where.parent_id.text
    if where.hint is not None:
        if len(where.hint) > _MAX_HINT:
            raise InvalidInputError(f"hint is longer than {_MAX_HINT} characters")
        yield entries.c.hint == where.hint
    if where.downstream is not None:
        yield entries.c.downstream == where.downstream
    if where.selectors is not None:
        how, selectors = where.selectors
        table = entry_selectors
        asked = [selector_digest(s) for s in selectors]
        yield matching(table, table.c.entry_row, table.c.digest, how, asked)
    if where.federates_with is not None:
        how, trust_domains = where.federates_with
        table = entry_federations
        names = [td.name for td in trust_domains]
        yield matching(table, table.c.entry_row, table.c.trust_domain, how, names)


def _row(tx: Transaction, entry_id: str, *, lock: bool = False) -> Row[Any] | None:
    if _ENTRY_ID.fullmatch(entry_id) is None:
        return None
    query = _LOCK_BY_ID if lock else _BY_ID
    return tx.connection.execute(query, {"wanted": entry_id}).one_or_none()


def _similar(tx: Transaction, entry: Entry) -> Entry | None:
    digest = similar_digest(entry.spiffe_id.text, entry.parent_id.text, entry.selectors)
    row = tx.connection.execute(_SIMILAR, {"wanted": digest}).one_or_none()
    return None if row is None else _entry(row)


def _check_federations(tx: Transaction, trust_domains: Collection[TrustDomain]) -> None:
    for trust_domain in trust_domains:
        query = select(bundles.c.row_id).where(bundles.c.trust_domain == trust_domain.name)
        if tx.connection.execute(query).one_or_none() is None:
            raise InvalidInputError(
                f'there is no bundle of trust domain "{trust_domain}" to federate with'
            )


def _insert_selectors(tx: Transaction, number: int, entry: Entry) -> None:
    rows = [{"entry_row": number, "digest": selector_digest(s)} for s in entry.selectors]
    tx.connection.execute(_INSERT_SELECTORS, rows)


def _insert_federations(tx: Transaction, number: int, entry: Entry) -> None:
    rows = [{"entry_row": number, "trust_domain": td.name} for td in entry.federates_with]
    if rows:
        tx.connection.execute(insert(entry_federations), rows)


def _missing(entry_id: str) -> NotFoundError:
    shown = f' "{entry_id}"' if _ENTRY_ID.fullmatch(entry_id) else ""
    return NotFoundError(f"there is no entry{shown}")


def _values(entry: Entry) -> dict[str, Any]:
    selectors = encode_selectors(entry.selectors)
    dns_names = encode_list(entry.dns_names)
    if len(selectors) + len(dns_names) > _MAX_JSON_BYTES:
        raise InvalidInputError(f"an entry is larger than {_MAX_JSON_BYTES} bytes")
    return {
        "spiffe_id": entry.spiffe_id.text,
        "parent_id": entry.parent_id.text,
        "similar_digest": similar_digest(
            entry.spiffe_id.text, entry.parent_id.text, entry.selectors
        ),
        "x509_svid_ttl_s": entry.x509_svid_ttl_s,
        "jwt_svid_ttl_s": entry.jwt_svid_ttl_s,
        "admin": entry.admin,
        "downstream": entry.downstream,
        "store_svid": entry.store_svid,
        "disable_x509_svid_prefetch": entry.disable_x509_svid_prefetch,
        "jwt_svid_include_jti": entry.jwt_svid_include_jti,
        "expires_at": optional_seconds(entry.expires_at),
        "hint": entry.hint,
        "selectors": selectors,
        "dns_names": dns_names,
        "federates_with": encode_list(td.name for td in entry.federates_with),
    }


def _entry(row: Row[Any]) -> Entry:
    return Entry(
        entry_id=row.entry_id,
        spiffe_id=SpiffeId(row.spiffe_id),
        parent_id=SpiffeId(row.parent_id),
        selectors=tuple([Selector(kind, value) for kind, value in decode_list(row.selectors)]),
        x509_svid_ttl_s=row.x509_svid_ttl_s,
        jwt_svid_ttl_s=row.jwt_svid_ttl_s,
        federates_with=tuple([TrustDomain.parse(td) for td in decode_list(row.federates_with)]),
        admin=row.admin,
        downstream=row.downstream,
        expires_at=optional_moment(row.expires_at),
        dns_names=tuple(decode_list(row.dns_names)),
        revision_number=row.revision_number,
        store_svid=row.store_svid,
        hint=row.hint,
        created_at=moment_of(row.created_at),
        disable_x509_svid_prefetch=row.disable_x509_svid_prefetch,
        jwt_svid_include_jti=row.jwt_svid_include_jti,
    )
