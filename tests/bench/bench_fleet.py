"""Print `fleet_2000_core_share` and `fleet_2000_p99_ms`: a server whose 2,000 nodes beat once a minute.

The nodes are light ones in another process; each has its own TPM (software), SVID, address and
connection, and connections are of all ages, so that some are replaced all the time as servers demand.
Once all have attested, the server process is watched for a whole interval of 60 s, at real pace:
its CPU time is the share of one core, and the latency is from a node's answer to the verdict on it.
A policy with PCR values is in force. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spire_hw.bundle.document import encode_pem
from spire_hw_sim.fleet.keys import FleetKeys
from spire_hw_sim.meter import MeteredServer, server_process, tell
from spire_hw_sim.servers import TRUST_DOMAIN, Operator, server_config

PCRS = (0, 2, 4, 7)
INTERVAL_S = 60


def policy(keys: FleetKeys) -> str:
    """Return a policy that all machines of a fleet fulfil."""
    values = "\n".join(f'"{n}" = ["{keys.pcrs["sha256", n].hex()}"]' for n in PCRS)
    return f'policy "fleet" {{ pcrs {{ sha256 {{\n{values}\n}} }} }}\n'


def config(directory: Path, keys: FleetKeys) -> str:
    """Return the server's configuration."""
    policies = directory / "policies"
    policies.mkdir()
    (policies / "fleet.hcl").write_text(policy(keys))
    server = server_config(
        directory,
        more="ratelimit { attestation = false }",
        plugins=f"""NodeAttestor "tpm" {{ plugin_data {{
          endorsement_ca_path = "{keys.roots}"
          ek_policy = "ca"
        }} }}""",
    )
    beats = f'policy_dir = "{policies}" heartbeat_interval = "{INTERVAL_S}s"'
    return f"{server}\nposture {{ {beats} }}\n"


async def bundle_of(server: MeteredServer) -> bytes:
    """Return the bundle as PEM."""
    operator = Operator(server.socket)
    bundle = await operator.bundle()
    await operator.close()
    return encode_pem(bundle)


def measure(server: MeteredServer, directory: Path, keys: Path, nodes: int) -> None:
    """Run the fleet and print the figures."""
    bundle = directory / "bundle.pem"
    bundle.write_bytes(asyncio.run(bundle_of(server)))
    command = [sys.executable, "-m", "spire_hw_sim", "fleet", str(keys), "--nodes", str(nodes)]
    command += ["--server", f"127.0.0.1:{server.port}", "--trust-domain", TRUST_DOMAIN]
    command += ["--bundle", str(bundle), "--duration", str(INTERVAL_S), "--output", "json"]
    began = time.monotonic()
    fleet = subprocess.Popen(  # noqa: S603 - ours
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert fleet.stdout is not None
    assert fleet.stderr is not None
    for line in fleet.stderr:
        sys.stdout.write(line)
        if line.startswith("all nodes attested"):
            break
    sys.stdout.write(f"{nodes} nodes attested in {time.monotonic() - began:.0f} s\n")
    before, began = server.cpu_s(), time.monotonic()
    output, _ = fleet.communicate()
    share = (server.cpu_s() - before) / (time.monotonic() - began)
    told = json.loads(output)
    sys.stdout.write(f"{json.dumps(told)}\n")
    assert fleet.returncode == 0, told
    assert told["heartbeats"]["done"] >= nodes * 0.9, told
    tell("fleet_2000_core_share", share)
    tell("fleet_2000_p99_ms", told["heartbeats"]["latency_ms"]["p99"])


def main() -> None:
    """Start the server, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        directory = Path(name)
        keys = FleetKeys(directory / "fleet")
        with server_process(directory, config(directory, keys)) as server:
            measure(server, directory, directory / "fleet", arguments.nodes)


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    main()
