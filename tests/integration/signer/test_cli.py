"""The commands of the signer's program, as an operator types them."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from spire_hw.cli.run import run
from spire_hw_signer.cli.commands import PROGRAM, root
from spire_hw_sim.signer import SignerRig

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = run(root, PROGRAM, args)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_configuration_is_checked_with_policy_and_tls_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = SignerRig(tmp_path, keys="disk")
    where = ("-config", str(rig.config_file))
    code, out, err = command(capsys, "validate", *where)
    assert (code, "is valid" in out, "demonstrations" in err) == (0, True, True)
    rig.write_policy('client "x" {}\nbogus = 1\n')
    (tmp_path / "signer.key").write_text("none")
    code, out, _ = command(capsys, "validate", *where, "-output", "json")
    assert code == 1
    messages = " ".join(fault["message"] for fault in json.loads(out)["faults"])
    for expected in ("bogus", "trust_domain", "signer-policy.conf:2", "signer.key"):
        assert expected in messages, messages
    assert not (tmp_path / "data").exists()


def test_a_configuration_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(capsys, "run", "-config", str(tmp_path / "none"))
    assert (code, "no such file" in err) == (1, True)


def test_health_is_asked_at_the_operators_socket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = SignerRig(tmp_path, keys="disk")
    where = ("-socketPath", str(rig.admin_socket))
    code, _, err = command(capsys, "healthcheck", *where)
    assert (code, "is spire-hw-signer running?" in err) == (3, True)

    async def asked() -> tuple[int, str, str]:
        async with rig:
            return await asyncio.to_thread(command, capsys, "healthcheck", *where, "-verbose")

    code, out, _ = asyncio.run(asked())
    assert code == 0
    assert "Signer is healthy." in out


def test_health_tells_that_a_reload_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = SignerRig(tmp_path, keys="disk")
    where = ("-socketPath", str(rig.admin_socket))

    async def asked() -> tuple[int, str, str]:
        async with rig:
            rig.write_policy("client {")
            assert not await rig.signer.reload()
            return await asyncio.to_thread(command, capsys, "healthcheck", *where)

    code, _, err = asyncio.run(asked())
    assert code == 1
    assert "NOT_SERVING" in err
