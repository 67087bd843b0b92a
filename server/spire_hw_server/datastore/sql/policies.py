"""Versions of policies; they are only ever added, so a number means one text for good."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import func, insert, select

from spire_hw.errors import (
    AlreadyExistsError,
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    SpireHwError,
)
from spire_hw_server.datastore.records import ChangeKind, StoredPolicy
from spire_hw_server.datastore.sql.models import policies
from spire_hw_server.datastore.sql.sets import moment_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw_server.datastore.sql.transaction import Transaction

_NAME: Final = re.compile(r"[!-~]{1,255}", re.ASCII)
_SHA256: Final = re.compile(r"(?:[0-9a-f]{64})?", re.ASCII)
_MAX_VERSION: Final = 2**31 - 1
_MAX_TEXT: Final = 8 * 1024 * 1024
_MAX_NOTE: Final = 1024
_ABOUT: Final = (
    policies.c.name,
    policies.c.version,
    policies.c.sha256,
    policies.c.comment,
    policies.c.created_at,
    policies.c.created_by,
)


def add(tx: Transaction, policy: StoredPolicy, after: int) -> StoredPolicy:
    """Store a version; see `Datastore.add_policy`."""
    text = _check(policy, after)
    newest = (
        select(policies.c.version)
        .where(policies.c.name == policy.name)
        .order_by(policies.c.version.desc())
        .limit(1)
        .with_for_update()
    )
    found = tx.connection.execute(newest).scalar_one_or_none() or 0
    if found != after:
        raise AlreadyExistsError(
            f'policy "{policy.name}" has version {found}, not {after or "none"}: look at it first'
        )
    tx.connection.execute(
        insert(policies).values(
            name=policy.name,
            version=policy.version,
            text=text,
            sha256=policy.sha256,
            comment=policy.comment,
            created_at=tx.now_s,
            created_by=policy.created_by,
        )
    )
    tx.changed(ChangeKind.POLICY, policy.name)
    return replace(policy, created_at=moment_of(tx.now_s))


def list_newest(tx: Transaction) -> list[StoredPolicy]:
    """Return what is in force; see `Datastore.list_policies`."""
    newest = (
        select(policies.c.name, func.max(policies.c.version).label("version"))
        .group_by(policies.c.name)
        .subquery()
    )
    query = select(*_ABOUT, policies.c.text).join(
        newest, (policies.c.name == newest.c.name) & (policies.c.version == newest.c.version)
    )
    found = [_policy(row, _text(row)) for row in tx.connection.execute(query)]
    return _by_name(policy for policy in found if not policy.deleted)


def list_versions(tx: Transaction, name: str) -> list[StoredPolicy]:
    """Return a policy's versions; see `Datastore.list_policy_versions`."""
    if _NAME.fullmatch(name) is None:
        return []
    query = select(*_ABOUT).where(policies.c.name == name).order_by(policies.c.version)
    return [_policy(row, "") for row in tx.connection.execute(query)]


def get(tx: Transaction, name: str, version: int) -> StoredPolicy:
    """Return one version; see `Datastore.get_policy`."""
    row = None
    if _NAME.fullmatch(name) is not None and 0 <= version <= _MAX_VERSION:
        query = select(*_ABOUT, policies.c.text).where(policies.c.name == name)
        if version:
            query = query.where(policies.c.version == version)
        query = query.order_by(policies.c.version.desc()).limit(1)
        row = tx.connection.execute(query).one_or_none()
    if row is None or (not version and not row.sha256):
        what = f"version {version} of a policy" if version else "policy"
        raise NotFoundError(f"the datastore has no {what} of that name")
    return _policy(row, _text(row))


def _check(policy: StoredPolicy, after: int) -> bytes:
    if _NAME.fullmatch(policy.name) is None:
        raise InvalidInputError("policy name is not 1 to 255 printable ASCII characters")
    if not max(after, 0) < policy.version <= _MAX_VERSION:
        raise InvalidInputError(f"version {policy.version} does not follow version {after}")
    if _SHA256.fullmatch(policy.sha256) is None or bool(policy.sha256) != bool(policy.text):
        raise InvalidInputError("digest of a policy is not 64 lower-case hexadecimal digits")
    try:
        text = policy.text.encode()
        notes = [policy.comment.encode(), policy.created_by.encode()]
    except UnicodeEncodeError as e:
        raise InvalidInputError("text of a policy is not Unicode: lone surrogate") from e
    if len(text) > _MAX_TEXT:
        raise InvalidInputError(f"policy is larger than {_MAX_TEXT} bytes; use policy_dir for it")
    if any(len(note) > _MAX_NOTE for note in notes):
        raise InvalidInputError(f"comment or author is longer than {_MAX_NOTE} bytes")
    return text


def _policy(row: Any, text: str) -> StoredPolicy:
    return StoredPolicy(
        name=row.name,
        version=row.version,
        text=text,
        sha256=row.sha256,
        comment=row.comment,
        created_at=moment_of(row.created_at),
        created_by=row.created_by,
    )


def _text(row: Any) -> str:
    try:
        return bytes(row.text).decode()
    except UnicodeDecodeError as e:
        raise SpireHwError(
            f'the stored policy "{row.name}" is damaged', kind=ErrorKind.INTERNAL
        ) from e


def _by_name(found: Iterable[StoredPolicy]) -> list[StoredPolicy]:
    return sorted(found, key=lambda policy: policy.name)
