"""Keys of nodes, each of one node alone; two indexes that every attestation wrote go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alembic import op
from sqlalchemy import (
    Column,
    ColumnClause,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    column,
    inspect,
    select,
    table,
)

from spire_hw_server.datastore.sql.types import Digest, row_number

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

revision = "0002"
down_revision = "0001"

_INDEX = "ix_node_selectors_digest"
_CHANGES_INDEX = "ix_changes_created_at"
_OLD = "node_selectors_0001"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

nodes = Table("nodes", metadata, Column("row_id", row_number(), primary_key=True))

node_selectors = Table(
    "node_selectors",
    metadata,
    Column(
        "node_row", row_number(), ForeignKey("nodes.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("digest", Digest(), nullable=False),
    PrimaryKeyConstraint("node_row", "digest"),
    sqlite_with_rowid=False,
)

node_keys = Table(
    "node_keys",
    metadata,
    Column("digest", Digest(), nullable=False),
    Column(
        "node_row", row_number(), ForeignKey("nodes.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("role", Integer(), nullable=False),
    PrimaryKeyConstraint("digest"),
    Index(None, "node_row"),
    sqlite_with_rowid=False,
)


def upgrade() -> None:
    """Bring the schema from the revision before to this one; may be run again."""
    connection = op.get_bind()
    if _CHANGES_INDEX in _indexes(connection, "changes"):
        op.drop_index(_CHANGES_INDEX, "changes")
    if _INDEX in _indexes(connection, "node_selectors"):
        op.drop_index(_INDEX, "node_selectors")
        if connection.dialect.name == "sqlite":
            op.rename_table("node_selectors", _OLD)
            node_selectors.create(connection)
            kept: list[ColumnClause[object]] = [column("node_row"), column("digest")]
            old = select(*kept).select_from(table(_OLD, *kept))
            op.execute(node_selectors.insert().from_select(["node_row", "digest"], old))
            op.drop_table(_OLD)
    node_keys.create(connection, checkfirst=True)


def _indexes(connection: Connection, name: str) -> set[str | None]:
    return {index["name"] for index in inspect(connection).get_indexes(name)}
