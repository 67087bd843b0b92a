"""How a connection is opened in each dialect, from upstream's connection strings."""

from __future__ import annotations

import os
import re
import sqlite3
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote

from sqlalchemy import create_engine, event
from sqlalchemy.pool import QueuePool

from spire_hw.errors import InvalidInputError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Engine

    from spire_hw_server.datastore.config import DatastoreConfig

SQLITE_READERS: Final = 8
_BUSY_TIMEOUT_S: Final = 10.0
_CONNECT_TIMEOUT_S: Final = 10
_WRITE_OPTION: Final = "spire_write"
_DSN: Final = re.compile(
    r"(?:(?P<user>[^:@/]*)(?::(?P<password>.*))?@)?"
    r"(?:(?P<net>[a-z]+)(?:\((?P<address>[^()]*)\))?)?"
    r"/(?P<database>[^/?]*)(?:\?(?P<parameters>[^?]*))?",
    re.DOTALL,
)
_MYSQL_PORT: Final = 3306


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine and how many threads may use it.

    Attributes:
        threads: as many as it has connections.
        one_writer: the database has a single writer; ours take turns before they ask it.
        direct: opens a connection of SQLite's own, for `Prepared`; None where all goes through
            SQLAlchemy.
    """

    engine: Engine
    threads: int
    one_writer: bool
    direct: Callable[[], sqlite3.Connection] | None = None


def write_options(connection: Connection) -> Connection:
    """Mark a connection whose next transaction writes."""
    return connection.execution_options(**{_WRITE_OPTION: True})


def open_engine(config: DatastoreConfig, connection_string: str) -> Opened:
    """Make the engine of a configuration; nothing is connected yet.

    Raises:
        InvalidInputError: the connection string is not usable.
        UnavailableError: the driver is not installed.
    """
    if config.database_type == "sqlite3":
        return _open_sqlite(config, sqlite_path(connection_string))
    if config.database_type == "postgres":
        url, connect = "postgresql+psycopg://", _postgres_connect(connection_string)
    elif config.database_type == "mysql":
        url, connect = "mysql+pymysql://", _mysql_connect(config, connection_string)
    else:
        raise InvalidInputError(f"database_type {config.database_type!r} is unknown")
    lifetime = config.conn_max_lifetime
    engine = create_engine(
        url,
        creator=connect,
        isolation_level="READ COMMITTED",
        poolclass=QueuePool,
        pool_size=max(1, config.max_idle_conns),
        max_overflow=max(0, config.max_open_conns - max(1, config.max_idle_conns)),
        pool_recycle=-1 if lifetime is None else max(1, int(lifetime.total_seconds())),
        pool_pre_ping=True,
        pool_use_lifo=True,
        hide_parameters=True,
    )
    return Opened(engine, config.max_open_conns, one_writer=False)


def sqlite_path(connection_string: str) -> Path:
    """Return the file a SQLite connection string names.

    Raises:
        InvalidInputError: a database in memory, or a URI with a host.
    """
    text = connection_string
    if text.startswith("file:"):
        text, _, parameters = text.removeprefix("file:").partition("?")
        if dict(parse_qsl(parameters)).get("mode") == "memory":
            text = ":memory:"
        if text.startswith("//"):
            host, slash, rest = text[2:].partition("/")
            if host not in {"", "localhost"}:
                raise InvalidInputError(f"connection_string names the host {host!r}; give a path")
            text = slash + rest
        text = unquote(text)
    else:
        text = text.partition("?")[0]
    if text == ":memory:":
        raise InvalidInputError(
            "connection_string names a database in memory, which a restart would lose; give a path"
        )
    if not text or "\0" in text:
        raise InvalidInputError("connection_string names no file")
    return Path(text)


def _open_sqlite(config: DatastoreConfig, path: Path) -> Opened:
    readers = min(config.max_open_conns, SQLITE_READERS)

    def connect() -> sqlite3.Connection:
        _prepare_file(path)
        connection = sqlite3.connect(
            path,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=512,
        )
        try:
            for pragma in (
                "journal_mode = WAL",
                "synchronous = FULL",
                "foreign_keys = ON",
                "trusted_schema = OFF",
                "cell_size_check = ON",
            ):
                connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        return connection

    engine = create_engine(
        "sqlite+pysqlite://",
        creator=connect,
        poolclass=QueuePool,
        pool_size=readers + 1,
        max_overflow=0,
        hide_parameters=True,
    )

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITE_OPTION, False)
        driver = connection.connection.driver_connection
        if driver is not None:
            driver.execute("BEGIN IMMEDIATE" if writes else "BEGIN")

    # Only SQLAlchemy writes statements to the log.
    direct = None if config.log_sql else connect
    return Opened(engine, readers, one_writer=True, direct=direct)


def _prepare_file(path: Path) -> None:
    """Make the file with mode 0600, or take away what others may do with it.

    Its journal and shared memory files get the same mode from SQLite.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as e:
        raise UnavailableError(f"cannot open the database file {path}: {e.strerror}") from e
    try:
        if os.fstat(descriptor).st_mode & 0o077:
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def _postgres_connect(connection_string: str) -> Callable[[], Any]:
    try:
        import psycopg  # noqa: PLC0415 - an optional driver, loaded where it is used
        from psycopg import conninfo  # noqa: PLC0415
    except ImportError as e:
        raise UnavailableError(
            'database_type "postgres" needs the driver psycopg: pip install "spire-hw[postgres]"'
        ) from e
    try:
        words: dict[str, Any] = conninfo.conninfo_to_dict(connection_string)
    except psycopg.ProgrammingError as e:
        raise InvalidInputError("connection_string is not a libpq connection string") from e
    words.setdefault("connect_timeout", _CONNECT_TIMEOUT_S)
    words.setdefault("application_name", "spire-hw-server")

    def connect() -> Any:
        return psycopg.connect(**words)

    return connect


def _mysql_connect(config: DatastoreConfig, connection_string: str) -> Callable[[], Any]:
    try:
        import pymysql  # noqa: PLC0415 - an optional driver, loaded where it is used
        from pymysql.constants import CLIENT  # noqa: PLC0415
    except ImportError as e:
        raise UnavailableError(
            'database_type "mysql" needs the driver PyMySQL: pip install "spire-hw[mysql]"'
        ) from e
    words = parse_mysql_dsn(connection_string)
    tls = words.pop("tls")
    if config.root_ca_path and tls == "false":
        tls = "true"
    if tls != "false":
        words["ssl"] = _mysql_tls(config, verify=tls == "true")
    words["connect_timeout"] = _CONNECT_TIMEOUT_S
    words["charset"] = "utf8mb4"
    words["client_flag"] = CLIENT.FOUND_ROWS
    words["init_command"] = "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'"

    def connect() -> Any:
        return pymysql.connect(**words)

    return connect


def _mysql_tls(config: DatastoreConfig, *, verify: bool) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.root_ca_path or None)
        if config.client_cert_path:
            context.load_cert_chain(config.client_cert_path, config.client_key_path)
    except (OSError, ssl.SSLError) as e:
        raise InvalidInputError(
            f"certificates for the database do not load: {e.strerror or e}"
        ) from e
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def parse_mysql_dsn(text: str) -> dict[str, Any]:
    """Read a Go MySQL connection string.

    Args:
        text: `[user[:password]@][net[(address)]]/database[?parameters]`; net is tcp or unix.

    Returns:
        PyMySQL's arguments, and under `tls` one of `true`, `skip-verify`, `false`.

    Raises:
        InvalidInputError: does not parse, or a parameter we would have to ignore.

    Source: go-sql-driver/mysql, README section "DSN".
    """
    found = _DSN.fullmatch(text)
    if found is None or not found["database"]:
        raise InvalidInputError(
            "connection_string is not of the form user:password@tcp(host:port)/database"
        )
    words: dict[str, Any] = {"database": unquote(found["database"])}
    if found["user"]:
        words["user"] = found["user"]
    if found["password"]:
        words["password"] = found["password"]
    address = found["address"] or ""
    match found["net"] or "tcp":
        case "unix":
            words["unix_socket"] = address
        case "tcp":
            words |= _host_and_port(address)
        case other:
            raise InvalidInputError(f"connection_string: network {other!r} is unknown")
    words["tls"] = "false"
    for key, value in parse_qsl(found["parameters"] or "", keep_blank_values=True):
        if key == "tls":
            if value.lower() not in {"true", "false", "skip-verify"}:
                raise InvalidInputError("connection_string: tls is true, false or skip-verify")
            words["tls"] = value.lower()
        elif key not in {"parseTime", "charset", "collation", "loc", "allowNativePasswords"}:
            raise InvalidInputError(f"connection_string: parameter {key!r} is not supported")
    return words


def _host_and_port(address: str) -> dict[str, Any]:
    if not address:
        return {"host": "127.0.0.1", "port": _MYSQL_PORT}
    host, port = address, str(_MYSQL_PORT)
    bare_v6 = address.count(":") > 1 and not address.startswith("[")
    if not bare_v6 and not address.endswith("]"):
        head, colon, tail = address.rpartition(":")
        if colon:
            host, port = head, tail
    host = host.removeprefix("[").removesuffix("]")
    if re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) is None or not host:
        raise InvalidInputError("connection_string: address is not host:port")
    return {"host": host, "port": int(port)}
