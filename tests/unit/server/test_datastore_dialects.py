from __future__ import annotations

from typing import Any

import pytest
import structlog

from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.sql.dialects import open_engine, parse_mysql_dsn, sqlite_path
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_sim.clock import SimClock


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("data/d.sqlite3", "data/d.sqlite3"),
        ("/var/lib/d.sqlite3", "/var/lib/d.sqlite3"),
        ("/d.sqlite3?_journal=WAL", "/d.sqlite3"),
        ("file:/d%20x.sqlite3?cache=shared", "/d x.sqlite3"),
        ("file:///d.sqlite3", "/d.sqlite3"),
        ("file://localhost/d.sqlite3", "/d.sqlite3"),
        ("file:rel.sqlite3", "rel.sqlite3"),
    ],
)
def test_sqlite_strings_name_a_file(text: str, path: str) -> None:
    assert str(sqlite_path(text)) == path


@pytest.mark.parametrize(
    "text",
    ["", ":memory:", "file::memory:", "file:x?mode=memory", "file://host/x", "a\0b", "file:"],
)
def test_sqlite_strings_that_name_no_file_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        sqlite_path(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/d", {"host": "127.0.0.1", "port": 3306}),
        ("u@/d", {"user": "u", "host": "127.0.0.1", "port": 3306}),
        (
            "u:p@tcp(db:3307)/d?parseTime=true&charset=utf8",
            {"user": "u", "password": "p", "host": "db", "port": 3307},
        ),
        ("u:p@:/w(x)@tcp(db)/d", {"user": "u", "password": "p@:/w(x)", "host": "db", "port": 3306}),
        ("u@tcp([::1]:3307)/d", {"user": "u", "host": "::1", "port": 3307}),
        ("u@tcp([::1])/d", {"user": "u", "host": "::1", "port": 3306}),
        ("u@tcp(::1)/d", {"user": "u", "host": "::1", "port": 3306}),
        ("u@unix(/run/s.sock)/d", {"user": "u", "unix_socket": "/run/s.sock"}),
    ],
)
def test_go_mysql_strings_are_read(text: str, expected: dict[str, Any]) -> None:
    assert parse_mysql_dsn(text) == expected | {"database": "d", "tls": "false"}


def test_go_mysql_tls_is_read() -> None:
    assert parse_mysql_dsn("/d?tls=true")["tls"] == "true"
    assert parse_mysql_dsn("/d?tls=skip-verify")["tls"] == "skip-verify"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "d",
        "u:p@tcp(db:3306)",
        "u:p@tcp(db:3306)/",
        "u@udp(db)/d",
        "u@tcp(db:x)/d",
        "u@tcp(:3306)/d",
        "/d?tls=custom",
        "/d?allowAllFiles=true",
    ],
)
def test_go_mysql_strings_that_cannot_be_followed_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_mysql_dsn(text)
    assert "u:p" not in str(caught.value)


def test_unreadable_certificates_are_an_input_error() -> None:
    pytest.importorskip("pymysql")
    config = DatastoreConfig("mysql", "/d", root_ca_path="/nonexistent.pem")
    with pytest.raises(InvalidInputError):
        open_engine(config, config.connection_string)


def test_bad_libpq_string_is_refused_without_showing_it() -> None:
    pytest.importorskip("psycopg")
    config = DatastoreConfig("postgres", "host=db password='secret")
    with pytest.raises(InvalidInputError) as caught:
        open_engine(config, config.connection_string)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("driver", "kind", "target"),
    [
        ("psycopg", "postgres", "host=127.0.0.1 port=1 user=u password=secret dbname=d"),
        ("pymysql", "mysql", "u:secret@tcp(127.0.0.1:1)/d"),
    ],
)
@pytest.mark.asyncio
async def test_database_that_is_away_is_unavailable(driver: str, kind: str, target: str) -> None:
    pytest.importorskip(driver)
    with pytest.raises(UnavailableError) as caught:
        await open_datastore(
            DatastoreConfig(kind, target), clock=SimClock(), log=structlog.get_logger()
        )
    assert "127.0.0.1" in caught.value.message
    assert "secret" not in caught.value.message
