"""`localauthority`, `logger` and `bundle` against a real server."""

from __future__ import annotations

import io
import json
import re
import sys
from typing import TYPE_CHECKING

import pytest

from spire_hw.bundle.bundle import Bundle, JwtAuthority
from spire_hw.bundle.document import encode_document, encode_pem
from spire_hw.cli.run import ExitCode
from spire_hw.key import spki_der
from spire_hw_sim.pki import Authority

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.server_cli.conftest import Cli

_TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \+0000 UTC"
_STATE = {
    "x509": (
        r"  Authority ID: [0-9a-f]{40}\n"
        rf"  Expires at: {_TIME}\n"
        r"  Upstream authority ID: No upstream authority\n"
    ),
    "jwt": rf"  Authority ID: \S+\n  Expires at: {_TIME}\n",
}
TITLES = {"x509": "X.509", "jwt": "JWT"}
KINDS = pytest.mark.parametrize("kind", ["x509", "jwt"])


def show(cli: Cli, kind: str) -> dict[str, dict[str, str]]:
    answer = cli("localauthority", kind, "show", "-output", "json")
    assert (answer.code, answer.err) == (0, "")
    found: dict[str, dict[str, str]] = json.loads(answer.out)
    return found


def change(cli: Cli, kind: str, verb: str, title: str, authority_id: str = "") -> str:
    words = ["-authorityID", authority_id] if authority_id else []
    answer = cli("localauthority", kind, verb, *words)
    assert (answer.code, answer.err) == (0, "")
    assert re.fullmatch(f"{title} {TITLES[kind]} authority:\n{_STATE[kind]}", answer.out)
    return answer.out.split("Authority ID: ")[1].split("\n")[0]


@KINDS
def test_a_compromised_authority_from_preparation_to_revocation(cli: Cli, kind: str) -> None:
    first = show(cli, kind)["active"]["authority_id"]
    second = change(cli, kind, "prepare", "Prepared")
    assert show(cli, kind)["prepared"]["authority_id"] == second
    assert change(cli, kind, "activate", "Activated", second) == second
    state = show(cli, kind)
    assert (state["active"]["authority_id"], state["old"]["authority_id"]) == (second, first)
    shown = cli("localauthority", kind, "show").out
    title = TITLES[kind]
    assert re.fullmatch(
        f"Active {title} authority:\n{_STATE[kind]}\n"
        f"Prepared {title} authority:\n  No prepared {title} authority found\n\n"
        f"Old {title} authority:\n{_STATE[kind]}",
        shown,
    )
    assert change(cli, kind, "taint", "Tainted", first) == first
    assert change(cli, kind, "revoke", "Revoked", first) == first
    bundle = json.loads(cli("bundle", "show", "-output", "json").out)
    assert first not in json.dumps(bundle["jwt_authorities"])
    assert len(bundle["x509_authorities" if kind == "x509" else "jwt_authorities"]) == 1


@KINDS
@pytest.mark.parametrize("verb", ["activate", "taint", "revoke"])
def test_an_authority_that_is_not_there(cli: Cli, kind: str, verb: str) -> None:
    without = cli("localauthority", kind, verb)
    assert without.code == ExitCode.USAGE
    assert "an authority ID is required" in without.err
    unknown = cli("localauthority", kind, verb, "-authorityID", "nobody")
    assert unknown.code in {ExitCode.FAILED, ExitCode.USAGE, ExitCode.NOT_FOUND}
    assert unknown.err.startswith("Error: ")
    as_json = cli("localauthority", kind, verb, "-authorityID", "nobody", "-output", "json")
    assert json.loads(as_json.err)["error"]["message"]


def test_the_log_level_is_shown_set_and_reset(cli: Cli) -> None:
    assert cli("logger", "get").out == "Logger Level : info\nLaunch Level : info\n\n"
    changed = cli("logger", "set", "-level", "warn")
    assert (changed.code, changed.out) == (0, "Logger Level : warning\nLaunch Level : info\n\n")
    assert json.loads(cli("logger", "get", "-output", "json").out) == {
        "current_level": "WARN",
        "launch_level": "INFO",
    }
    assert cli("logger", "reset").out == "Logger Level : info\nLaunch Level : info\n\n"


def test_a_log_level_nobody_knows(cli: Cli) -> None:
    assert cli("logger", "set").code == ExitCode.USAGE
    unknown = cli("logger", "set", "-level", "loud")
    assert unknown.code == ExitCode.USAGE
    assert "use one of" in unknown.err


@pytest.fixture
def partner() -> Bundle:
    authority = Authority("partner.example")
    key = JwtAuthority("k", spki_der(authority.key.public_key()))
    bundle = authority.bundle()
    return Bundle(bundle.trust_domain, bundle.x509_authorities, (key,))


def test_a_foreign_bundle_from_setting_to_deletion(
    cli: Cli, partner: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("bundle", "count").out == "1 bundle\n"
    pem = tmp_path / "partner.pem"
    pem.write_bytes(encode_pem(partner))
    made = cli("bundle", "set", "-id", "spiffe://partner.example", "-path", str(pem))
    assert (made.code, made.out, made.err) == (0, "bundle set.\n", "")
    assert cli("bundle", "count", "-output", "json").out == '{"count":2}\n'

    rule = "*" * 40
    assert cli("bundle", "list").out == f"{rule}\n* partner.example\n{rule}\n{pem.read_text()}"
    assert cli("bundle", "list", "-id", "partner.example").out == pem.read_text()

    document = encode_document(partner)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(document)))
    assert cli("bundle", "set", "-id", "partner.example", "-format", "spiffe").code == 0
    shown = cli("bundle", "list", "-id", "partner.example", "-format", "spiffe")
    assert {key["use"] for key in json.loads(shown.out)["keys"]} == {"x509-svid", "jwt-svid"}
    listed = json.loads(cli("bundle", "list", "-output", "json").out)
    assert [b["trust_domain"] for b in listed["bundles"]] == ["partner.example"]

    gone = cli("bundle", "delete", "-id", "spiffe://partner.example")
    assert (gone.code, gone.out) == (0, "bundle deleted.\n")
    assert cli("bundle", "list").out == ""
    again = cli("bundle", "delete", "-id", "spiffe://partner.example")
    assert again.code == ExitCode.NOT_FOUND
    assert "cannot delete the bundle of partner.example" in again.err
    assert cli("bundle", "list", "-id", "partner.example").code == ExitCode.NOT_FOUND


def test_a_bundle_that_entries_need_is_deleted_only_on_purpose(
    cli: Cli, partner: Bundle, tmp_path: Path
) -> None:
    pem = tmp_path / "partner.pem"
    pem.write_bytes(encode_pem(partner))
    assert cli("bundle", "set", "-id", "partner.example", "-path", str(pem)).code == 0
    made = cli(
        "entry", "create", "-spiffeID", "spiffe://example.org/federated",
        "-parentID", "spiffe://example.org/node", "-selector", "unix:uid:1",
        "-federatesWith", "spiffe://partner.example", "-output", "json",
    )  # fmt: skip
    entry_id = json.loads(made.out)["results"][0]["entry"]["id"]
    refused = cli("bundle", "delete", "-id", "partner.example")
    assert refused.code == ExitCode.FAILED
    assert refused.out == ""
    assert cli("bundle", "delete", "-id", "partner.example", "-mode", "dissociate").code == 0
    left = json.loads(cli("entry", "show", "-entryID", entry_id, "-output", "json").out)
    assert left["entries"][0]["federates_with"] == []
    assert cli("entry", "delete", "-entryID", entry_id).code == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["set", "-path", "/nonexistent"], ExitCode.USAGE, "a trust domain is required"),
        (["set", "-id", "Partner", "-path", "/nonexistent"], ExitCode.USAGE, "trust domain"),
        (["set", "-id", "partner.example", "-path", "/nonexistent"], ExitCode.USAGE, "cannot be"),
        (
            ["set", "-id", "partner.example", "-path", "/dev/zero"],
            ExitCode.USAGE,
            "is larger than 4 MiB",
        ),
        (["set", "-id", "partner.example", "-path", "/dev/null"], ExitCode.USAGE, ""),
        (["delete"], ExitCode.USAGE, "a trust domain is required"),
        (["delete", "-id", "partner.example", "-mode", "burn"], ExitCode.USAGE, "burn"),
        (["list", "-id", "a b"], ExitCode.USAGE, "trust domain"),
    ],
)
def test_what_does_not_make_sense(cli: Cli, words: list[str], code: int, says: str) -> None:
    answer = cli("bundle", *words)
    assert (answer.code, answer.out) == (code, "")
    assert says in answer.err


def test_the_own_bundle_is_not_set_by_hand(cli: Cli, tmp_path: Path) -> None:
    pem = tmp_path / "own.pem"
    pem.write_bytes(encode_pem(Authority("example.org").bundle()))
    answer = cli("bundle", "set", "-id", "example.org", "-path", str(pem))
    assert answer.code == ExitCode.USAGE
    assert "own trust domain" in answer.err
