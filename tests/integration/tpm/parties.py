"""Both halves of the `tpm` node attestor in one process, over a real TPM, and the stream between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spire_hw.config.hcl import Body
from spire_hw.errors import AttestationError, SpireHwError
from spire_hw.key import KeyType, spki_der
from spire_hw.plugin.nodeattestor import AttestationRequest, AttestedIdentity, SvidKey
from spire_hw.tpm.endorsement import EkType
from spire_hw_plugins.keymanager.tpm import TpmKeyManager
from spire_hw_plugins.nodeattestor.tpm.agent import TpmAgentAttestor
from spire_hw_plugins.nodeattestor.tpm.server import TpmServer

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.plugin.info import HostInfo
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_sim.swtpm import Swtpm
    from spire_hw_sim.tpm_bus import TpmBus
    from tests.integration.tpm.conftest import Factory

Change = Callable[[bytes], bytes]


def unchanged(data: bytes) -> bytes:
    return data


@dataclass
class Exchange:
    """A stream between both halves in which a test may sit."""

    to_server: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    to_agent: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    on_challenge: Change = unchanged
    on_answer: Change = unchanged
    sent: list[bytes] = field(default_factory=list)
    server_verified: bool = True

    async def send(self, data: bytes) -> None:
        changed = self.on_answer(data) if self.sent else data
        self.sent.append(changed)
        await self.to_server.put(changed)

    async def receive(self) -> bytes:
        return self.on_challenge(await self.to_agent.get())

    async def next_challenge(self) -> bytes | None:
        found = await self.to_agent.get()
        return self.on_challenge(found) if found else None

    async def challenge(self, data: bytes) -> bytes:
        await self.to_agent.put(data)
        return await self.to_server.get()


async def admit_all(agent_id: SpiffeId) -> None:
    del agent_id


async def attest(
    agent: TpmAgentAttestor,
    server: TpmServer,
    key: SvidKey | None,
    exchange: Exchange | None = None,
    csr_spki: bytes | None = None,
    *,
    shown: bool = True,
) -> AttestedIdentity:
    """Run both halves; `shown` tells whether the server's half gets to see the CSR's key."""
    stream = exchange or Exchange()
    if csr_spki is None and key is not None and shown:
        csr_spki = spki_der(key.public_key)
    aid = asyncio.ensure_future(agent.aid_attestation(stream, key))  # noqa: TID251

    async def serve() -> AttestedIdentity:
        payload = await stream.to_server.get()
        request = AttestationRequest(payload, stream.challenge, csr_spki, admit_all)
        identity = await server.attest(request)
        await stream.to_agent.put(b"")  # asks nothing more
        return identity

    serving = asyncio.ensure_future(serve())  # noqa: TID251
    try:
        await asyncio.wait({aid, serving}, return_when=asyncio.FIRST_EXCEPTION)
        if aid.done():
            aid.result()
        return serving.result()
    finally:
        for task in (aid, serving):
            task.cancel()
        await asyncio.gather(aid, serving, return_exceptions=True)


@dataclass
class Node:
    agent: TpmAgentAttestor
    keys: TpmKeyManager
    key: SvidKey


@dataclass
class Bench:
    """What every test needs, and where its files go."""

    factory: Factory
    agent_host: HostInfo
    server_host: HostInfo
    folder: Path


@asynccontextmanager
async def node(
    bench: Bench, tpm: Swtpm, ek_type: EkType = EkType.AUTO, bus: TpmBus | None = None
) -> AsyncIterator[Node]:
    agent, keys = TpmAgentAttestor(bench.agent_host), TpmKeyManager(bench.agent_host)
    tcti = tpm.tcti if bus is None else bus.tcti
    await agent.open(tcti, ek_type)
    settings = {"tcti": tcti, "keys_path": str(bench.folder / f"keys of {tpm.state_dir.name}")}
    await keys.configure(Body.from_dict(settings))
    info = await keys.generate_key("agent-svid-A", KeyType.EC_P256)
    try:
        yield Node(agent, keys, SvidKey(keys, "agent-svid-A", info.public_key))
    finally:
        await agent.close()
        await keys.close()


async def serving(bench: Bench, **settings: object) -> TpmServer:
    server = TpmServer(bench.server_host)
    roots = bench.factory.manufacturer.write_roots(bench.folder / "roots.pem")
    config: dict[str, object] = {
        "ek_policy": "ca",
        "endorsement_ca_path": str(roots),
        "pcrs": {"sha256": list(range(10))},
    }
    await server.configure(Body.from_dict(config | settings))
    return server


def codes(error: SpireHwError) -> list[str]:
    assert isinstance(error, AttestationError)
    return [finding.code for finding in error.findings]
