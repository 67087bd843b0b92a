"""`spire-hw-plugin`: launchers, and what `check` says about good plugins and bad ones."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spire_hw.config import hcl
from spire_hw.errors import InvalidInputError
from spire_hw.plugin.info import PluginKind
from spire_hw.plugin.section import parse_plugins
from spire_hw_plugins.cli.install import launcher
from spire_hw_plugins.serve import available

MAIN = "from spire_hw_plugins.cli.main import main; main()"
BAD = """\
import signal
import sys
from pathlib import Path

from spire_hw.config.schema import Model, decode, faults
from spire_hw.errors import SpireHwError
from spire_hw.goplugin.guest import serve
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.plugin.info import PluginKind
from spire_hw.plugin.keymanager import KeyInfo, KeySignature
from spire_hw_plugins.keymanager.software import SoftwareKeys

FAULT = sys.argv[1]
marker = Path(sys.argv[2])


class Config(Model):
    pass


class Bad(SoftwareKeys):
    def __init__(self, host):
        super().__init__()
        if FAULT == "ctrl-c":
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def validate(self, config):
        return faults(config, Config)

    async def configure(self, config):
        if FAULT == "picky" and not self.is_loaded:
            raise SpireHwError("no device")
        self.load({} if not self.is_loaded else self._keys)
        if FAULT == "keeps-some" and marker.exists():
            await self.generate_key("spire-hw-check-ec-p256", KeyType.EC_P256)
        marker.touch()

    async def generate_key(self, key_id, key_type):
        if FAULT == "same-key" and key_id in self._keys:
            return self._keys[key_id].info
        return await super().generate_key(key_id, key_type)

    async def get_public_keys(self):
        return [] if FAULT == "forgetful" else await super().get_public_keys()

    async def sign_data(self, key_id, digest, options):
        if FAULT == "hashes-again":
            digest = options.hash.digest(digest)
        made = await super().sign_data(key_id, digest, options)
        if FAULT == "fingerprint":
            made = KeySignature(made.signature, "another")
        return made

    async def close(self):
        pass


sys.exit(serve(PluginKind.KEY_MANAGER, Bad))
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        [sys.executable, "-c", MAIN, *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("SPIRE_HW_")},
    )


def check(*args: str) -> tuple[int, dict[str, Any]]:
    found = run("check", "-output", "json", "-logLevel", "fatal", *args)
    return found.returncode, json.loads(found.stdout)


def bad_plugin(tmp_path: Path) -> str:
    program = tmp_path / "bad"
    program.write_text(f"#!{sys.executable}\n{BAD}")
    program.chmod(0o755)
    return str(program)


def failed(report: dict[str, Any]) -> dict[str, str]:
    return {s["name"]: s["detail"] for s in report["steps"] if s["outcome"] == "failed"}


def test_launchers_are_the_same_wherever_they_are_put(tmp_path: Path) -> None:
    first = json.loads(run("install", "-output", "json", str(tmp_path / "a" / "b")).stdout)
    again = json.loads(run("install", "-output", "json", str(tmp_path / "a" / "b")).stdout)
    other = json.loads(run("install", "-output", "json", str(tmp_path / "c")).stdout)
    assert first == again
    rows = first["plugins"]
    assert [r["checksum"] for r in rows] == [r["checksum"] for r in other["plugins"]]
    assert {(r["kind"], r["name"]) for r in rows} == {(k.value, n) for k, n in available()}
    for row in rows:
        path = Path(row["path"])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["checksum"]
        assert path.stat().st_mode & 0o777 == 0o755
    assert len(list((tmp_path / "a" / "b").iterdir())) == len(rows)


def test_the_printed_blocks_are_configuration(tmp_path: Path) -> None:
    found = parse_plugins(hcl.parse(run("install", str(tmp_path)).stdout))
    assert {(c.kind, c.name) for c in found} == set(available())
    assert all(Path(c.cmd).is_file() and len(c.checksum) == 64 for c in found)
    assert ("join_token" in {c.name for c in found}) is False


def test_an_interpreter_the_kernel_cannot_start_is_refused() -> None:
    for interpreter in ("/" + "x" * 260, "/opt/my python"):
        with pytest.raises(InvalidInputError, match="too long or has a space"):
            launcher(PluginKind.KEY_MANAGER, "memory", interpreter)


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        (["serve", "KeyManager", "memory"], "this program is a plugin", 1),
        (["serve", "KeyManger", "memory"], "'KeyManger' is unknown; use one of KeyManager", 2),
        (["serve", "KeyManager", "nothing"], "there are KeyManager disk", 5),
        (["serve", "NodeAttestor", "join_token"], "part of every host", 2),
        (["serve", "-side", "server", "WorkloadAttestor", "unix"], "not for the server", 2),
        (["check", "./x"], "-kind is required", 2),
        (["check", "-kind", "KeyManager", "./no-such-program"], "does not exist", 5),
        (["check", "-kind", "SVIDStore", "-side", "server", "/bin/true"], "on the server", 5),
        (["check", "-kind", "KeyManager", "-data", "/nowhere", "/bin/true"], "cannot be read", 3),
    ],
)
def test_wrong_use_is_told(args: list[str], words: str, code: int) -> None:
    found = run(*args)
    assert words in found.stderr
    assert found.returncode == code


def test_our_own_plugins_pass(tmp_path: Path) -> None:
    run("install", str(tmp_path))
    data = tmp_path / "keys.hcl"
    data.write_text(f'keys_path = "{tmp_path}/keys.json"')
    command = str(tmp_path / "keymanager-disk")
    code, report = check("-kind", "KeyManager", "-data", str(data), command)
    assert (code, failed(report), report["noted"]) == (0, {}, 0)


def test_the_report_is_readable_and_flags_may_come_last(tmp_path: Path) -> None:
    run("install", str(tmp_path))
    command = str(tmp_path / "workloadattestor-unix")
    found = run("check", command, "--kind", "workloadattestor")
    assert found.returncode == 0
    lines = found.stdout.splitlines()
    assert lines[0] == f"WorkloadAttestor plugin for the agent: {command}"
    assert any(line.startswith("  ok    attests a process") for line in lines)
    assert lines[-1] == "13 passed, 0 failed, 0 noted, 0 skipped"


@pytest.mark.parametrize(
    ("fault", "step", "words"),
    [
        ("picky", "takes its configuration", "no device"),
        ("same-key", "replaces a key", "still the old one"),
        ("forgetful", "returns and lists", "not listed"),
        ("hashes-again", "makes ec-p256 keys", "hashed a second time"),
        ("fingerprint", "makes ec-p256 keys", "another key"),
        ("ctrl-c", "leaves Ctrl-C", "signal 2"),
        ("keeps-some", "has its keys after a restart", "some of them are gone"),
    ],
)
def test_bad_plugins_are_found_out(fault: str, step: str, words: str, tmp_path: Path) -> None:
    code, report = check("-kind", "KeyManager", bad_plugin(tmp_path), fault, str(tmp_path / "m"))
    found = failed(report)
    assert code == 1
    assert any(name.startswith(step) and words in detail for name, detail in found.items()), found


def test_what_is_no_plugin_is_told(tmp_path: Path) -> None:
    program = tmp_path / "banner"
    program.write_text("#!/bin/sh\necho '\x1b[2Jhello'\nsleep 60\n")
    program.chmod(0o755)
    code, report = check("-kind", "KeyManager", str(program))
    (detail,) = failed(report).values()
    assert code == 1
    assert "is it a plugin at all" in detail
    assert detail.isprintable()


KINDS = {
    "NodeAttestor": ("server", "refuses payloads that are nonsense", "was accepted"),
    "WorkloadAttestor": ("agent", "attests a process", "no idea"),
    "SVIDStore": ("agent", "takes what it is handed", "the store is away"),
    "Notifier": ("server", "takes what it is handed", "nobody listens"),
    "BundlePublisher": ("server", "takes what it is handed", "nobody listens"),
    "CredentialComposer": ("server", "composes a workload's JWT", "changes the subject"),
    "UpstreamAuthority": ("server", "has a CA signed", "not for the key of the request"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [False, True])
def test_plugins_of_every_type_are_judged(kind: str, bad: bool, tmp_path: Path) -> None:
    side, step, words = KINDS[kind]
    program = tmp_path / "sample"
    text = (Path(__file__).parent / "sample_plugin.py").read_text()
    program.write_text(f"#!{sys.executable}\n{text}")
    program.chmod(0o755)
    arguments = [kind, "bad"] if bad else [kind]
    code, report = check("-kind", kind, "-side", side, "-effects", str(program), *arguments)
    found = failed(report)
    if bad:
        assert code == 1
        assert any(n.startswith(step) and words in detail for n, detail in found.items()), found
    else:
        assert (code, found) == (0, {})


def test_without_leave_nothing_is_published(tmp_path: Path) -> None:
    program = tmp_path / "sample"
    text = (Path(__file__).parent / "sample_plugin.py").read_text()
    program.write_text(f"#!{sys.executable}\n{text}")
    program.chmod(0o755)
    code, report = check("-kind", "BundlePublisher", str(program), "BundlePublisher", "bad")
    (step,) = [s for s in report["steps"] if s["name"].startswith("takes what it is handed")]
    assert (code, step["outcome"]) == (0, "skipped")
