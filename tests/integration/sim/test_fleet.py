"""A small fleet against the real server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.bundle.document import encode_pem
from spire_hw_sim.fleet.keys import FleetKeys
from spire_hw_sim.meter import MeteredServer, server_process
from spire_hw_sim.servers import TRUST_DOMAIN, Operator, server_config

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

NODES = 6


def config(directory: Path, keys: FleetKeys, pcr: bytes) -> str:
    policies = directory / "policies"
    policies.mkdir()
    text = f'policy "fleet" {{ pcrs {{ sha256 {{ "4" = ["{pcr.hex()}"] }} }} }}'
    (policies / "fleet.hcl").write_text(text)
    attestor = f'endorsement_ca_path = "{keys.roots}" ek_policy = "ca"'
    server = server_config(
        directory, plugins=f'NodeAttestor "tpm" {{ plugin_data {{ {attestor} }} }}'
    )
    return f'{server}\nposture {{ policy_dir = "{policies}" heartbeat_interval = "1s" }}\n'


def run_fleet(
    server: MeteredServer, directory: Path, *more: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    async def bundle() -> bytes:
        operator = Operator(server.socket)
        found = await operator.bundle()
        await operator.close()
        return encode_pem(found)

    path = directory / "bundle.pem"
    path.write_bytes(asyncio.run(bundle()))
    command = [sys.executable, "-m", "spire_hw_sim", "fleet", str(directory / "fleet")]
    command += ["--nodes", str(NODES), "--server", f"127.0.0.1:{server.port}"]
    command += ["--trust-domain", TRUST_DOMAIN, "--bundle", str(path), "--output", "json", *more]
    done = subprocess.run(  # noqa: S603 - ours
        command, capture_output=True, text=True, timeout=100, check=False
    )
    return done, json.loads(done.stdout)


def test_a_fleet_attests_and_beats(tmp_path: Path) -> None:
    keys = FleetKeys(tmp_path / "fleet")
    with server_process(tmp_path, config(tmp_path, keys, keys.pcrs["sha256", 4])) as server:
        done, told = run_fleet(server, tmp_path, "--duration", "4")
    assert done.returncode == 0, done.stderr
    assert told["states"] == {"attested": NODES}
    assert told["attestations"]["done"] == NODES
    assert told["heartbeats"]["done"] >= NODES
    assert told["heartbeats"]["failed"] == 0
    assert told["heartbeats"]["latency_ms"]["max"] > 0
    assert "all nodes attested" in done.stderr


def test_what_a_server_refuses_is_counted_by_reason(tmp_path: Path) -> None:
    keys = FleetKeys(tmp_path / "fleet")
    with server_process(tmp_path, config(tmp_path, keys, bytes(32))) as server:
        done, told = run_fleet(server, tmp_path, "--attest-within", "3")
    assert done.returncode == 1
    assert "have not attested" in done.stderr
    assert told["attested"] == 0
    assert told["attestations"]["failures"]["pcr_mismatch"] >= NODES
