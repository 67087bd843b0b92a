"""`key` and `localauthority show -custody` against a real server."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from spire_hw.cli.run import ExitCode

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.server_cli.conftest import Cli


def test_keys_are_listed_with_the_authorities_they_belong_to(cli: Cli) -> None:
    answer = cli("key", "list")
    assert answer.code == 0
    assert re.search(r"\AFound \d+ keys?:\n\nKey", answer.out)
    assert re.search(r"^Authority +: X\.509 [0-9a-f]{40} \(active\)$", answer.out, re.MULTILINE)
    assert re.search(r"^Custody +: software$", answer.out, re.MULTILINE)
    keys = json.loads(cli("key", "list", "-output", "json").out)["keys"]
    active = [k for k in keys if (k["authority"] or {}).get("status") == "active"]
    assert {k["authority"]["kind"] for k in active} == {"X.509", "JWT"}
    assert all(re.fullmatch("[0-9a-f]{64}", k["fingerprint"]) for k in keys)


def test_one_key_is_shown_with_its_attributes(cli: Cli) -> None:
    keys = json.loads(cli("key", "list", "-output", "json").out)["keys"]
    answer = cli("key", "show", keys[0]["id"])
    assert answer.code == 0
    assert "Location    : memory of this process\n" in answer.out
    assert re.search(r"^Last used +: (in )?\d+ s (ago )?\(", answer.out, re.MULTILINE)
    assert "Attributes\n  exportable : yes: by whoever reads it\n" in answer.out
    assert cli("key", "show", keys[0]["id"], "-field", "custody").out == "software\n"


def test_a_key_that_is_not_there_is_not_found(cli: Cli) -> None:
    for words in (("show", "nope"), ("attest", "nope")):
        answer = cli("key", *words)
        assert answer.code == ExitCode.NOT_FOUND
        assert 'key "nope" not found' in answer.err


def test_evidence_is_given_and_checked_without_the_server(cli: Cli, tmp_path: Path) -> None:
    keys = json.loads(cli("key", "list", "-output", "json").out)["keys"]
    file = tmp_path / "evidence"
    nonce = "00112233445566778899"
    given = cli("key", "attest", keys[0]["id"], "-nonce", nonce, "-out", str(file))
    assert (given.code, given.out) == (0, "")
    checks = ("key", "attest", "-verify", str(file), "-nonce", nonce)
    answer = cli(*checks, where="/nowhere")
    assert answer.code == 0
    assert f"Fingerprint : {keys[0]['fingerprint']}\n" in answer.out
    assert "Believed: custody software: nobody's word: the key is in software\n" in answer.out
    values = json.loads(cli(*checks, "-output", "json", where="/nowhere").out)
    assert values["holds"]
    signer = values["signer"]["fingerprint"]
    pinned = cli(*checks, "-signer", signer, "-key", keys[0]["fingerprint"], where="/nowhere")
    assert pinned.code == 0
    assert "name it with -signer" not in pinned.out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("-nonce", "ff" * 8), "nonce_mismatch"),
        (("-signer", "0" * 64), "signer_unknown"),
        (("-key", "0" * 64), "key_mismatch"),
        (("-maxAge", "0s"), "too_old"),
    ],
)
def test_evidence_that_is_not_what_was_asked_for_fails(
    cli: Cli, tmp_path: Path, words: tuple[str, ...], code: str
) -> None:
    keys = json.loads(cli("key", "list", "-output", "json").out)["keys"]
    file = tmp_path / "evidence"
    assert cli("key", "attest", keys[0]["id"], "-out", str(file)).code == 0
    answer = cli("key", "attest", "-verify", str(file), *words)
    assert answer.code == 1
    assert f"[{code}]" in answer.err
    values = json.loads(cli("key", "attest", "-verify", str(file), *words, "-output", "json").out)
    assert not values["holds"]
    assert code in [one["code"] for one in values["findings"]]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("x509-CA-A", "-verify", "file"),
        ("x509-CA-A", "-nonce", "zz"),
        ("-verify", "file", "-signer", "12"),
    ],
)
def test_wrong_usage_is_told(cli: Cli, words: tuple[str, ...]) -> None:
    assert cli("key", "attest", *words).code == ExitCode.USAGE


@pytest.mark.parametrize("content", ["", "x.y.z", "no evidence", "a" * 100_000])
def test_a_file_that_is_no_evidence_is_refused(cli: Cli, tmp_path: Path, content: str) -> None:
    file = tmp_path / "evidence"
    file.write_text(content)
    answer = cli("key", "attest", "-verify", str(file))
    assert answer.code == 1
    assert "Traceback" not in answer.err


def test_custody_of_authorities_is_shown_when_asked_for(cli: Cli) -> None:
    for kind in ("x509", "jwt"):
        plain = cli("localauthority", kind, "show")
        assert "Custody" not in plain.out
        answer = cli("localauthority", kind, "show", "-custody")
        assert re.search(
            r"^  Custody: software\n  Key: \S+ in memory of this process$", answer.out, re.MULTILINE
        )
        words = ("localauthority", kind, "show", "-output", "json")
        values = json.loads(cli(*words, "-custody").out)
        assert values["active"]["custody"]["custody"] == "software"
        del values["active"]["custody"]
        for slot in ("prepared", "old"):
            if values.get(slot):
                del values[slot]["custody"]
        assert values == json.loads(cli(*words).out)
