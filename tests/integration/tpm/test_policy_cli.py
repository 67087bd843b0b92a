"""From the state of a machine to the approval its key manager takes, by the commands."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization

from spire_hw.cli.run import ExitCode, run
from spire_hw.config.hcl import parse
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, generate_private_key
from spire_hw_agent.cli.commands import root
from spire_hw_plugins.keymanager.tpm import build

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.plugin.info import HostInfo
    from spire_hw_sim.swtpm import Swtpm


def policy(*arguments: str) -> int:
    return run(root, "spire-hw-agent", ["tpm", "policy", *arguments])


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    key = generate_private_key(KeyType.EC_P256)
    path = tmp_path / "authority.key"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    path.with_suffix(".pem").write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return path


@pytest.mark.asyncio
async def test_an_approval_made_by_the_commands_unlocks_the_key(
    agent_host: HostInfo, tpm: Swtpm, tmp_path: Path, key_file: Path
) -> None:
    manager = build(agent_host)
    approvals = tmp_path / "approvals"
    approvals.mkdir()
    await manager.configure(
        parse(
            f"""
            tcti = "{tpm.tcti}"
            policy_pcrs = {{ sha256 = [0, 7] }}
            policy_authority_path = "{key_file.with_suffix(".pem")}"
            approvals_path = "{approvals}"
            policy_ref = "web"
            """
        )
    )
    await manager.generate_key("A", KeyType.EC_P256)
    values = str(tmp_path / "values.json")

    read = ("read", "-tcti", tpm.tcti, "-pcrs", "sha256:0,7", "-out", values)
    assert await asyncio.to_thread(policy, *read) == 0
    out = str(approvals / "one.json")
    given = ("-in", values, "-key", str(key_file), "-ref", "web", "-comment", "6.1", "-out", out)
    assert policy("approve", *given) == 0
    await manager.sign_data("A", bytes(32), SignOptions(HashAlgorithm.SHA256))
    await manager.close()


@pytest.mark.parametrize(
    "pcrs", ["sha256", "sha256:", "sha256:x", "md5:1", "sha256:24", "sha256:-1"]
)
def test_pcrs_that_are_none_are_wrong_usage(pcrs: str, tpm: Swtpm) -> None:
    assert policy("read", "-tcti", tpm.tcti, "-pcrs", pcrs) == ExitCode.USAGE


def test_files_that_are_something_else_are_told(
    tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tmp_path / "values.json"
    values.write_text("{}")
    assert policy("approve", "-in", str(values), "-key", str(key_file)) == ExitCode.USAGE
    assert "PCR values" in capsys.readouterr().err
    assert policy("approve", "-in", str(tmp_path / "none"), "-key", str(key_file)) != 0
    assert "cannot be read" in capsys.readouterr().err
    assert policy("approve", "-key", str(key_file)) == ExitCode.USAGE
    values.write_text('{"version":1,"pcrs":{"sha256":{"0":"' + "00" * 32 + '"}}}')
    assert policy("approve", "-in", str(values), "-key", str(values)) == ExitCode.USAGE
    assert "no private key" in capsys.readouterr().err
