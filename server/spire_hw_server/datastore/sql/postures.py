"""What is known of nodes' machines: one row for each node, and the parts of its IMA list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import BigInteger, Integer, and_, bindparam, delete, insert, select, update

from spire_hw.errors import InvalidInputError
from spire_hw.spiffeid import SpiffeId
from spire_hw_server.datastore.records import BANNED, QUARANTINED, ImaPart, Posture
from spire_hw_server.datastore.sql import history
from spire_hw_server.datastore.sql.models import node_ima, node_postures, nodes
from spire_hw_server.datastore.sql.pages import after_row, fetch_page
from spire_hw_server.datastore.sql.prepared import Prepared
from spire_hw_server.datastore.sql.sets import (
    decode_list,
    encode_list,
    moment_of,
    optional_moment,
    optional_seconds,
    seconds_of,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime
    from typing import Any

    from spire_hw_server.datastore.records import Page, PostureUpdate, Sighting
    from spire_hw_server.datastore.sql.transaction import Transaction

_CHUNK: Final = 500
_MAX_REASONS: Final = 64
_MAX_REASON: Final = 64
_MAX_MESSAGE: Final = 1024
_MAX_BLOB_BYTES: Final = 8 << 20
_ABOUT: Final = [
    nodes.c.agent_id,
    *(c for c in node_postures.c if c.name not in {"node_row", "evidence"}),
]
_JOIN: Final = node_postures.join(nodes, nodes.c.row_id == node_postures.c.node_row)
_OF_NODE: Final = node_postures.c.node_row == bindparam("of_node")
_VALUES: Final = [c.name for c in node_postures.c if c.name != "node_row"]
_BRIEF: Final = [name for name in _VALUES if name != "evidence"]
_GET: Final = Prepared(
    select(*_ABOUT, node_postures.c.evidence)
    .select_from(_JOIN)
    .where(nodes.c.agent_id == bindparam("wanted"))
)
_RECORDS: Final = Prepared(select(node_postures.c.records).where(_OF_NODE))
_INSERT: Final = Prepared(
    insert(node_postures).values({name: bindparam(name) for name in ["node_row", *_VALUES]})
)
_UPDATE: Final = Prepared(
    update(node_postures).where(_OF_NODE).values({name: bindparam(name) for name in _VALUES})
)
_UPDATE_BRIEF: Final = Prepared(
    update(node_postures).where(_OF_NODE).values({name: bindparam(name) for name in _BRIEF})
)
_SEEN: Final = Prepared(
    select(node_postures.c.node_row)
    .select_from(_JOIN)
    .where(
        nodes.c.agent_id == bindparam("wanted"),
        node_postures.c.records == bindparam("expected", type_=Integer()),
        node_postures.c.since == bindparam("beginning", type_=BigInteger()),
    )
)
_TOUCH: Final = Prepared(
    update(node_postures)
    .where(_OF_NODE)
    .values(
        last_good_at=bindparam("last_good_at"),
        last_seen_at=bindparam("last_seen_at"),
        memory=bindparam("memory"),
    )
)
_DELETE_IMA: Final = Prepared(
    delete(node_ima).where(
        node_ima.c.node_row == bindparam("of_node"), node_ima.c.first >= bindparam("start")
    )
)
_INSERT_IMA: Final = Prepared(insert(node_ima))


def put(tx: Transaction, node_row: int, change: PostureUpdate) -> None:
    """Store a posture with its record and its part of the IMA list."""
    posture = change.posture
    _check(posture)
    rows = _RECORDS.fetch(tx, of_node=node_row)
    records: int = rows[0][0] if rows else 0
    if change.record is not None:
        records += 1
        history.add(tx, node_row, records, change.record)
    values = _values(posture) | {"records": records}
    if not rows:
        _INSERT.run(tx, values | {"node_row": node_row, "evidence": posture.evidence})
    elif posture.evidence is None:
        _UPDATE_BRIEF.run(tx, values | {"of_node": node_row})
    else:
        _UPDATE.run(tx, values | {"of_node": node_row, "evidence": posture.evidence})
    if change.ima is not None:
        _put_ima(tx, node_row, change.ima)


def note(tx: Transaction, sightings: Sequence[Sighting]) -> None:
    """Store good evidence that changed nothing else; see `Datastore.note_sightings`."""
    for one in sightings:
        rows = _SEEN.fetch(
            tx,
            wanted=one.agent_id.text,
            expected=one.records,
            beginning=seconds_of(one.since),
        )
        if not rows:
            continue
        at = seconds_of(one.last_good_at)
        values = {"last_good_at": at, "last_seen_at": at, "memory": one.memory}
        _TOUCH.run(tx, values | {"of_node": rows[0][0]})
        if one.ima is not None:
            _put_ima(tx, rows[0][0], one.ima)


def _put_ima(tx: Transaction, node_row: int, part: ImaPart) -> None:
    if len(part.entries) > _MAX_BLOB_BYTES:
        raise InvalidInputError(f"part of an IMA list is larger than {_MAX_BLOB_BYTES} bytes")
    _DELETE_IMA.run(tx, {"of_node": node_row, "start": part.first})
    values = {"node_row": node_row, "first": part.first, "entries": part.entries}
    _INSERT_IMA.run(tx, values)


def get(tx: Transaction, agent_id: SpiffeId) -> Posture | None:
    """Return what is known of a node's machine; see `Datastore.get_posture`."""
    rows = _GET.fetch(tx, wanted=agent_id.text)
    if not rows:
        return None
    *about, evidence = rows[0]
    return _posture(about, None if evidence is None else bytes(evidence))


def get_many(tx: Transaction, agent_ids: Collection[SpiffeId]) -> dict[SpiffeId, Posture]:
    """Return those that exist; see `Datastore.get_postures`."""
    wanted = [agent_id.text for agent_id in dict.fromkeys(agent_ids)]
    found: dict[SpiffeId, Posture] = {}
    for start in range(0, len(wanted), _CHUNK):
        part = nodes.c.agent_id.in_(wanted[start : start + _CHUNK])
        for row in tx.connection.execute(select(*_ABOUT).select_from(_JOIN).where(part)):
            posture = _posture(row)
            found[posture.agent_id] = posture
    return found


def list_page(tx: Transaction, page: Page) -> tuple[list[Posture], str]:
    """Return a part of all; see `Datastore.list_postures`."""
    query = (
        select(*_ABOUT, nodes.c.row_id)
        .select_from(_JOIN)
        .where(nodes.c.row_id > after_row(page))
        .order_by(nodes.c.row_id)
    )
    rows, token = fetch_page(tx, query, page)
    return [_posture(row[:-1]) for row in rows], token


def list_silent(tx: Transaction, since: datetime, limit: int) -> list[SpiffeId]:
    """Return nodes that showed nothing good since; see `Datastore.list_silent`."""
    silent = and_(
        node_postures.c.last_good_at < seconds_of(since),
        node_postures.c.state.in_(("attested", "drifted")),
    )
    query = (
        select(nodes.c.agent_id)
        .select_from(_JOIN)
        .where(silent)
        .order_by(node_postures.c.last_good_at, nodes.c.row_id)
        .limit(limit)
    )
    return [SpiffeId(row.agent_id) for row in tx.connection.execute(query)]


def list_ima(tx: Transaction, agent_id: SpiffeId) -> list[ImaPart]:
    """Return the parts of a node's IMA list; see `Datastore.list_ima`."""
    query = (
        select(node_ima.c.first, node_ima.c.entries)
        .join(nodes, nodes.c.row_id == node_ima.c.node_row)
        .where(nodes.c.agent_id == agent_id.text)
        .order_by(node_ima.c.first)
    )
    return [ImaPart(row.first, bytes(row.entries)) for row in tx.connection.execute(query)]


def quarantine_of(posture: Posture) -> str:
    """Return the reason code of a quarantine, "" when it is in none."""
    if posture.state != QUARANTINED:
        return ""
    return posture.reasons[0] if posture.reasons else QUARANTINED


def is_ban(posture: Posture) -> bool:
    """Tell whether a posture bans its node."""
    return posture.state == BANNED


def _check(posture: Posture) -> None:
    if len(posture.reasons) > _MAX_REASONS or any(len(r) > _MAX_REASON for r in posture.reasons):
        raise InvalidInputError("too many reasons, or one that is too long")
    if len(posture.message) > _MAX_MESSAGE:
        raise InvalidInputError(f"message is longer than {_MAX_MESSAGE} characters")
    if posture.evidence is not None and len(posture.evidence) > _MAX_BLOB_BYTES:
        raise InvalidInputError(f"evidence is larger than {_MAX_BLOB_BYTES} bytes")


def _values(posture: Posture) -> dict[str, Any]:
    return {
        "state": posture.state,
        "reasons": encode_list(posture.reasons),
        "message": posture.message,
        "since": seconds_of(posture.since),
        "last_good_at": optional_seconds(posture.last_good_at),
        "last_seen_at": optional_seconds(posture.last_seen_at),
        "policy": posture.policy,
        "policy_version": posture.policy_version,
        "memory": posture.memory,
    }


def _posture(row: Sequence[Any], evidence: bytes | None = None) -> Posture:
    """Return the posture of a row of `_ABOUT`."""
    agent_id, state, reasons, message, since, good_at, seen_at, policy, version, memory, records = (
        row
    )
    return Posture(
        agent_id=SpiffeId(agent_id),
        state=state,
        reasons=tuple(decode_list(reasons)),
        message=message,
        since=moment_of(since),
        last_good_at=optional_moment(good_at),
        last_seen_at=optional_moment(seen_at),
        policy=policy,
        policy_version=version,
        memory=memory,
        evidence=evidence,
        records=records,
    )
