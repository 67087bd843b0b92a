"""`spire-hw-server tpm enroll` against a real server."""

from __future__ import annotations

import io
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from spire_hw.cli.run import ExitCode
from spire_hw.tpm.public import ek_hash
from spire_hw_sim.softtpm import make_ek

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.server_cli.conftest import Cli

A, B, C = ("ab" * 32, "cd" * 32, "ef" * 32)


@pytest.fixture(autouse=True)
def empty_list(cli: Cli) -> Iterator[None]:
    yield
    listed = [ek["ek_hash"] for ek in json.loads(cli("tpm", "list", "-output", "json").out)["eks"]]
    if listed:
        assert cli("tpm", "deny", *listed).code == 0


def listed(cli: Cli) -> dict[str, tuple[str, str]]:
    found = json.loads(cli("tpm", "list", "-output", "json").out)["eks"]
    assert all(ek["created_at"] for ek in found)
    return {ek["ek_hash"]: (ek["comment"], ek["owner"]) for ek in found}


def test_table_is_enrolled_line_by_line(cli: Cli, tmp_path: Path) -> None:
    table = tmp_path / "fleet.csv"
    table.write_text(f"ek_hash,owner,comment\n{A},web,rack 1\n{B},,\nxyz,,\n{A},,twice\n")
    dry = cli("tpm", "enroll", "-csv", str(table), "--dry-run", "-owner", "ops")
    assert dry.code == ExitCode.PARTLY
    assert dry.out.endswith("Nothing was changed; it would be: 2 added, 2 refused\n")
    assert listed(cli) == {}
    done = cli("tpm", "enroll", "-csv", str(table), "-owner", "ops")
    assert done.code == ExitCode.PARTLY
    assert done.out.splitlines()[0] == f"line 2  added      {A} rack 1"
    assert done.out.splitlines()[2].startswith('line 4  refused    "xyz" is not an endorsement key')
    assert done.out.splitlines()[3:] == [
        "line 5  refused    same EK hash as line 2",
        "2 added, 2 refused",
    ]
    assert listed(cli) == {A: ("rack 1", "web"), B: ("", "ops")}
    table.write_text(f"{A},rack 2,web\n{B},,ops\n{C}\n")
    again = cli("tpm", "enroll", "-csv", str(table), "-output", "json")
    assert again.code == 0
    values = json.loads(again.out)
    assert [one["outcome"] for one in values["results"]] == ["updated", "unchanged", "added"]
    assert values["counts"] == {"added": 1, "updated": 1, "unchanged": 1, "refused": 0}
    assert listed(cli)[A] == ("rack 2", "web")
    shown = cli("tpm", "list").out
    assert "Comment           : rack 2\nOwner             : web\n" in shown


def test_large_table_is_enrolled_in_parts(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "fleet.csv"
    table.write_text("".join(f"{n:064x}\n" for n in range(601)))
    done = cli("tpm", "enroll", "-csv", str(table))
    assert done.out.endswith("601 added\n")
    assert done.err == ""
    assert len(listed(cli)) == 601
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    again = cli("tpm", "enroll", "-csv", str(table))
    assert again.out.endswith("601 unchanged\n")
    assert "601/601" in again.err


def test_long_comment_is_refused_by_the_server_alone(cli: Cli, tmp_path: Path) -> None:
    table = tmp_path / "fleet.csv"
    table.write_text(f"{A},{'x' * 1025}\n{B}\n")
    done = cli("tpm", "enroll", "-csv", str(table))
    assert done.code == ExitCode.PARTLY
    assert "line 1  refused    comment is longer than 1024 characters\n" in done.out
    assert set(listed(cli)) == {B}


def _node(label: str) -> dict[str, Any]:
    key = make_ek(label).private.public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return {
        "ek_hash": ek_hash(key),
        "template": label,
        "public_key": pem,
        "certificate": None,
        "chain": [],
    }


def test_what_a_node_printed_is_enrolled(cli: Cli, tmp_path: Path) -> None:
    keys = [_node("L-2"), _node("L-1")]
    host = tmp_path / "host.json"
    host.write_text(json.dumps({"ek_hash": keys[0]["ek_hash"], "endorsement_keys": keys}))
    done = cli("tpm", "enroll", "--from-node", str(host), "-comment", "rack 4", "-owner", "web")
    assert (done.code, done.out.splitlines()[-1]) == (0, "1 added")
    assert listed(cli) == {keys[0]["ek_hash"]: ("rack 4", "web")}
    assert cli("tpm", "enroll", "-fromNode", str(host), "-template", "L-1").code == 0
    assert set(listed(cli)) == {key["ek_hash"] for key in keys}
    host.write_text(json.dumps(keys[0] | {"ek_hash": A}))
    forged = cli("tpm", "enroll", "-fromNode", str(host))
    assert forged.code == ExitCode.FAILED
    assert "ek_hash is not that of public_key" in forged.out


def test_standard_input_is_read(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{C},piped\n".encode())))
    assert cli("tpm", "enroll", "-csv", "-").code == 0
    assert listed(cli) == {C: ("piped", "")}


def test_wrong_use_is_told(cli: Cli, tmp_path: Path) -> None:
    assert cli("tpm", "enroll").code == ExitCode.USAGE
    assert cli("tpm", "enroll", "-csv", "a", "-fromNode", "b").code == ExitCode.USAGE
    missing = cli("tpm", "enroll", "-csv", str(tmp_path / "none"))
    assert missing.code == ExitCode.FAILED
    assert "cannot be read" in missing.err
    (tmp_path / "bad.csv").write_bytes(b"\xff")
    bad = cli("tpm", "enroll", "-csv", str(tmp_path / "bad.csv"))
    assert bad.code == ExitCode.USAGE
    assert "bad.csv: not UTF-8" in bad.err
