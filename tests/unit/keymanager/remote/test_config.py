"""Settings of signers: all faults at once, each named."""

from __future__ import annotations

import pytest

from spire_hw.config import hcl
from spire_hw.errors import ConfigError, InvalidInputError
from spire_hw_plugins.keymanager.remote.config import (
    Address,
    find_faults,
    parse_address,
    read_settings,
)

GOOD = """
addresses = ["one.example:9000", "[2001:db8::1]:8445", "10.0.0.1"]
signer_ca = "/ca.pem" signer_id = "spiffe://infra.example/signer" cert = "/c.pem" key = "/k.pem"
"""


def messages(text: str) -> list[str]:
    return [fault.message for fault in find_faults(hcl.parse(text))]


def test_defaults() -> None:
    settings = read_settings(hcl.parse(GOOD))
    assert settings.addresses == (
        Address("one.example", 9000),
        Address("2001:db8::1", 8445),
        Address("10.0.0.1", 8445),
    )
    assert [a.name for a in settings.addresses][1] == "[2001:db8::1]:8445"
    assert (settings.timeout_s, settings.generate_timeout_s, settings.start_timeout_s) == (
        10,
        120,
        30,
    )
    assert settings.purposes
    assert not settings.require_witness
    assert settings.tls is not None
    assert str(settings.tls.signer_id) == "spiffe://infra.example/signer"


def test_socket_needs_no_files() -> None:
    settings = read_settings(hcl.parse('socket = "/run/signer.sock"'))
    assert settings.addresses == (Address(socket="/run/signer.sock"),)
    assert settings.tls is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ["addresses or socket is required", "signer_ca is required", "exactly one of"]),
        (GOOD + 'signer_name = "signer.example"', ["exactly one of signer_id and signer_name"]),
        ('addresses = ["a"] signer_name = "*.example"', ["a wildcard is no signer's name"]),
        ('addresses = ["a"] signer_name = "a b"', ["signer_name: DNS name"]),
        ('socket = "/x" signer_name = "a.b"', ["signer_name does not fit a socket"]),
        ('socket = "run/x"', ["socket must be an absolute path"]),
        ('socket = "/x" addresses = ["a"]', ["exclude each other"]),
        ('socket = "/x" cert = "/c"', ["cert does not fit a socket"]),
        (GOOD + 'accept_log = ["nobody:1"]', ['"nobody:1" is none of the signers']),
        (GOOD + 'addresses = ["10.0.0.1:8445"]', ["given twice"]),
        (GOOD + 'signer_id = "infra.example"', ["signer_id: "]),
        (GOOD + 'timeout = "0s"', ["below the least"]),
        (GOOD + "colour = 1", ['unknown key "colour"']),
    ],
)
def test_faults_are_named(text: str, wanted: list[str]) -> None:
    found = messages(text)
    for one in wanted:
        assert any(one in message for message in found), found
    with pytest.raises(ConfigError):
        read_settings(hcl.parse(text))


@pytest.mark.parametrize(
    "text",
    ["", ":1", "a:", "a:0", "a:65536", "a:x", "::1", "[::1", "a:-1", "a:1:2", "a\n:1", "a:²"],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_address(text)
