"""What is known of nodes' machines, what they showed, policies; who enrolled a TPM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alembic import op
from sqlalchemy import (
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    UniqueConstraint,
    inspect,
)

from spire_hw_server.datastore.sql.types import (
    Ascii,
    Exact,
    blob,
    json_text,
    row_number,
    seconds,
)

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

revision = "0003"
down_revision = "0002"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

nodes = Table("nodes", metadata, Column("row_id", row_number(), primary_key=True))

node_postures = Table(
    "node_postures",
    metadata,
    Column(
        "node_row", row_number(), ForeignKey("nodes.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("state", Ascii(16), nullable=False),
    Column("reasons", json_text(), nullable=False),
    Column("message", Exact(4096), nullable=False),
    Column("since", seconds(), nullable=False),
    Column("last_good_at", seconds(), nullable=True),
    Column("last_seen_at", seconds(), nullable=True),
    Column("policy", Exact(255), nullable=False),
    Column("policy_version", Integer(), nullable=False),
    Column("memory", json_text(), nullable=False),
    Column("evidence", blob(), nullable=True),
    Column("records", seconds(), nullable=False),
    PrimaryKeyConstraint("node_row"),
    Index(None, "last_good_at"),
)

node_ima = Table(
    "node_ima",
    metadata,
    Column(
        "node_row", row_number(), ForeignKey("nodes.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("first", seconds(), nullable=False),
    Column("entries", blob(), nullable=False),
    PrimaryKeyConstraint("node_row", "first"),
)

node_evidence = Table(
    "node_evidence",
    metadata,
    Column(
        "node_row", row_number(), ForeignKey("nodes.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("number", seconds(), nullable=False),
    Column("made_at", seconds(), nullable=False),
    Column("occasion", Ascii(16), nullable=False),
    Column("verdict", Ascii(16), nullable=False),
    Column("state", Ascii(16), nullable=False),
    Column("findings", json_text(), nullable=False),
    Column("policy", Exact(255), nullable=False),
    Column("policy_version", Integer(), nullable=False),
    Column("policy_sha256", Ascii(64), nullable=False),
    Column("evidence_sha256", Ascii(64), nullable=False),
    Column("summary", Exact(4096), nullable=False),
    Column("document", blob(), nullable=True),
    PrimaryKeyConstraint("node_row", "number"),
)

policies = Table(
    "policies",
    metadata,
    Column("row_id", row_number(), primary_key=True, autoincrement=True),
    Column("name", Exact(255), nullable=False),
    Column("version", Integer(), nullable=False),
    Column("text", blob(), nullable=False),
    Column("sha256", Ascii(64), nullable=False),
    Column("comment", Exact(4096), nullable=False),
    Column("created_at", seconds(), nullable=False),
    Column("created_by", Exact(4096), nullable=False),
    UniqueConstraint("name", "version"),
    sqlite_autoincrement=True,
)


def upgrade() -> None:
    """Bring the schema from the revision before to this one; may be run again."""
    connection = op.get_bind()
    if "quarantine" not in _columns(connection, "nodes"):
        op.add_column("nodes", Column("quarantine", Exact(255), nullable=True))
    if "owner" not in _columns(connection, "enrolled_eks"):
        op.add_column("enrolled_eks", Column("owner", Exact(1024), nullable=True))
    for table in (node_postures, node_ima, node_evidence, policies):
        table.create(connection, checkfirst=True)


def _columns(connection: Connection, name: str) -> set[str]:
    return {column["name"] for column in inspect(connection).get_columns(name)}
