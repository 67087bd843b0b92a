"""Bundles of every trust domain, and how foreign ones are fetched."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, delete, func, insert, select, update

from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.errors import (
    AlreadyExistsError,
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    NotReadyError,
    SpireHwError,
)
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_server.datastore.records import BundleDeletion, ChangeKind, Federation
from spire_hw_server.datastore.sql import entries as entry_queries
from spire_hw_server.datastore.sql.models import bundles, entries, federations
from spire_hw_server.datastore.sql.sets import optional_moment, optional_seconds

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from spire_hw_server.datastore.sql.transaction import Transaction


def get(tx: Transaction, trust_domain: TrustDomain) -> Bundle:
    """Return a bundle; see `Datastore.get_bundle`."""
    return _bundle(_existing(tx, trust_domain))


def list_all(tx: Transaction) -> list[Bundle]:
    """Return all bundles; see `Datastore.list_bundles`."""
    rows = tx.connection.execute(select(bundles)).all()
    return sorted((_bundle(row) for row in rows), key=lambda b: b.trust_domain)


def append(tx: Transaction, bundle: Bundle) -> Bundle:
    """Merge authorities; see `Datastore.append_bundle`."""
    row = _row(tx, bundle.trust_domain, lock=True)
    if row is None:
        return _insert(tx, replace(bundle, sequence=_next_sequence(tx, 0)))
    return _replace(tx, row, _stored(_bundle(row).merged(bundle)))


def create(tx: Transaction, bundle: Bundle) -> Bundle:
    """Store a bundle that must not be there; see `Datastore.create_bundle`."""
    if _row(tx, bundle.trust_domain) is not None:
        raise AlreadyExistsError(f'a bundle of trust domain "{bundle.trust_domain}" exists')
    return _insert(tx, bundle)


def put(tx: Transaction, bundle: Bundle) -> Bundle:
    """Store a bundle as it is; see `Datastore.set_bundle`."""
    row = _row(tx, bundle.trust_domain, lock=True)
    if row is None:
        return _insert(tx, bundle)
    bundle = _stored(bundle)
    if bundle != _bundle(row):
        _update(tx, row, bundle)
    return bundle


def change(
    tx: Transaction, trust_domain: TrustDomain, function: Callable[[Bundle], Bundle]
) -> Bundle:
    """Change a bundle under its row's lock; see `Datastore.update_bundle`."""
    row = _existing(tx, trust_domain, lock=True)
    changed = function(_bundle(row))
    if changed.trust_domain != trust_domain:
        raise InvalidInputError("a change of a bundle cannot change its trust domain")
    return _replace(tx, row, _stored(changed))


def prune(tx: Transaction, trust_domain: TrustDomain, expired_before: datetime) -> bool:
    """Drop expired authorities; see `Datastore.prune_bundle`."""
    row = _existing(tx, trust_domain, lock=True)
    before = _bundle(row)
    return _replace(tx, row, before.pruned(expired_before)).sequence != before.sequence


def delete_one(tx: Transaction, trust_domain: TrustDomain, mode: BundleDeletion) -> None:
    """Delete a bundle; see `Datastore.delete_bundle`."""
    row = _existing(tx, trust_domain, lock=True)
    condition = entry_queries.federating(trust_domain)
    if mode is BundleDeletion.DELETE:
        entry_queries.delete_where(tx, condition)
    elif mode is BundleDeletion.DISSOCIATE:
        entry_queries.dissociate(tx, trust_domain)
    else:
        users = tx.connection.scalar(select(func.count()).select_from(entries).where(condition))
        if users:
            raise NotReadyError(
                f'{users} entries federate with trust domain "{trust_domain}"; delete or'
                " dissociate them, or choose a mode that does"
            )
    tx.connection.execute(delete(bundles).where(bundles.c.row_id == row.row_id))
    tx.changed(ChangeKind.BUNDLE, trust_domain.name)


def create_federation(tx: Transaction, federation: Federation) -> Federation:
    """Store a new relationship; see `Datastore.create_federation`."""
    if _federation_row(tx, federation.trust_domain) is not None:
        raise AlreadyExistsError(
            f'a federation relationship with "{federation.trust_domain}" exists'
        )
    tx.connection.execute(insert(federations).values(_federation_values(federation)))
    tx.changed(ChangeKind.FEDERATION, federation.trust_domain.name)
    return federation


def get_federation(tx: Transaction, trust_domain: TrustDomain) -> Federation:
    """Return a relationship; see `Datastore.get_federation`."""
    return _federation(_existing_federation(tx, trust_domain))


def list_federations(tx: Transaction) -> list[Federation]:
    """Return all relationships; see `Datastore.list_federations`."""
    rows = tx.connection.execute(select(federations)).all()
    return sorted((_federation(row) for row in rows), key=lambda f: f.trust_domain)


def update_federation(tx: Transaction, federation: Federation) -> Federation:
    """Replace a relationship; see `Datastore.update_federation`."""
    row = _existing_federation(tx, federation.trust_domain)
    tx.connection.execute(
        update(federations)
        .where(federations.c.row_id == row.row_id)
        .values(_federation_values(federation))
    )
    tx.changed(ChangeKind.FEDERATION, federation.trust_domain.name)
    return federation


def delete_federation(tx: Transaction, trust_domain: TrustDomain) -> None:
    """Delete a relationship; see `Datastore.delete_federation`."""
    row = _existing_federation(tx, trust_domain)
    tx.connection.execute(delete(federations).where(federations.c.row_id == row.row_id))
    tx.changed(ChangeKind.FEDERATION, trust_domain.name)


def _next_sequence(tx: Transaction, sequence: int) -> int:
    return max(sequence + 1, tx.now_s)


def _replace(tx: Transaction, row: Row[Any], bundle: Bundle) -> Bundle:
    before = _bundle(row)
    bundle = replace(bundle, sequence=before.sequence)
    if bundle == before:
        return before
    bundle = replace(bundle, sequence=_next_sequence(tx, before.sequence))
    _update(tx, row, bundle)
    return bundle


def _insert(tx: Transaction, bundle: Bundle) -> Bundle:
    bundle = _stored(bundle)
    tx.connection.execute(insert(bundles).values(_values(bundle)))
    tx.changed(ChangeKind.BUNDLE, bundle.trust_domain.name)
    return bundle


def _update(tx: Transaction, row: Row[Any], bundle: Bundle) -> None:
    tx.connection.execute(
        update(bundles).where(bundles.c.row_id == row.row_id).values(_values(bundle))
    )
    tx.changed(ChangeKind.BUNDLE, bundle.trust_domain.name)


def _row(tx: Transaction, trust_domain: TrustDomain, *, lock: bool = False) -> Row[Any] | None:
    query = select(bundles).where(bundles.c.trust_domain == trust_domain.name)
    return tx.connection.execute(query.with_for_update() if lock else query).one_or_none()


def _existing(tx: Transaction, trust_domain: TrustDomain, *, lock: bool = False) -> Row[Any]:
    row = _row(tx, trust_domain, lock=lock)
    if row is None:
        raise NotFoundError(f'there is no bundle of trust domain "{trust_domain}"')
    return row


def _federation_row(tx: Transaction, trust_domain: TrustDomain) -> Row[Any] | None:
    query = select(federations).where(federations.c.trust_domain == trust_domain.name)
    return tx.connection.execute(query).one_or_none()


def _existing_federation(tx: Transaction, trust_domain: TrustDomain) -> Row[Any]:
    row = _federation_row(tx, trust_domain)
    if row is None:
        raise NotFoundError(f'there is no federation relationship with "{trust_domain}"')
    return row


def _stored(bundle: Bundle) -> Bundle:
    """Return the bundle as reading it back gives it: times in whole seconds."""
    keys = tuple(
        replace(key, expires_at=optional_moment(optional_seconds(key.expires_at)))
        for key in bundle.jwt_authorities
    )
    return replace(bundle, jwt_authorities=keys)


def _values(bundle: Bundle) -> dict[str, Any]:
    content = {
        "x509": [[_text(root.der), root.tainted] for root in bundle.x509_authorities],
        "jwt": [
            [key.kid, _text(key.pkix), optional_seconds(key.expires_at), key.tainted]
            for key in bundle.jwt_authorities
        ],
    }
    return {
        "trust_domain": bundle.trust_domain.name,
        "sequence": bundle.sequence,
        "refresh_hint_s": bundle.refresh_hint_s,
        "authorities": json.dumps(content, separators=(",", ":")).encode(),
    }


def _bundle(row: Row[Any]) -> Bundle:
    try:
        content = json.loads(bytes(row.authorities))
        roots = [X509Root(base64.b64decode(der), tainted) for der, tainted in content["x509"]]
        keys = [
            JwtAuthority(kid, base64.b64decode(pkix), optional_moment(expires_at), tainted)
            for kid, pkix, expires_at, tainted in content["jwt"]
        ]
    except (ValueError, KeyError, TypeError) as e:
        raise SpireHwError(
            f'the stored bundle of trust domain "{row.trust_domain}" is damaged',
            kind=ErrorKind.INTERNAL,
        ) from e
    return Bundle(
        trust_domain=TrustDomain.parse(row.trust_domain),
        x509_authorities=tuple(roots),
        jwt_authorities=tuple(keys),
        refresh_hint_s=row.refresh_hint_s,
        sequence=row.sequence,
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _federation_values(federation: Federation) -> dict[str, Any]:
    endpoint = federation.endpoint_spiffe_id
    return {
        "trust_domain": federation.trust_domain.name,
        "bundle_endpoint_url": federation.bundle_endpoint_url,
        "endpoint_spiffe_id": None if endpoint is None else endpoint.text,
    }


def _federation(row: Row[Any]) -> Federation:
    endpoint = row.endpoint_spiffe_id
    return Federation(
        trust_domain=TrustDomain.parse(row.trust_domain),
        bundle_endpoint_url=row.bundle_endpoint_url,
        endpoint_spiffe_id=None if endpoint is None else SpiffeId(endpoint),
    )
