"""Attested nodes and their selectors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    ColumnElement,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from spire_hw.errors import DeniedError, DeniedReason, InvalidInputError, NotFoundError
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId
from spire_hw_server.datastore.records import (
    LIFTED_BY_HAND,
    ChangeKind,
    KeyRole,
    Node,
    NodeFilter,
    NodePage,
    Page,
    QuarantinedError,
)
from spire_hw_server.datastore.sql import certificates as node_certificates
from spire_hw_server.datastore.sql import entries as entry_queries
from spire_hw_server.datastore.sql import keys as node_keys
from spire_hw_server.datastore.sql import postures
from spire_hw_server.datastore.sql.models import entries, node_selectors, nodes
from spire_hw_server.datastore.sql.pages import after_row, fetch_page
from spire_hw_server.datastore.sql.prepared import Prepared
from spire_hw_server.datastore.sql.sets import (
    decode_list,
    encode_selectors,
    matching,
    moment_of,
    optional_moment,
    optional_seconds,
    seconds_of,
    selector_digest,
    similar_digest,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from datetime import datetime

    from spire_hw_server.datastore.records import Certificates, NodeKeys, PostureUpdate
    from spire_hw_server.datastore.sql.transaction import Transaction

_VALUES: Final = [column.name for column in nodes.c if column.name != "row_id"]
_INSERT: Final = Prepared(insert(nodes).values({name: bindparam(name) for name in _VALUES}))
_UPDATE: Final = Prepared(
    update(nodes)
    .where(nodes.c.row_id == bindparam("number"))
    .values({name: bindparam(name) for name in _VALUES})
)
_DELETE_SELECTORS: Final = Prepared(
    delete(node_selectors).where(node_selectors.c.node_row == bindparam("number"))
)
_INSERT_SELECTORS: Final = Prepared(insert(node_selectors))
_BY_ID: Final = Prepared(select(nodes).where(nodes.c.agent_id == bindparam("wanted")))
_LOCK_BY_ID: Final = Prepared(
    select(nodes).where(nodes.c.agent_id == bindparam("wanted")).with_for_update()
)
# What a ban writes.
_BLANK: Final[dict[str, object]] = {
    "serial_number": "",
    "new_serial_number": "",
    "new_expires_at": None,
}
_CHUNK: Final = 500
_MAX_VERSION: Final = 255
_MAX_JSON_BYTES: Final = 8 << 20
_JOIN_TOKEN: Final = "join_token"  # noqa: S105 - a name


def put(
    tx: Transaction,
    node: Node,
    keys: NodeKeys,
    update: PostureUpdate | None,
    certificates: Certificates,
) -> Node:
    """Store a node; see `Datastore.put_node`."""
    _check_version(node.agent_version)
    if node.banned:
        raise InvalidInputError("a node is stored with a serial number; use ban_node to ban it")
    node = replace(
        node,
        selectors=tuple(sorted(set(node.selectors))),
        expires_at=moment_of(seconds_of(node.expires_at)),
        new_expires_at=optional_moment(optional_seconds(node.new_expires_at)),
        quarantine="" if update is None else postures.quarantine_of(update.posture),
    )
    row = _row(tx, node.agent_id, lock=True)
    stored = None if row is None else _node(row)
    if stored is not None and stored.banned:
        raise DeniedError(f'agent "{node.agent_id}" is banned', DeniedReason.AGENT_BANNED)
    _check_quarantine(stored, update)
    node_keys.check_free(tx, node.agent_id, keys)
    if row is None or stored is None:
        number = _INSERT.insert(tx, _values(node))
    else:
        number = row[0]
        if not node.agent_version:
            node = replace(node, agent_version=stored.agent_version)
        _UPDATE.run(tx, _values(node) | {"number": number})
    if stored is None or stored.selectors != node.selectors:
        _put_selectors(tx, number, node, is_new=stored is None)
    node_keys.replace_all(tx, number, keys, is_new=stored is None)
    node_certificates.replace(tx, number, certificates, is_new=stored is None)
    if update is not None:
        postures.put(tx, number, update)
    tx.changed(ChangeKind.NODE, node.agent_id.text, node)
    return node


def set_posture(tx: Transaction, update: PostureUpdate) -> Node:
    """Store what evidence or an operator changes; see `Datastore.set_posture`."""
    posture = update.posture
    row = _existing(tx, posture.agent_id, lock=True)
    stored = _node(row)
    if stored.banned:
        raise DeniedError(f'agent "{stored.agent_id}" is banned', DeniedReason.AGENT_BANNED)
    if not postures.is_ban(posture):  # which is more than any quarantine
        _check_quarantine(stored, update)
    postures.put(tx, row[0], update)
    changes: dict[str, object] = {"quarantine": postures.quarantine_of(posture) or None}
    if postures.is_ban(posture):
        changes |= _BLANK
    return _set(tx, row, **changes)


def _check_quarantine(stored: Node | None, update: PostureUpdate | None) -> None:
    """Refuse to lift a quarantine without evidence, and by evidence one that it does not end."""
    if stored is None or not stored.quarantine:
        return
    if update is None or (stored.quarantine in LIFTED_BY_HAND and not update.by_operator):
        raise QuarantinedError(stored.agent_id, stored.quarantine)


def _put_selectors(tx: Transaction, number: int, node: Node, *, is_new: bool) -> None:
    if not is_new:
        _DELETE_SELECTORS.run(tx, {"number": number})
    digests = sorted(map(selector_digest, node.selectors))
    _INSERT_SELECTORS.run(tx, *({"node_row": number, "digest": digest} for digest in digests))


def find(tx: Transaction, agent_id: SpiffeId, keys: NodeKeys) -> Node | None:
    """Return a node, None when there is none; see `Datastore.find_node`."""
    row = _row(tx, agent_id)
    node_keys.check_free(tx, agent_id, keys)
    return None if row is None else _node(row)


def find_by_attestation_key(tx: Transaction, digest: bytes) -> Node | None:
    """Return a node; see `Datastore.find_by_attestation_key`."""
    owner = node_keys.owner_of_attestation_key(tx, digest)
    row = None if owner is None else _row(tx, owner)
    return None if row is None else _node(row)


def get(tx: Transaction, agent_id: SpiffeId) -> Node:
    """Return a node; see `Datastore.get_node`."""
    return _node(_existing(tx, agent_id))


def get_many(tx: Transaction, agent_ids: Collection[SpiffeId]) -> dict[SpiffeId, Node]:
    """Return those that exist; see `Datastore.get_nodes`."""
    wanted = [agent_id.text for agent_id in dict.fromkeys(agent_ids)]
    found: dict[SpiffeId, Node] = {}
    for start in range(0, len(wanted), _CHUNK):
        query = select(nodes).where(nodes.c.agent_id.in_(wanted[start : start + _CHUNK]))
        for row in tx.connection.execute(query):
            node = _node(row)
            found[node.agent_id] = node
    return found


def list_page(tx: Transaction, where: NodeFilter, page: Page) -> NodePage:
    """Return a part of the nodes; see `Datastore.list_nodes`."""
    query = (
        select(nodes)
        .where(nodes.c.row_id > after_row(page), *_conditions(where))
        .order_by(nodes.c.row_id)
    )
    rows, token = fetch_page(tx, query, page)
    return NodePage([_node(row) for row in rows], token)


def count(tx: Transaction, where: NodeFilter) -> int:
    """Return the number of nodes; see `Datastore.count_nodes`."""
    query = select(func.count()).select_from(nodes).where(*_conditions(where))
    return int(tx.connection.scalar(query) or 0)


def set_serials(
    tx: Transaction,
    agent_id: SpiffeId,
    current: tuple[str, datetime],
    renewed: tuple[str, datetime | None],
    *,
    expected: str | None,
    new_key: bytes | None,
) -> Node:
    """Store serials; see `Datastore.set_node_serials`."""
    if not current[0]:
        raise InvalidInputError("the current serial number is empty; use ban_node to ban a node")
    row = _existing(tx, agent_id, lock=True)
    stored = _node(row)
    if stored.banned:
        raise DeniedError(f'agent "{agent_id}" is banned', DeniedReason.AGENT_BANNED)
    if expected is not None and stored.serial_number != expected:
        raise DeniedError(
            f'agent "{agent_id}" has attested anew since', DeniedReason.AGENT_NOT_ACTIVE
        )
    if new_key is not None:
        node_keys.check_free(tx, agent_id, {KeyRole.NEW_SVID: new_key})
        node_keys.renew(tx, row[0], new_key)
    elif not renewed[0]:
        node_keys.promote(tx, row[0])
    return _set(
        tx,
        row,
        serial_number=current[0],
        expires_at=seconds_of(current[1]),
        new_serial_number=renewed[0],
        new_expires_at=optional_seconds(renewed[1]),
    )


def set_version(tx: Transaction, agent_id: SpiffeId, version: str) -> None:
    """Store the version an agent reports; see `Datastore.set_node_version`."""
    _check_version(version)
    row = _existing(tx, agent_id, lock=True)
    tx.connection.execute(
        update(nodes).where(nodes.c.row_id == row[0]).values(agent_version=version)
    )


def ban(tx: Transaction, agent_id: SpiffeId) -> Node:
    """Blank both serials; see `Datastore.ban_node`."""
    row = _existing(tx, agent_id, lock=True)
    return _set(tx, row, **_BLANK)


def delete_one(tx: Transaction, agent_id: SpiffeId) -> Node:
    """Delete a node and its join token alias; see `Datastore.delete_node`."""
    row = _existing(tx, agent_id, lock=True)
    tx.connection.execute(delete(nodes).where(nodes.c.row_id == row[0]))
    tx.changed(ChangeKind.NODE, agent_id.text)
    node = _node(row)
    if node.attestation_type == _JOIN_TOKEN:
        _delete_alias(tx, agent_id)
    return node


def _delete_alias(tx: Transaction, agent_id: SpiffeId) -> None:
    marks = (Selector("spiffe_id", agent_id.text),)
    rows = tx.connection.execute(
        select(entries.c.row_id, entries.c.spiffe_id, entries.c.similar_digest).where(
            entries.c.parent_id == agent_id.text
        )
    ).all()
    numbers = [
        row.row_id
        for row in rows
        if bytes(row.similar_digest) == similar_digest(row.spiffe_id, agent_id.text, marks)
    ]
    if numbers:
        entry_queries.delete_where(tx, entries.c.row_id.in_(numbers))


def _set(tx: Transaction, row: Sequence[Any], **values: object) -> Node:
    tx.connection.execute(update(nodes).where(nodes.c.row_id == row[0]).values(values))
    node = get(tx, SpiffeId(row[1]))
    tx.changed(ChangeKind.NODE, row[1], node)
    return node


def _check_version(version: str) -> None:
    if len(version) > _MAX_VERSION:
        raise InvalidInputError(f"agent version is longer than {_MAX_VERSION} characters")


def _conditions(where: NodeFilter) -> Iterator[ColumnElement[bool]]:
    if where.attestation_type is not None:
        yield nodes.c.attestation_type == where.attestation_type
    if where.banned is not None:
        blank = and_(nodes.c.serial_number == "", nodes.c.new_serial_number == "")
        filled = or_(nodes.c.serial_number != "", nodes.c.new_serial_number != "")
        yield blank if where.banned else filled
    if where.can_reattest is not None:
        yield nodes.c.can_reattest == where.can_reattest
    if where.expires_before is not None:
        yield nodes.c.expires_at < seconds_of(where.expires_before)
    if where.selectors is not None:
        how, selectors = where.selectors
        table = node_selectors
        asked = [selector_digest(s) for s in selectors]
        yield matching(table, table.c.node_row, table.c.digest, how, asked)


def _row(tx: Transaction, agent_id: SpiffeId, *, lock: bool = False) -> Sequence[Any] | None:
    query = _LOCK_BY_ID if lock else _BY_ID
    rows = query.fetch(tx, wanted=agent_id.text)
    return rows[0] if rows else None


def _existing(tx: Transaction, agent_id: SpiffeId, *, lock: bool = False) -> Sequence[Any]:
    row = _row(tx, agent_id, lock=lock)
    if row is None:
        raise NotFoundError(f'there is no attested node "{agent_id}"')
    return row


def _values(node: Node) -> dict[str, Any]:
    selectors = encode_selectors(node.selectors)
    if len(selectors) > _MAX_JSON_BYTES:
        raise InvalidInputError(f"selectors of a node are larger than {_MAX_JSON_BYTES} bytes")
    return {
        "agent_id": node.agent_id.text,
        "attestation_type": node.attestation_type,
        "serial_number": node.serial_number,
        "expires_at": seconds_of(node.expires_at),
        "new_serial_number": node.new_serial_number,
        "new_expires_at": optional_seconds(node.new_expires_at),
        "can_reattest": node.can_reattest,
        "agent_version": node.agent_version,
        "selectors": selectors,
        "quarantine": node.quarantine or None,
    }


def _node(row: Sequence[Any]) -> Node:
    """Return the node of a row that has the table's columns in the table's order."""
    (_, agent_id, kind, serial, expires_at, new_serial, new_expires_at, again) = row[:8]
    version, marks, quarantine = row[8:]
    return Node(
        agent_id=SpiffeId(agent_id),
        attestation_type=kind,
        serial_number=serial,
        expires_at=moment_of(expires_at),
        new_serial_number=new_serial,
        new_expires_at=optional_moment(new_expires_at),
        can_reattest=again,
        agent_version=version,
        selectors=tuple([Selector(kind, value) for kind, value in decode_list(marks)]),
        quarantine=quarantine or "",
    )
