"""How the store is configured: `plugin_data` of `DataStore "sql"`, with upstream's keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from spire_hw.config.schema import GoDuration, Model, decode
from spire_hw.errors import ConfigError, ConfigFault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.config.hcl import Body

DATABASE_TYPES: Final = ("sqlite3", "postgres", "mysql")
_CLOUD_TYPES: Final = ("aws_postgres", "aws_mysql")
_DEFAULT_CONNECTIONS: Final = 100
_NO_CLOUD: Final = (
    'IAM authentication is not available; set database_type to "postgres" or "mysql" and give'
    " a connection_string"
)


@dataclass(frozen=True, slots=True)
class DatastoreConfig:
    """Checked settings of the store.

    Attributes:
        database_type: `sqlite3`, `postgres` or `mysql` (MariaDB too).
        connection_string: SQLite: a path or `file:` URI; PostgreSQL: libpq words or URL; MySQL:
            `user:password@tcp(host:port)/database?parameters`. May hold a password.
        ro_connection_string: a read replica, asked where an old answer does no harm (counting).
        root_ca_path: MySQL: authorities of the database's certificate.
        client_cert_path: MySQL: our certificate; client_key_path its key.
        max_open_conns: connections, and threads, at most.
        max_idle_conns: connections kept open.
        conn_max_lifetime: age at which a connection is replaced, None never.
        disable_migration: refuse an old schema instead of migrating it.
        log_sql: write statements, without their values, to the log.
    """

    database_type: str
    connection_string: str = field(repr=False)
    ro_connection_string: str = field(default="", repr=False)
    root_ca_path: str = ""
    client_cert_path: str = ""
    client_key_path: str = ""
    max_open_conns: int = _DEFAULT_CONNECTIONS
    max_idle_conns: int = _DEFAULT_CONNECTIONS
    conn_max_lifetime: timedelta | None = None
    disable_migration: bool = False
    log_sql: bool = False


class RawDatastoreConfig(Model):
    """The keys as they stand in the file."""

    database_type: str
    connection_string: str
    ro_connection_string: str = ""
    root_ca_path: str = ""
    client_cert_path: str = ""
    client_key_path: str = ""
    max_open_conns: int = _DEFAULT_CONNECTIONS
    max_idle_conns: int | None = None
    conn_max_lifetime: GoDuration | None = None
    disable_migration: bool = False
    log_sql: bool = False


def parse_datastore(data: Body, file: str = "") -> DatastoreConfig:
    """Check the `plugin_data` of `DataStore "sql"`.

    Raises:
        ConfigError: it has faults; all of them are listed.
    """
    cloud = [
        ConfigFault(block.line, f"{block.keys[-1]}: {_NO_CLOUD}")
        for block in data.blocks("database_type")
    ]
    if cloud:
        raise ConfigError(file, cloud)
    raw = decode(data, RawDatastoreConfig, file)
    found = [ConfigFault(raw.line(key), f"{key}: {text}") for key, text in _faults(raw)]
    if found:
        raise ConfigError(file, found)
    idle = raw.max_open_conns if raw.max_idle_conns is None else raw.max_idle_conns
    return DatastoreConfig(
        database_type=raw.database_type,
        connection_string=raw.connection_string,
        ro_connection_string=raw.ro_connection_string,
        root_ca_path=raw.root_ca_path,
        client_cert_path=raw.client_cert_path,
        client_key_path=raw.client_key_path,
        max_open_conns=raw.max_open_conns,
        max_idle_conns=min(idle, raw.max_open_conns),
        conn_max_lifetime=raw.conn_max_lifetime,
        disable_migration=raw.disable_migration,
        log_sql=raw.log_sql,
    )


def _faults(raw: RawDatastoreConfig) -> Iterator[tuple[str, str]]:
    if raw.database_type in _CLOUD_TYPES:
        yield "database_type", f"{raw.database_type}: {_NO_CLOUD}"
    elif raw.database_type not in DATABASE_TYPES:
        known = ", ".join(DATABASE_TYPES)
        yield "database_type", f"{raw.database_type!r} is unknown; use one of {known}"
    if not raw.connection_string:
        yield "connection_string", "must be set"
    if raw.max_open_conns < 1:
        yield "max_open_conns", "must be at least 1"
    if raw.max_idle_conns is not None and raw.max_idle_conns < 0:
        yield "max_idle_conns", "must not be negative"
    if raw.conn_max_lifetime is not None and raw.conn_max_lifetime <= timedelta(0):
        yield "conn_max_lifetime", "must be positive"
    yield from _dialect_faults(raw)


def _dialect_faults(raw: RawDatastoreConfig) -> Iterator[tuple[str, str]]:
    if raw.database_type != "mysql":
        for key in ("root_ca_path", "client_cert_path", "client_key_path"):
            if getattr(raw, key):
                yield key, "is for mysql; PostgreSQL takes sslrootcert in connection_string"
    if bool(raw.client_cert_path) != bool(raw.client_key_path):
        yield "client_cert_path", "and client_key_path go together"
    if raw.database_type == "sqlite3" and raw.ro_connection_string:
        yield "ro_connection_string", "is not for sqlite3, which has no replicas"
