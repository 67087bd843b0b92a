"""Alembic migrations: `env` runs them on the connection the engine opened."""
