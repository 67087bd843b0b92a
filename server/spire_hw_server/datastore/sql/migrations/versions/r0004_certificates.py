"""What nodes were let in with, to be held against later revocation lists."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, ForeignKey, MetaData, PrimaryKeyConstraint, Table

from spire_hw_server.datastore.sql.types import blob, row_number

revision = "0004"
down_revision = "0003"

metadata = MetaData(
    naming_convention={
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

nodes = Table("nodes", metadata, Column("row_id", row_number(), primary_key=True))

node_certificates = Table(
    "node_certificates",
    metadata,
    Column(
        "node_row", row_number(), ForeignKey("nodes.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("certificates", blob(), nullable=False),
    PrimaryKeyConstraint("node_row"),
)


def upgrade() -> None:
    """Bring the schema from the revision before to this one; may be run again."""
    node_certificates.create(op.get_bind(), checkfirst=True)
