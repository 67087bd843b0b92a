from __future__ import annotations

import base64
import json
import os
import re
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from spire_hw.cli.run import ExitCode

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.server_cli.conftest import Answer, Cli

ENTRY = re.compile(
    r"Entry ID                : [0-9a-f-]{36}\n"
    r"SPIFFE ID               : spiffe://example.org/web\n"
    r"Parent ID               : spiffe://example.org/node\n"
    r"Revision                : 0\n"
    r"X509-SVID TTL           : 60\n"
    r"JWT-SVID TTL            : default\n"
    r"Selector                : unix:gid:1\n"
    r"Selector                : unix:uid:1000\n"
    r"DNS name                : web.example.org\n"
    r"Admin                   : true\n"
    r"Hint                    : h\n\n"
)


def create(cli: Cli, path: str = "/web", *more: str) -> Answer:
    return cli(
        "entry", "create", "-spiffeID", f"spiffe://example.org{path}",
        "-parentID=spiffe://example.org/node", "--selector", "unix:uid:1000", *more,
    )  # fmt: skip


def test_an_entry_from_creation_to_deletion_in_the_layout_of_upstream(cli: Cli) -> None:
    made = create(
        cli, "/web", "-selector", "unix:gid:1", "-x509SVIDTTL", "60", "-dns", "web.example.org",
        "-admin", "-hint=h", "-downstream=false",
    )  # fmt: skip
    assert (made.code, made.err) == (0, "")
    assert ENTRY.fullmatch(made.out)
    entry_id = made.out.split("\n")[0].split(": ")[1]

    again = create(cli, "/web", "-selector", "unix:gid:1")
    assert again.code == ExitCode.FAILED
    assert again.out == ""
    assert again.err.startswith("Failed to create the following entry (code: AlreadyExists, msg: ")
    assert again.err.endswith("Error: 0 created, 1 failed\n")

    shown = cli("entry", "show", "-selector", "unix:uid:1000")
    assert shown.out.startswith("Found 1 entry\nEntry ID                : ")
    assert cli("entry", "show", "-entryID", entry_id, "-field", "entries.0.hint").out == "h\n"
    assert cli("entry", "count", "-parentID", "spiffe://example.org/node").out == (
        "1 registration entry\n"
    )

    changed = cli(
        "entry", "update", "-entryID", entry_id, "-spiffeID", "spiffe://example.org/web",
        "-parentID", "spiffe://example.org/node", "-selector", "unix:uid:7",
    )  # fmt: skip
    assert changed.code == 0
    assert "Revision                : 1\n" in changed.out

    gone = cli("entry", "delete", "-entryID", entry_id)
    assert (gone.code, gone.out) == (0, f"Deleted entry with ID: {entry_id}\n")
    missing = cli("entry", "delete", "-entryID", entry_id)
    assert missing.code == ExitCode.FAILED
    assert f"Failed to delete entry with ID {entry_id} (code: NotFound" in missing.err
    assert cli("entry", "show", "-entryID", entry_id).code == ExitCode.NOT_FOUND
    assert cli("entry", "show").out == "Found 0 entries\n"


def test_entries_from_a_file_are_partly_done(cli: Cli, tmp_path: Path) -> None:
    assert create(cli, "/first").code == 0
    entries = [
        {
            "spiffe_id": f"spiffe://example.org/{name}",
            "parent_id": "spiffe://example.org/node",
            "selectors": [{"type": "unix", "value": "uid:1000"}],
            "x509_svid_ttl": 60,
        }
        for name in ("first", "second")
    ]
    file = tmp_path / "entries.json"
    file.write_text(json.dumps({"entries": entries}))
    made = cli("entry", "create", "-data", str(file), "-output", "json")
    assert made.code == ExitCode.PARTLY
    results = json.loads(made.out)["results"]
    assert [r["status"]["code"] for r in results] == [6, 0]
    assert results[1]["entry"]["x509_svid_ttl"] == 60
    assert results[1]["entry"]["expires_at"] == "0"
    ids = [e["id"] for e in json.loads(cli("entry", "show", "-output=json").out)["entries"]]
    file.write_text(json.dumps({"ids": ids}))
    assert cli("entry", "delete", "-file", str(file)).code == 0


def test_a_file_with_faults_is_refused_with_all_of_them(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "entries.json"
    file.write_text('{"entries": [{"spiffe_id": "x", "nope": 1, "selectors": [1]}, 3]}')
    refused = cli("entry", "create", "-data", str(file))
    assert refused.code == ExitCode.FAILED
    for words in ('"spiffe_id"', '"parent_id"', '"selectors"', 'unknown key "nope"', "entries[1]"):
        assert words in refused.err


def test_a_token_and_its_warning(cli: Cli) -> None:
    bare = cli("token", "generate")
    assert re.fullmatch(r"Token: [0-9a-f-]{36}\nWarning: Missing SPIFFE ID\.\n", bare.out)
    named = cli("token", "generate", "-spiffeID", "spiffe://example.org/host", "-ttl", "60")
    assert re.fullmatch(r"Token: [0-9a-f-]{36}\n", named.out)
    assert set(json.loads(cli("token", "generate", "-output", "json").out)) == {
        "value",
        "expires_at",
    }


def test_the_bundle_in_both_formats(cli: Cli) -> None:
    pem = cli("bundle", "show").out
    (certificate,) = x509.load_pem_x509_certificates(pem.encode())
    document = json.loads(cli("bundle", "show", "-format", "spiffe").out)
    assert {k["use"] for k in document["keys"]} == {"x509-svid", "jwt-svid"}
    message = json.loads(cli("bundle", "show", "-output", "json").out)
    assert message["trust_domain"] == "example.org"
    root_der = base64.b64decode(message["x509_authorities"][0]["asn1"])
    assert x509.load_der_x509_certificate(root_der) == certificate


def test_an_x509_svid_written_to_files(cli: Cli, tmp_path: Path) -> None:
    made = cli(
        "x509", "mint", "-spiffeID", "spiffe://example.org/web", "-dns", "a.example.org",
        "-ttl", "10m", "-write", str(tmp_path),
    )  # fmt: skip
    assert (made.code, made.err) == (0, "")
    assert made.out == (
        f"X509-SVID written to {tmp_path}/svid.pem\n"
        f"Private key written to {tmp_path}/key.pem\n"
        f"Root CAs written to {tmp_path}/bundle.pem\n"
    )
    leaf = x509.load_pem_x509_certificates((tmp_path / "svid.pem").read_bytes())[0]
    key = load_pem_private_key((tmp_path / "key.pem").read_bytes(), None)
    assert leaf.public_key() == key.public_key()
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "svid.pem").stat().st_mode & 0o777 == 0o644
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle.pem", "key.pem", "svid.pem"]


def test_an_x509_svid_on_standard_output_and_its_cap(cli: Cli) -> None:
    made = cli("x509", "mint", "-spiffeID", "spiffe://example.org/web", "-ttl", "9000h")
    assert made.out.startswith("X509-SVID:\n-----BEGIN CERTIFICATE-----\n")
    assert "\nPrivate key:\n-----BEGIN PRIVATE KEY-----\n" in made.out
    assert made.err.startswith("X509-SVID lifetime was capped shorter than specified ttl; expires")
    held = json.loads(
        cli("x509", "mint", "-spiffeID", "spiffe://example.org/web", "-output", "json").out
    )
    assert set(held) == {"x509_svid", "private_key", "root_cas"}


def test_a_jwt_svid(cli: Cli, tmp_path: Path) -> None:
    words = (
        "jwt",
        "mint",
        "-spiffeID",
        "spiffe://example.org/web",
        "-audience",
        "a",
        "-audience",
        "b",
    )
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", cli(*words).out)
    file = tmp_path / "token"
    assert cli(*words, "-write", str(file)).out == f"JWT-SVID written to {file}\n"
    payload = file.read_text().split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert claims["aud"] == ["a", "b"]
    assert cli("jwt", "mint", "-spiffeID", "spiffe://example.org/web").code == ExitCode.USAGE


def test_tpms_are_allowed_listed_and_denied(cli: Cli) -> None:
    ek_hash = "ab" * 32
    assert cli("tpm", "list").out == "No TPMs are enrolled\n"
    allowed = cli("tpm", "allow", ek_hash.upper(), "-comment", "rack 4")
    assert (allowed.code, allowed.out) == (0, f"Allowed TPM with EK hash: {ek_hash}\n")
    assert cli("tpm", "allow", ek_hash).code == 0
    listed = cli("tpm", "list")
    assert listed.out.startswith(f"Found 1 enrolled TPM:\n\nEK hash           : {ek_hash}\n")
    assert "Comment           : rack 4\n" in listed.out
    partly = cli("tpm", "deny", ek_hash, "cd" * 32, "-output", "json")
    assert partly.code == ExitCode.PARTLY
    assert json.loads(partly.out) == {"denied": [ek_hash], "not_found": ["cd" * 32]}
    assert cli("tpm", "deny", ek_hash).code == ExitCode.NOT_FOUND
    assert cli("tpm", "allow", "xyz").code == ExitCode.USAGE
    assert cli("tpm", "allow").code == ExitCode.USAGE


def test_agents_when_there_are_none(cli: Cli) -> None:
    agent = "spiffe://example.org/spire/agent/tpm/x"
    assert cli("agent", "list", "-banned=false").out == "No attested agents found\n"
    assert cli("agent", "count", "-attestationType", "tpm").out == "0 attested agents\n"
    assert cli("agent", "purge").out == "No agents to purge.\n"
    for verb in ("show", "evict", "ban"):
        answer = cli("agent", verb, "-spiffeID", agent)
        assert answer.code == ExitCode.NOT_FOUND
        assert answer.err.startswith("Error: ")
    assert json.loads(cli("agent", "list", "-output", "json").out)["agents"] == []


def test_health(cli: Cli, tmp_path: Path) -> None:
    assert cli("healthcheck").out == "Server is healthy.\n"
    verbose = cli("healthcheck", "-verbose", "-shallow")
    assert verbose.out.startswith("Checking ")
    away = cli("healthcheck", where=str(tmp_path / "none.sock"))
    assert away.code == ExitCode.UNREACHABLE
    assert "is spire-hw-server running?" in away.err


def test_errors_are_json_when_json_was_asked_for(cli: Cli, tmp_path: Path) -> None:
    answer = cli("agent", "show", "-spiffeID", "nonsense", "-output", "json")
    assert answer.code == ExitCode.USAGE
    assert json.loads(answer.err)["error"]["code"] == "INVALID_ARGUMENT"
    file = tmp_path / "file"
    file.touch()
    answer = cli("bundle", "show", "-output=json", where=str(file))
    assert answer.code == ExitCode.UNREACHABLE
    assert json.loads(answer.err)["error"]["code"] == "UNAVAILABLE"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every socket")
def test_a_socket_that_others_own_is_named(cli: Cli, socket_path: Path) -> None:
    socket_path.chmod(0)
    try:
        assert cli("bundle", "show").code == ExitCode.DENIED
    finally:
        socket_path.chmod(0o770)
