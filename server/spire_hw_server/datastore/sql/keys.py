"""Which node has which key: what keeps two nodes from showing the same one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import and_, bindparam, delete, insert, or_, select, update

from spire_hw.spiffeid import SpiffeId
from spire_hw_server.datastore.records import KeyInUseError, KeyRole
from spire_hw_server.datastore.sql.models import node_keys, nodes
from spire_hw_server.datastore.sql.prepared import Prepared

if TYPE_CHECKING:
    from spire_hw_server.datastore.records import NodeKeys
    from spire_hw_server.datastore.sql.transaction import Transaction

_OF_NODE: Final = node_keys.c.node_row == bindparam("of_node")
_OWNERS: Final = Prepared(
    select(node_keys.c.digest, nodes.c.agent_id)
    .join(nodes, nodes.c.row_id == node_keys.c.node_row)
    .where(or_(node_keys.c.digest == bindparam("one"), node_keys.c.digest == bindparam("other")))
)
_ATTESTED: Final = Prepared(
    select(nodes.c.agent_id)
    .join(node_keys, nodes.c.row_id == node_keys.c.node_row)
    .where(
        node_keys.c.digest == bindparam("digest"),
        node_keys.c.role == KeyRole.ATTESTATION.value,
    )
)
_INSERT: Final = Prepared(insert(node_keys))
_DELETE: Final = Prepared(delete(node_keys).where(_OF_NODE))


def check_free(tx: Transaction, agent_id: SpiffeId, keys: NodeKeys) -> None:
    """Refuse keys, two at most, that belong to another node.

    Raises:
        KeyInUseError: one does; of both, the one of the lower role is told.
    """
    if not keys:
        return
    digests = list(keys.values())
    rows = _OWNERS.fetch(tx, one=digests[0], other=digests[-1])
    owners: dict[bytes, str] = {row[0]: row[1] for row in rows}
    for role in sorted(keys, key=lambda role: role.value):
        owner = owners.get(keys[role], agent_id.text)
        if owner != agent_id.text:
            raise KeyInUseError(role, SpiffeId(owner))


def owner_of_attestation_key(tx: Transaction, digest: bytes) -> SpiffeId | None:
    """Return the node whose TPM speaks with a key, None when there is none."""
    for row in _ATTESTED.fetch(tx, digest=digest):
        return SpiffeId(row[0])
    return None


def replace_all(tx: Transaction, node_row: int, keys: NodeKeys, *, is_new: bool) -> None:
    """Make keys that `check_free` let through a node's only ones."""
    if not is_new:
        _DELETE.run(tx, {"of_node": node_row})
    # In one order everywhere, so that two transactions never wait for each other.
    roles = {digest: role for role, digest in keys.items()}
    _INSERT.run(
        tx,
        *(
            {"digest": digest, "node_row": node_row, "role": roles[digest].value}
            for digest in sorted(roles)
        ),
    )


def renew(tx: Transaction, node_row: int, digest: bytes) -> None:
    """Note the key of a renewed SVID in place of the one renewed before it."""
    old = and_(_OF_NODE, node_keys.c.role == KeyRole.NEW_SVID.value)
    tx.connection.execute(delete(node_keys).where(old), {"of_node": node_row})
    held = select(node_keys.c.digest).where(_OF_NODE, node_keys.c.digest == bindparam("digest"))
    if tx.connection.execute(held, {"of_node": node_row, "digest": digest}).first() is None:
        values = {"digest": digest, "node_row": node_row, "role": KeyRole.NEW_SVID.value}
        _INSERT.run(tx, values)


def promote(tx: Transaction, node_row: int) -> None:
    """Make the key of a renewed SVID, if one was noted, that of the current one."""
    new = and_(_OF_NODE, node_keys.c.role == KeyRole.NEW_SVID.value)
    of_node = {"of_node": node_row}
    if tx.connection.execute(select(node_keys.c.digest).where(new), of_node).first() is None:
        return
    old = and_(_OF_NODE, node_keys.c.role == KeyRole.SVID.value)
    tx.connection.execute(delete(node_keys).where(old), of_node)
    tx.connection.execute(update(node_keys).where(new).values(role=KeyRole.SVID.value), of_node)
