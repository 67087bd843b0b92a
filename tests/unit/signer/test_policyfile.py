"""Policy files: every fault at once, nothing guessed."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest

from spire_hw.errors import ConfigError, InvalidInputError, NotReadyError
from spire_hw.key import HashAlgorithm, KeyType
from spire_hw_signer.policy import Custody, Rate, Replace
from spire_hw_signer.policyfile import describe, load_policy, parse_identity, parse_policy

SAMPLE = Path(__file__).parents[3] / "server" / "signer-policy.conf"
LEAST = """
client "spiffe://infra.example/s1" {
  trust_domain = "example.org"
  server = "s1"
  keys = ["x509-CA-A"]
  types = { "*" = ["ec-p256"] }
  raw = true
}
"""


_TTLS = 'max_ca_ttl = "1h" max_svid_ttl = "1h"'


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_policy(text, "policy.conf")
    return [f"{f.line}: {f.message}" for f in caught.value.faults]


def changed(old: str, new: str) -> list[str]:
    assert old in LEAST
    return faults(LEAST.replace(old, new))


def test_the_sample_says_what_it_shows() -> None:
    policy = load_policy(SAMPLE)
    (client,) = policy.clients.values()
    assert str(client.owner) == "example.org/server-1"
    ca, jwt = client.rule("x509-CA-B"), client.rule("JWT-Signer-A")
    assert ca is not None
    assert jwt is not None
    assert (ca.rate, jwt.rate) == (Rate(200, 400), Rate(500, 500))
    assert ca.types == {KeyType.EC_P256, KeyType.EC_P384}
    assert ca.hashes == {HashAlgorithm.SHA256, HashAlgorithm.SHA384}
    assert client.replace is Replace.NOT_LAST_SIGNER
    assert client.custody == Custody(timedelta(hours=26), is_said=True)
    least = next(iter(parse_policy(LEAST).clients.values()))
    assert least.custody == Custody(timedelta(hours=26), is_said=False)
    assert client.raw is False
    assert client.generate is not None
    assert client.generate.per_day == 12
    assert not list(describe(policy))


def test_dns_suffixes_are_read_in_small_letters() -> None:
    text = LEAST.replace("raw = true", f'x509 {{ {_TTLS} dns_suffixes = ["Example.ORG"] }}')
    (client,) = parse_policy(text).clients.values()
    assert client.x509 is not None
    assert client.x509.dns_suffixes == ("example.org",)


def test_what_is_not_said_is_not_allowed() -> None:
    (client,) = parse_policy(LEAST).clients.values()
    assert (client.generate, client.x509, client.jwt, client.pss) == (None, None, None, False)
    assert client.active_window == timedelta(minutes=10)


def test_the_hash_is_that_of_what_is_said_not_of_how_it_is_written() -> None:
    spaced = "# comment\n" + LEAST.replace("  ", "\t") + "\n\n"
    assert parse_policy(spaced).hash == parse_policy(LEAST).hash
    assert parse_policy(LEAST.replace('"s1"', '"s2"')).hash != parse_policy(LEAST).hash


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("raw = true", "rau = true", 'unknown key "rau"'),
        ("raw = true", "", "nothing is signed"),
        ('"example.org"', '"Example.org"', "trust_domain"),
        ('"example.org"', '"spire-hw-signer"', "the signer's own"),
        ('server = "s1"', 'server = "../s1"', "server"),
        ('server = "s1"', 'server = ""', "server"),
        ('["x509-CA-A"]', "[]", "keys"),
        ('["x509-CA-A"]', '["x509 CA"]', "is no key id"),
        ('["ec-p256"]', '["ec-p257"]', "ec-p257"),
        ('["ec-p256"]', "[]", "expected a list of names"),
        ('types = { "*" = ["ec-p256"] }', "types = {}", "types names no key type"),
        ("raw = true", 'raw = true delete = "always"', "delete"),
        ("raw = true", 'raw = true replace = "always"', "replace"),
        ("raw = true", 'raw = true sign_rate = { "*" = "10/m" }', "is no rate"),
        ("raw = true", 'raw = true sign_rate = { "*" = "0/s" }', "is no rate"),
        ("raw = true", 'raw = true sign_rate = { "*" = "5/s burst 0" }', "is no rate"),
        ("raw = true", 'raw = true hash = { "*" = ["sha1"] }', "hash 'sha1' is unknown"),
        ("raw = true", 'raw = true addresses = ["10.0.0.1/8"]', "has host bits set"),
        ("raw = true", "raw = true generate { per_day = 0 }", "per_day"),
        ("raw = true", 'raw = true active_window = "0s"', "active_window"),
        ("raw = true", "raw = true x509 {}", "max_ca_ttl"),
        ("raw = true", 'raw = true x509 { max_ca_ttl = "1h" }', "max_svid_ttl"),
        ("raw = true", 'raw = true jwt { max_ttl = "-1h" }', "max_ttl"),
        *(
            ("raw = true", f"x509 {{ {_TTLS} dns_suffixes = [{name}] }}", "dns_suffixes")
            for name in ('"*.example.org"', '".example.org"', '""', '"a b"')
        ),
        ("raw = true", 'raw = true import "other" { label = "x" }', "none of the client's keys"),
        ("raw = true", 'raw = true import "x509-CA-A" {}', "one of uri and label"),
        ('client "spiffe://infra.example/s1"', 'client "infra.example"', "is no client"),
        ('client "spiffe://infra.example/s1"', "client", "needs a label"),
    ],
)
def test_faults_are_told(old: str, new: str, expected: str) -> None:
    assert any(expected in fault for fault in changed(old, new)), changed(old, new)


def test_all_faults_are_told_at_once_with_their_lines() -> None:
    text = (
        LEAST.replace('"s1"', '"/"').replace("ec-p256", "ec-1").replace("raw = true", "bogus = 1")
    )
    found = changed_lines(text)
    assert {4, 7} <= found


def changed_lines(text: str) -> set[int]:
    with pytest.raises(ConfigError) as caught:
        parse_policy(text)
    return {f.line for f in caught.value.faults}


def test_two_clients_do_not_share_keys() -> None:
    other = LEAST.replace("infra.example/s1", "infra.example/s2")
    (fault,) = faults(LEAST + other)
    assert "are those of" in fault


@pytest.mark.parametrize("kept", ["example.org", "other.org"])
def test_no_client_has_a_name_that_keys_kept_here_can_give_away(kept: str) -> None:
    """A server that was taken over could have a certificate of that name signed, its own or another's."""
    named = LEAST.replace("infra.example/s1", f"{kept}/spire-server-1")
    other = LEAST.replace("infra.example/s1", "infra.example/s2").replace('"s1"', '"s2"')
    (fault,) = faults(named + other.replace("example.org", "other.org"))
    assert fault.startswith(f'2: client "spiffe://{kept}/spire-server-1"')
    assert f"trust domain {kept}, whose keys this signer holds" in fault


def test_a_policy_without_clients_is_none() -> None:
    assert faults("") == ["0: there is no client; nobody could use this signer"]


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("spiffe://a/b", "spiffe://a/b"),
        ("sha256:" + "AB:" * 31 + "AB", "sha256:" + "ab" * 32),
        ("unix:0", "unix:0"),
        ("unix:root", "unix:0"),
        (f"unix:{os.getuid():05d}", f"unix:{os.getuid()}"),
    ],
)
def test_identities_have_one_form(text: str, identity: str) -> None:
    assert parse_identity(text) == identity


@pytest.mark.parametrize(
    "text", ["", "spiffe://A/b", "sha256:", "sha256:" + "0" * 63, "unix:", "unix:-1", "unix:a\0b"]
)
def test_other_identities_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_identity(text)


def test_raw_and_downstream_are_told_to_the_operator() -> None:
    text = LEAST.replace(
        "raw = true",
        'raw = true x509 { max_ca_ttl = "1h" max_svid_ttl = "1h" downstream = true }',
    )
    assert len(list(describe(parse_policy(text)))) == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match="policy_file"):
        load_policy(tmp_path / "none")
    (tmp_path / "large").write_bytes(b"#" * (2 << 20))
    with pytest.raises(InvalidInputError, match="larger"):
        load_policy(tmp_path / "large")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_policy(tmp_path / "binary")
