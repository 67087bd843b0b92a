from __future__ import annotations

from datetime import timedelta

import pytest

from spire_hw.config.hcl import parse
from spire_hw.errors import ConfigError
from spire_hw_server.datastore.config import DatastoreConfig, parse_datastore


def test_upstreams_keys_are_read() -> None:
    body = parse(
        """
        database_type = "mysql"
        connection_string = "spire:pw@tcp(db:3306)/spire?parseTime=true"
        ro_connection_string = "spire:pw@tcp(ro:3306)/spire?parseTime=true"
        root_ca_path = "/ca.pem"
        client_cert_path = "/c.pem"
        client_key_path = "/k.pem"
        max_open_conns = "20"
        max_idle_conns = 50
        conn_max_lifetime = "1h30m"
        disable_migration = true
        log_sql = true
        """
    )
    assert parse_datastore(body) == DatastoreConfig(
        "mysql",
        "spire:pw@tcp(db:3306)/spire?parseTime=true",
        ro_connection_string="spire:pw@tcp(ro:3306)/spire?parseTime=true",
        root_ca_path="/ca.pem",
        client_cert_path="/c.pem",
        client_key_path="/k.pem",
        max_open_conns=20,
        max_idle_conns=20,
        conn_max_lifetime=timedelta(minutes=90),
        disable_migration=True,
        log_sql=True,
    )


def test_defaults_are_upstreams() -> None:
    body = parse('database_type = "sqlite3"\nconnection_string = "d.sqlite3"')
    assert parse_datastore(body) == DatastoreConfig("sqlite3", "d.sqlite3")


def test_passwords_are_not_shown() -> None:
    config = DatastoreConfig("mysql", "u:secret@/d", ro_connection_string="u:secret@/e")
    assert "secret" not in repr(config)


def test_every_fault_is_reported_with_its_line() -> None:
    body = parse(
        """
        database_type = "sqlite3"
        connection_string = ""
        ro_connection_string = "x"
        root_ca_path = "/ca.pem"
        client_cert_path = "/c.pem"
        max_open_conns = 0
        max_idle_conns = -1
        conn_max_lifetime = "-1h"
        """
    )
    with pytest.raises(ConfigError) as caught:
        parse_datastore(body, "server.conf")
    lines = [fault.line for fault in caught.value.faults]
    assert sorted(set(lines)) == [3, 4, 5, 6, 7, 8, 9]
    assert str(caught.value).startswith("server.conf:")


@pytest.mark.parametrize(
    "text",
    [
        'database_type = "oracle"\nconnection_string = "x"',
        'database_type = "aws_mysql"\nconnection_string = "x"',
        'database_type "aws_postgres" { region = "x" }\nconnection_string = "x"',
        'connection_string = "x"',
        'database_type = "sqlite3"\nconnection_strin = "x"',
        "",
    ],
)
def test_unusable_configuration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_datastore(parse(text))
