"""Operators' commands about policies, against a real server and without one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from spire_hw.cli.run import ExitCode
from spire_hw.posture.document import encode_evidence
from spire_hw.posture.policyfile import parse_policy
from tests.unit.spire_hw.posture.samples import GOOD, PCRS, booted

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.server_cli.conftest import Cli

P4 = PCRS["sha256", 4].hex()
MAKER = 'nodes { selectors = ["manufacturer:id:4E544300"] }'


def pin(number: int = 4, value: str = P4) -> str:
    return f'pcrs {{ sha256 {{ "{number}" = ["{value}"] }} }}'


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(name: str, inside: str, policy: str = "web") -> str:
        path = tmp_path / name
        path.write_text(f'policy "{policy}" {{\n  {inside}\n}}\n')
        return str(path)

    return written


@pytest.fixture
def evidence(tmp_path: Path) -> str:
    path = tmp_path / "node.json"
    path.write_bytes(encode_evidence(GOOD))
    return str(path)


def test_a_policy_from_creation_to_deletion(cli: Cli, write: Write, tmp_path: Path) -> None:
    (tmp_path / "kernels.sha256").write_text(f"{P4}  vmlinuz\n")
    file = write("web.hcl", 'description = "Web"\npcrs { sha256 { "4" = ["@kernels.sha256"] } }')
    made = cli("policy", "create", "-policyFile", file, "-comment", "rack 7")
    assert (made.code, made.err) == (0, "")
    assert made.out.startswith("Policy       : web@1\nDescription  : Web\nSHA-256      : ")
    assert (
        "For          : every node that no other policy is for\nComment      : rack 7\n" in made.out
    )
    assert f"Stored by    : uid:{os.getuid()}\n" in made.out

    again = cli("policy", "create", "-policyFile", file)
    assert again.code == ExitCode.FAILED
    assert 'there is a policy "web": update it instead' in again.err

    shown = cli("policy", "show", "web", "-field", "text")
    assert parse_policy(shown.out).pcrs == {("sha256", 4): frozenset({PCRS["sha256", 4]})}
    assert "@kernels.sha256" in cli("policy", "show", "web@1").out

    write("web.hcl", f'description = "Web 2"\n{pin(0)}')
    late = cli("policy", "update", "-policyFile", file, "-expectedVersion", "7")
    assert (late.code, late.out) == (ExitCode.FAILED, "")
    assert "has version 1 by now, not 7" in late.err
    changed = cli("policy", "update", "-policyFile", file, "-output", "json")
    assert json.loads(changed.out)["version"] == 2
    listed = json.loads(cli("policy", "list", "-output", "json").out)
    assert [(p["name"], p["version"], p["description"]) for p in listed["policies"]] == [
        ("web", 2, "Web 2")
    ]
    versions = cli("policy", "show", "web", "-versions").out
    assert versions.index("web@1") < versions.index("web@2")

    told = cli("policy", "diff", "web@1", "web@2")
    assert told.code == 0
    assert "pcrs.sha256:0\n  + " in told.out
    assert "pcrs.sha256:4\n  - " in told.out

    gone = cli("policy", "delete", "web", "-comment", "retired")
    assert (gone.code, gone.out) == (0, "Deleted policy web\n")
    assert gone.err.startswith("No policy is left: ")
    assert cli("policy", "delete", "web").code == ExitCode.NOT_FOUND
    assert cli("policy", "show", "web").code == ExitCode.NOT_FOUND
    assert cli("policy", "show", "web@9").code == ExitCode.NOT_FOUND
    assert "State        : deleted" in cli("policy", "show", "web", "-versions").out
    assert "Web 2" in cli("policy", "show", "web@2", "-field", "text").out
    assert cli("policy", "list").out == "Found 0 policies\n"
    assert cli("policy", "update", "-policyFile", file).code == ExitCode.NOT_FOUND

    back = cli("policy", "create", "-policyFile", file, "-field", "version")
    assert back.out == "4\n"
    assert cli("policy", "delete", "web").code == 0


def test_stated_versions_only_go_up(cli: Cli, write: Write) -> None:
    file = write("web.hcl", f"version = 7\n{pin()}", "stated")
    assert cli("policy", "create", "-policyFile", file, "-field", "version").out == "7\n"
    again = cli("policy", "update", "-policyFile", file)
    assert again.code == ExitCode.USAGE
    assert "has had version 7 before" in again.err
    file = write("web.hcl", f"version = 9\n{pin()}", "stated")
    assert cli("policy", "update", "-policyFile", file, "-field", "version").out == "9\n"
    assert cli("policy", "delete", "stated").code == 0


def test_what_cannot_be_in_force_is_not_stored(cli: Cli, write: Write) -> None:
    one = write("one.hcl", f"{MAKER}\n{pin()}", "one")
    assert cli("policy", "create", "-policyFile", one).code == 0
    other = write("other.hcl", f"{MAKER}\n{pin()}", "other")
    refused = cli("policy", "create", "-policyFile", other)
    assert refused.code == ExitCode.USAGE
    assert 'policies "one" and "other" are for the same nodes' in refused.err
    for inside, part in (
        ("colour = 1\nboot { images = [] }", 'other.hcl:2: unknown key "colour"'),
        ("boot { }", "PCR 7 alone does not identify what was booted"),
        (
            'pcrs { sha256 { "4" = ["@missing"] } }',
            "missing cannot be read: No such file or directory",
        ),
    ):
        refused = cli("policy", "create", "-policyFile", write("other.hcl", inside, "other"))
        assert refused.code == ExitCode.FAILED
        assert part in refused.err
    assert cli("policy", "create").code == ExitCode.USAGE
    assert cli("policy", "list", "-field", "policies.0.name").out == "one\n"
    assert cli("policy", "delete", "one").code == 0


def test_a_policy_is_tried_without_a_server(cli: Cli, write: Write, evidence: str) -> None:
    file = write("web.hcl", f'{pin()}\nboot {{ secure_boot = "on" }}')
    held = cli("policy", "test", "-evidence", evidence, "-policyFile", file, where="/nowhere")
    assert (held.code, held.err) == (0, "")
    assert held.out.startswith(f"{evidence} under policy web@1:\n\n✓ tpm key: ")
    assert f"✓ pcr sha256:4: PCR 4 is among 1 allowed: sha256:{P4}\n" in held.out
    assert "✓ secure_boot: Secure Boot is on\n" in held.out
    assert "\nAccepted\n  selector boot:policy:web@1\n" in held.out
    assert "\x1b" not in held.out

    p0, one, two = PCRS["sha256", 0].hex(), "11" * 32, "22" * 32
    write("web.hcl", f'pcrs {{ sha256 {{ "0" = ["{p0}"] "4" = ["{one}", "{two}"] }} }}')
    failed = cli("policy", "test", "-evidence", evidence, "-policyFile", file, where="/nowhere")
    assert (failed.code, failed.err) == (ExitCode.FAILED, "")
    assert f"✗ pcr sha256:4: policy: PCR 4 is not among the allowed values, it is sha256:{P4}" in (
        failed.out
    )
    assert "[pcr_mismatch, quarantine]\n" in failed.out
    lines = failed.out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("PCR "))
    assert lines[start].split() == ["PCR", "machine", "policy"]
    assert lines[start + 1].split() == [
        "sha256:4",
        f"{P4[:16]}..{P4[-8:]}",
        f"{'1' * 16}..{'1' * 8}",
    ]
    assert lines[start + 2].split() == [f"{'2' * 16}..{'2' * 8}"]
    assert lines[-1] == "Not accepted: 1 check fails, action quarantine"

    write("web.hcl", f'nodes {{ selectors = ["model:other"] }}\n{pin()}', "other")
    told = cli("policy", "test", "-evidence", evidence, "-policyFile", file)
    assert told.code == 0
    assert "! nodes: this machine is in no group of the policy" in told.out

    write("web.hcl", f'pcrs {{ sha256 {{ "0" = ["{p0}"] "4" = ["{one}", "{two}"] }} }}')
    told = cli("policy", "test", "-evidence", evidence, "-policyFile", file, "-output", "json")
    (result,) = json.loads(told.out)["results"]
    assert result["is_for_node"] is True
    assert told.code == ExitCode.FAILED
    assert (result["holds"], result["action"], result["selectors"]) == (False, "quarantine", [])
    assert result["pcr_differences"] == [
        {"pcr": "sha256:4", "machine": P4, "allowed": ["11" * 32, "22" * 32]}
    ]
    assert [c["code"] for c in result["checks"] if not c["holds"]] == ["pcr_mismatch"]


def test_wrong_uses_of_test(cli: Cli, write: Write, evidence: str, tmp_path: Path) -> None:
    file = write("web.hcl", pin())
    for words in (
        ("-evidence", evidence),
        ("-policyFile", file),
        ("-policyFile", file, "-policy", "web", "-evidence", evidence),
        ("-policyFile", file, "-evidence", evidence, "-number", "-1"),
        ("-policy", "a@b@c", "-evidence", evidence),
        ("-policy", "web@x", "-evidence", evidence),
    ):
        assert cli("policy", "test", *words).code == ExitCode.USAGE
    assert (
        cli("policy", "test", "-policy", "none", "-evidence", evidence).code == ExitCode.NOT_FOUND
    )
    unreachable = cli("policy", "test", "-policy", "a", "-evidence", evidence, where="/nowhere")
    assert unreachable.code == ExitCode.UNREACHABLE
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    refused = cli("policy", "test", "-evidence", str(bad), "-policyFile", file)
    assert refused.code == ExitCode.USAGE
    assert refused.err == "Error: evidence document: format: is missing\n"
    missing = cli("policy", "test", "-evidence", "/none.json", "-policyFile", file)
    assert missing.code == ExitCode.FAILED
    assert "/none.json cannot be read: No such file or directory" in missing.err


def test_a_draft_is_a_policy_that_accepts(cli: Cli, evidence: str, tmp_path: Path) -> None:
    learnt = cli("policy", "learn", "-evidence", evidence, "-name", "web", where="/nowhere")
    assert (learnt.code, learnt.err) == (0, "")
    file = tmp_path / "learnt.hcl"
    file.write_text(learnt.out)
    assert cli("policy", "validate", str(file), where="/nowhere").out == (
        f"{file}: policy web@1 is valid\n"
    )
    assert cli("policy", "test", "-evidence", evidence, "-policyFile", str(file)).code == 0
    assert cli("policy", "learn").code == ExitCode.USAGE
    assert cli("policy", "learn", "-evidence", evidence, "-name", "Web").code == ExitCode.FAILED
    assert cli("policy", "validate").code == ExitCode.USAGE


def test_whom_a_change_concerns(cli: Cli, write: Write, evidence: str, tmp_path: Path) -> None:
    off = tmp_path / "off.json"
    off.write_bytes(encode_evidence(booted(secure_boot=False)))
    before = write("before.hcl", pin())
    after = write("after.hcl", f"{pin()}\nboot {{ }}")
    words = ("policy", "diff", before, after, "-evidence", evidence, "-evidence", str(off))
    told = cli(*words, where="/nowhere")
    assert told.code == 0
    assert "boot.secure_boot\n  + on\n" in told.out
    assert f"{evidence}: still accepted\n" in told.out
    assert f"{off}: accepted -> quarantine\n✗ secure_boot: policy: Secure Boot is off" in told.out
    values = json.loads(cli(*words, "-output", "json").out)
    assert [v["changes"] for v in values["verdicts"]] == [False, True]
    assert values["verdicts"][1]["after"]["codes"] == ["secureboot"]
    assert cli("policy", "diff", before, before).out == "No difference.\n"


def test_names_from_evidence_do_not_reach_the_terminal(
    cli: Cli, write: Write, tmp_path: Path
) -> None:
    evil = tmp_path / "evil.json"
    evil.write_bytes(
        encode_evidence(booted(commands=("\x1b[2J\n\u202e",), crtm_version="\x1b]0;x"))
    )
    file = write("web.hcl", f'{pin()}\nboot {{ commands = ["linux"] firmware_versions = ["1"] }}')
    told = cli("policy", "test", "-evidence", str(evil), "-policyFile", file)
    assert told.code == ExitCode.FAILED
    assert "\x1b" not in told.out
    assert "\u202e" not in told.out
    assert r"\x1b[2J\x0a" in told.out


def test_colours_are_for_terminals(write: Write, evidence: str) -> None:
    file = write("web.hcl", pin(value="11" * 32))
    words = ["policy", "test", "-evidence", evidence, "-policyFile", file]
    assert b"\x1b[31m" in on_terminal(words, {})
    assert b"\x1b" not in on_terminal(words, {"NO_COLOR": "1"})


def on_terminal(words: list[str], more: dict[str, str]) -> bytes:
    """Return what the program prints to a terminal."""
    environ = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", "from spire_hw_server.cli.main import main; main()", *words]
    with subprocess.Popen(command, stdout=theirs, env=environ | more) as process:  # noqa: S603
        os.close(theirs)
        seen = bytearray()
        with contextlib.suppress(OSError):  # how a terminal ends whose last writer is gone
            while data := os.read(ours, 65536):
                seen += data
        os.close(ours)
    assert process.returncode == ExitCode.FAILED
    return bytes(seen)
