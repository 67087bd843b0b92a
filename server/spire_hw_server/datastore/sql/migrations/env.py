"""Run by Alembic: migrates over the connection in `config.attributes`, in one transaction."""

from __future__ import annotations

from alembic import context

from spire_hw_server.datastore.sql.models import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
