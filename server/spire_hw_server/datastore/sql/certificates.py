"""Certificates that nodes were let in with: one row for each node that has some."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from sqlalchemy import bindparam, delete, insert, select, update

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.spiffeid import SpiffeId
from spire_hw_server.datastore.records import NO_CERTIFICATES, NodeCertificates
from spire_hw_server.datastore.sql.models import node_certificates, nodes
from spire_hw_server.datastore.sql.pages import after_row, fetch_page
from spire_hw_server.datastore.sql.prepared import Prepared

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw_server.datastore.records import Certificates, Page
    from spire_hw_server.datastore.sql.transaction import Transaction

_MAX_BYTES: Final = 128 * 1024
_NUMBER: Final = struct.Struct(">I")
_JOIN: Final = node_certificates.join(nodes, nodes.c.row_id == node_certificates.c.node_row)
_OF_NODE: Final = node_certificates.c.node_row == bindparam("of_node")
_GET: Final = Prepared(select(node_certificates.c.certificates).where(_OF_NODE))
_INSERT: Final = Prepared(insert(node_certificates))
_UPDATE: Final = Prepared(
    update(node_certificates).where(_OF_NODE).values(certificates=bindparam("certificates"))
)
_DELETE: Final = Prepared(delete(node_certificates).where(_OF_NODE))


def replace(tx: Transaction, node_row: int, certificates: Certificates, *, is_new: bool) -> None:
    """Store what a node was let in with; nothing is written when that is stored already."""
    wanted = b"".join(_encoded(certificates))
    if len(wanted) > _MAX_BYTES:
        raise InvalidInputError(f"certificates of a node are larger than {_MAX_BYTES} bytes")
    rows = [] if is_new else _GET.fetch(tx, of_node=node_row)
    stored = bytes(rows[0][0]) if rows else b""
    if stored == wanted:
        return
    if not wanted:
        _DELETE.run(tx, {"of_node": node_row})
    elif stored:
        _UPDATE.run(tx, {"of_node": node_row, "certificates": wanted})
    else:
        _INSERT.run(tx, {"node_row": node_row, "certificates": wanted})


def get(tx: Transaction, agent_id: SpiffeId) -> Certificates:
    """Return those of a node; see `Datastore.get_certificates`."""
    query = (
        select(node_certificates.c.certificates)
        .select_from(_JOIN)
        .where(nodes.c.agent_id == agent_id.text)
    )
    found = tx.connection.scalar(query)
    return NO_CERTIFICATES if found is None else tuple(_decoded(bytes(found)))


def list_page(tx: Transaction, page: Page) -> tuple[list[NodeCertificates], str]:
    """Return a part of all; see `Datastore.list_certificates`."""
    query = (
        select(
            nodes.c.agent_id,
            nodes.c.attestation_type,
            node_certificates.c.certificates,
            nodes.c.row_id,
        )
        .select_from(_JOIN)
        .where(nodes.c.row_id > after_row(page))
        .order_by(nodes.c.row_id)
    )
    rows, token = fetch_page(tx, query, page)
    found = [
        NodeCertificates(
            SpiffeId(row.agent_id),
            row.attestation_type,
            _read(bytes(row.certificates)),
        )
        for row in rows
    ]
    return found, token


def _read(blob: bytes) -> Certificates | None:
    try:
        return tuple(_decoded(blob))
    except EncodingError:
        return None


def _encoded(certificates: Certificates) -> Iterator[bytes]:
    for chain in certificates:
        yield _NUMBER.pack(len(chain))
        for der in chain:
            yield _NUMBER.pack(len(der)) + der


def _decoded(blob: bytes) -> Iterator[tuple[bytes, ...]]:
    at = 0
    try:
        while at < len(blob):
            (count,) = _NUMBER.unpack_from(blob, at)
            at += _NUMBER.size
            chain = []
            for _ in range(count):
                (size,) = _NUMBER.unpack_from(blob, at)
                at += _NUMBER.size + size
                chain.append(blob[at - size : at])
            yield tuple(chain)
    except struct.error as e:
        raise EncodingError("certificates of a node", "cannot be read") from e
