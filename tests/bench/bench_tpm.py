"""How much of a TPM's speed is left: `tpm_sign_vs_raw`, and what an attestation costs.

Raw is the same TPM2_Sign, with the key loaded, written straight to the simulator's socket. Medians
of interleaved rounds on swtpm; nothing is asserted. Run as `python tests/bench/bench_tpm.py`.
"""

from __future__ import annotations

import asyncio
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, spki_der
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.nodeattestor import AttestationRequest, SvidKey
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.tpm.endorsement import EkType
from spire_hw_plugins.keymanager.tpm import TpmKeyManager
from spire_hw_plugins.keymanager.tpm_config import Settings
from spire_hw_plugins.nodeattestor.tpm.agent import TpmAgentAttestor
from spire_hw_plugins.nodeattestor.tpm.server import TpmServer
from spire_hw_sim.manufacturer import Manufacturer
from spire_hw_sim.swtpm import Swtpm
from spire_hw_sim.tpm_command import OWNER

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ROUNDS = 200
OPTIONS = SignOptions(HashAlgorithm.SHA256)
# P-256 signing key: sign, fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA.
TEMPLATE = bytes.fromhex("0023000b000404720000001000100003001000000000")
NULL_TICKET = bytes.fromhex("8024400000070000")


class Stream:
    """Both ends of an attestation stream in one process."""

    server_verified = True

    def __init__(self) -> None:
        self.up: asyncio.Queue[bytes] = asyncio.Queue()
        self.down: asyncio.Queue[bytes] = asyncio.Queue()

    async def send(self, data: bytes) -> None:
        """Agent to server."""
        await self.up.put(data)

    async def receive(self) -> bytes:
        """Server to agent."""
        return await self.down.get()

    async def challenge(self, data: bytes) -> bytes:
        """One round trip."""
        await self.down.put(data)
        return await self.up.get()


def raw_sign(tpm: Swtpm) -> Callable[[], Awaitable[None]]:
    """Return a call of TPM2_Sign alone."""
    handle, _ = tpm.commands.create_primary(OWNER, TEMPLATE)
    auth = struct.pack(">IIHBH", 9, 0x40000009, 0, 1, 0)
    body = struct.pack(">H", 32) + bytes(32) + bytes.fromhex("0018000b") + NULL_TICKET
    area = struct.pack(">I", handle) + auth + body
    command = struct.pack(">HII", 0x8002, 10 + len(area), 0x15D) + area

    async def call() -> None:
        answer = tpm.transmit(command)
        if answer[6:10] != bytes(4):
            raise SystemExit(f"TPM2_Sign: {answer.hex()}")

    return call


async def median_ms(rounds: int, *functions: Callable[[], Awaitable[object]]) -> list[float]:
    """Return medians of interleaved calls."""
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, times in zip(functions, taken, strict=True):
            start = time.perf_counter()
            await function()
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in taken]


async def admit(agent_id: SpiffeId) -> None:
    """Let everybody in."""
    del agent_id


async def bench(folder: Path, tpm: Swtpm) -> None:
    """Print all figures."""
    maker = Manufacturer()
    maker.equip(tpm)
    for pcr in range(8):
        tpm.extend_pcr(pcr, b"firmware")
    td, log = TrustDomain.parse("bench.test"), get_logger("bench")
    agent_host = HostInfo(Side.AGENT, td, folder, log, SystemClock())
    server_host = HostInfo(Side.SERVER, td, folder, log, SystemClock())
    keys, server = TpmKeyManager(agent_host), TpmServer(server_host)
    await keys.open(Settings(tpm.tcti, folder / "keys"))
    roots = maker.write_roots(folder / "roots.pem")
    await server.configure(Body.from_dict({"ek_policy": "ca", "endorsement_ca_path": str(roots)}))
    info = await keys.generate_key("A", KeyType.EC_P256)
    ours, raw = await median_ms(
        ROUNDS, lambda: keys.sign_data("A", bytes(32), OPTIONS), raw_sign(tpm)
    )
    sys.stdout.write(f"sign P-256: {ours:.2f} ms, raw TPM2_Sign {raw:.2f} ms\n")
    sys.stdout.write(f"tpm_sign_vs_raw {raw / ours:.2f}\n")
    (made,) = await median_ms(20, lambda: keys.generate_key("B", KeyType.EC_P256))
    sys.stdout.write(f"make and store P-256 key: {made:.2f} ms\n")
    for ek_type in (EkType.EC_P256, EkType.RSA_2048):
        agent = TpmAgentAttestor(agent_host)
        await agent.open(tpm.tcti, ek_type)

        async def attest(agent: TpmAgentAttestor = agent) -> None:
            stream = Stream()
            key = SvidKey(keys, "A", info.public_key)
            async with asyncio.TaskGroup() as group:
                group.create_task(agent.aid_attestation(stream, key))
                payload = await stream.up.get()
                spki = spki_der(info.public_key)
                await server.attest(AttestationRequest(payload, stream.challenge, spki, admit))

        (took,) = await median_ms(20, attest)
        sys.stdout.write(f"attestation, both halves, EK {ek_type.value}: {took:.1f} ms\n")
        await agent.close()
    await keys.close()


def main() -> None:
    """Run on a TPM of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Swtpm(folder / "tpm") as tpm:
            asyncio.run(bench(folder, tpm))


if __name__ == "__main__":
    main()
