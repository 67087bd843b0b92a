"""What nodes showed and what became of it: a bounded history for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import bindparam, delete, insert, select

from spire_hw.errors import NotFoundError
from spire_hw_server.datastore.records import EvidencePage, EvidenceRecord
from spire_hw_server.datastore.sql.models import node_evidence, nodes
from spire_hw_server.datastore.sql.pages import after_row, fetch_page
from spire_hw_server.datastore.sql.prepared import Prepared
from spire_hw_server.datastore.sql.sets import moment_of, seconds_of

if TYPE_CHECKING:
    from typing import Any

    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.datastore.records import Page
    from spire_hw_server.datastore.sql.transaction import Transaction

# Of each node; older records go one by one.
MAX_RECORDS: Final = 64
_VALUES: Final = [column.name for column in node_evidence.c]
_INSERT: Final = Prepared(insert(node_evidence).values({name: bindparam(name) for name in _VALUES}))
_DELETE: Final = Prepared(
    delete(node_evidence).where(
        node_evidence.c.node_row == bindparam("of_node"),
        node_evidence.c.number == bindparam("gone"),
    )
)
_ABOUT: Final = [
    *(column for column in node_evidence.c if column.name not in {"node_row", "document"}),
    node_evidence.c.document.is_not(None).label("has_document"),
]


def add(tx: Transaction, node_row: int, number: int, record: EvidenceRecord) -> None:
    """Store a record; the one that is one too many goes."""
    _INSERT.run(
        tx,
        {
            "node_row": node_row,
            "number": number,
            "made_at": seconds_of(record.made_at),
            "occasion": record.occasion,
            "verdict": record.verdict,
            "state": record.state,
            "findings": record.findings,
            "policy": record.policy,
            "policy_version": record.policy_version,
            "policy_sha256": record.policy_sha256,
            "evidence_sha256": record.evidence_sha256,
            "summary": record.summary,
            "document": record.document,
        },
    )
    if number > MAX_RECORDS:
        _DELETE.run(tx, {"of_node": node_row, "gone": number - MAX_RECORDS})


def list_page(tx: Transaction, agent_id: SpiffeId, page: Page) -> EvidencePage:
    """Return a part of a history; see `Datastore.list_evidence`."""
    before = after_row(page)
    node_row = _node_row(tx, agent_id)
    query = select(*_ABOUT).where(node_evidence.c.node_row == node_row)
    if before:
        query = query.where(node_evidence.c.number < before)
    query = query.order_by(node_evidence.c.number.desc())
    rows, token = fetch_page(tx, query, page, "number")
    return EvidencePage([_record(row) for row in rows], token)


def get(tx: Transaction, agent_id: SpiffeId, number: int) -> EvidenceRecord:
    """Return a record with its document; see `Datastore.get_evidence`."""
    query = select(*_ABOUT, node_evidence.c.document).where(
        node_evidence.c.node_row == _node_row(tx, agent_id), node_evidence.c.number == number
    )
    row = tx.connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f'there is no evidence {number} of "{agent_id}"')
    return _record(row, None if row.document is None else bytes(row.document))


def prune(tx: Transaction, made_before_s: int) -> int:
    """Delete old records; see `Datastore.prune_evidence`."""
    old = delete(node_evidence).where(node_evidence.c.made_at < made_before_s)
    return tx.connection.execute(old).rowcount


def _node_row(tx: Transaction, agent_id: SpiffeId) -> int:
    query = select(nodes.c.row_id).where(nodes.c.agent_id == agent_id.text)
    number: int | None = tx.connection.scalar(query)
    if number is None:
        raise NotFoundError(f'there is no attested node "{agent_id}"')
    return number


def _record(row: Any, document: bytes | None = None) -> EvidenceRecord:
    return EvidenceRecord(
        made_at=moment_of(row.made_at),
        occasion=row.occasion,
        verdict=row.verdict,
        state=row.state,
        findings=row.findings,
        policy=row.policy,
        policy_version=row.policy_version,
        policy_sha256=row.policy_sha256,
        evidence_sha256=row.evidence_sha256,
        summary=row.summary,
        document=document,
        has_document=bool(row.has_document),
        number=row.number,
    )
