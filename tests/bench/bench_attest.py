"""Print `attestations_per_server_cpu_s`: whole `tpm` attestations a server does in a CPU second.

Each node has a TPM of its own (software, endorsement key on P-256 with a vendor's certificate) and a
connection of its own. All of the server's work counts: TLS handshake, HTTP/2, the exchange with
credential, certify and quote, the SVID, the transaction in SQLite, the log at its usual level.
The nodes' work is in this process and does not count. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from spire_hw._pb import server_agent_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.key import SoftwareSigner
from spire_hw.x509.csr import build_csr
from spire_hw_sim.meter import MeteredServer, server_process, tell
from spire_hw_sim.servers import AGENT, TIMEOUT_S, Operator, ScriptedAgent, server_config
from spire_hw_sim.softtpm import SoftTpm, make_ek
from spire_hw_sim.tpmnode import TpmNode, Vendor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.bundle.bundle import Bundle

ROUNDS = 30
WARM = 20
CALLERS = 4


async def attest(node: TpmNode, port: int, bundle: Bundle) -> None:
    """Let one node attest over a new connection."""
    assert node.key is not None
    csr = await build_csr(SoftwareSigner(node.key.private))
    params = pb.AttestAgentRequest.Params(
        data=types_pb2.AttestationData(type="tpm", payload=node.payload()),
        params=pb.AgentX509SVIDParams(csr=csr),
    )
    async with (
        await ScriptedAgent(port, bundle).channel() as channel,
        channel.bidi(AGENT + "AttestAgent", pb.AttestAgentResponse, timeout_s=TIMEOUT_S) as call,
    ):
        await call.send(pb.AttestAgentRequest(params=params))
        asked = await call.receive()
        assert asked is not None
        await call.send(pb.AttestAgentRequest(challenge_response=node.answer(asked.challenge)))
        answer = await call.receive()
        assert answer is not None
        assert answer.WhichOneof("step") == "result"


async def attest_all(nodes: Sequence[TpmNode], port: int, bundle: Bundle) -> None:
    """Let nodes attest, a few at a time."""
    waiting = iter(nodes)

    async def work() -> None:
        for node in waiting:
            await attest(node, port, bundle)

    await asyncio.gather(*(work() for _ in range(CALLERS)))


async def measure(server: MeteredServer, vendor: Vendor, count: int) -> None:
    """Print the figure of the best round."""
    operator = Operator(server.socket)
    bundle = await operator.bundle()
    await operator.close()

    def make(number: int) -> list[TpmNode]:
        return [vendor.equip(TpmNode(SoftTpm(ek=make_ek("L-2")))) for _ in range(number)]

    await attest_all(make(WARM), server.port, bundle)
    rates = []
    for _ in range(ROUNDS):
        nodes = make(count // ROUNDS)
        before = server.cpu_s()
        await attest_all(nodes, server.port, bundle)
        rates.append(len(nodes) / (server.cpu_s() - before))
    sys.stdout.write("per server CPU second, by round: " + " ".join(f"{r:.0f}" for r in rates))
    sys.stdout.write("\n")
    tell("attestations_per_server_cpu_s", max(rates))


def config(directory: Path, vendor: Vendor) -> str:
    """Return the server's configuration."""
    roots = directory / "roots.der"
    roots.write_bytes(vendor.root.certificate)
    return server_config(
        directory,
        more="ratelimit { attestation = false }",
        plugins=f"""NodeAttestor "tpm" {{ plugin_data {{
          endorsement_ca_path = "{roots}"
          ek_policy = "ca"
          pcrs = {{ sha256 = [0, 2, 4, 7] }}
        }} }}""",
    )


def main() -> None:
    """Start the server, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attestations", type=int, default=1500)
    arguments = parser.parse_args()
    vendor = Vendor.make()
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        directory = Path(name)
        with server_process(directory, config(directory, vendor)) as server:
            asyncio.run(measure(server, vendor, arguments.attestations))


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    main()
