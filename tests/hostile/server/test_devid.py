"""A node that attests by DevID to a whole server: what is refused leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import empty_pb2

from spire_hw._pb import server_agent_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.config import hcl
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw_plugins.nodeattestor.tpm_devid.wire import encode_attestation_data
from spire_hw_server.app import Server
from spire_hw_server.config import build_settings
from spire_hw_sim.devidnode import DevIdNode, peers_tpm, pem_of
from spire_hw_sim.ekca import ek_spec
from spire_hw_sim.nodepki import PEM, Holder, make_root
from spire_hw_sim.servers import (
    AGENT,
    TIMEOUT_S,
    Operator,
    ScriptedAgent,
    make_csr,
    server_config,
)
from spire_hw_sim.softtpm import make_svid_key
from spire_hw_sim.tpmnode import Vendor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio
IA, PD = ErrorKind.INVALID_ARGUMENT, ErrorKind.PERMISSION_DENIED
NO_LIMITS = "ratelimit { attestation = false signing = false }"


@dataclass
class Site:
    """A server that attests by DevID, with the authorities it trusts."""

    server: Server
    operator: Operator
    vendor: Vendor
    root: Holder

    @classmethod
    async def open(cls, directory: Path, clock: SimClock) -> Self:
        vendor, root = Vendor.make(), make_root("DevID Root")
        (directory / "makers.pem").write_bytes(pem_of(vendor.root.certificate))
        (directory / "devid.pem").write_bytes(root.certificate.public_bytes(PEM))
        plugin = f"""
          NodeAttestor "tpm_devid" {{ plugin_data {{
            devid_ca_path = "{directory}/devid.pem"
            endorsement_ca_path = "{directory}/makers.pem"
          }} }}"""
        text = server_config(directory, key_manager="memory", more=NO_LIMITS, plugins=plugin)
        server = Server(build_settings(hcl.parse(text, "server.conf")), clock=clock)
        await server.start()
        return cls(server, Operator(server.settings.socket_path), vendor, root)

    async def close(self) -> None:
        await self.operator.close()
        await self.server.close()

    def node(self) -> DevIdNode:
        tpm, key = peers_tpm(), make_svid_key()
        certificate = self.vendor.intermediate.issue(ek_spec(tpm.ek.private.public_key()))
        chain = tuple(self.root.issue(key.private).chain)
        return DevIdNode(tpm, key, chain, certificate, (self.vendor.intermediate.certificate,))

    async def agents(self) -> list[types_pb2.Agent]:
        answer = await self.operator.channel.unary(
            AGENT + "ListAgents",
            pb.ListAgentsRequest(),
            pb.ListAgentsResponse,
            timeout_s=TIMEOUT_S,
        )
        return list(answer.agents)

    async def attest(
        self, payload: bytes, answer: Callable[[bytes], bytes]
    ) -> pb.AttestAgentResponse.Result:
        """Attest with a payload and what answers the challenge."""
        stranger = ScriptedAgent(self.server.port, await self.operator.bundle(), self.server.clock)
        csr = await make_csr(ec.generate_private_key(ec.SECP256R1()))
        params = pb.AttestAgentRequest.Params(
            data=types_pb2.AttestationData(type="tpm_devid", payload=payload),
            params=pb.AgentX509SVIDParams(csr=csr),
        )
        async with (
            await stranger.channel() as channel,
            channel.bidi(
                AGENT + "AttestAgent", pb.AttestAgentResponse, timeout_s=TIMEOUT_S
            ) as call,
        ):
            await call.send(pb.AttestAgentRequest(params=params))
            message: Any = await call.receive()
            response = answer(message.challenge)
            await call.send(pb.AttestAgentRequest(challenge_response=response))
            message = await call.receive()
            result: pb.AttestAgentResponse.Result = message.result
            return result

    async def refusal(self, payload: bytes, answer: Callable[[bytes], bytes]) -> SpireHwError:
        """Return what a bent exchange ends in; nothing is stored for it."""
        before = [agent.SerializeToString() for agent in await self.agents()]
        with pytest.raises(SpireHwError) as caught:
            await self.attest(payload, answer)
        assert [agent.SerializeToString() for agent in await self.agents()] == before
        return caught.value


@pytest_asyncio.fixture
async def site(short_dir: Path, clock: SimClock) -> AsyncIterator[Site]:
    site = await Site.open(short_dir, clock)
    yield site
    await site.close()


async def test_an_honest_node_is_stored_as_upstream_would_and_attests_again(site: Site) -> None:
    node = site.node()
    for _ in range(2):
        result = await site.attest(node.payload(), node.answer)
        name = hashlib.sha1(node.chain[0], usedforsecurity=False).hexdigest()
        assert result.svid.id.path == f"/spire/agent/tpm_devid/{name}"
        assert result.reattestable
    (agent,) = await site.agents()
    assert agent.attestation_type == "tpm_devid"
    root = hashlib.sha1(site.root.der, usedforsecurity=False).hexdigest()
    assert {(s.type, s.value) for s in agent.selectors} == {
        ("tpm_devid", "subject:cn:node-1"),
        ("tpm_devid", "issuer:cn:DevID Root"),
        ("tpm_devid", f"ca:fingerprint:{root}"),
    }


async def test_refused_exchanges_store_nothing_and_the_node_is_let_in_afterwards(
    site: Site,
) -> None:
    node, thief = site.node(), site.node()
    thief.chain = node.chain
    data = node.data()
    stranger = replace(data, certificates=tuple(make_root("X").issue(node.key.private).chain))

    def half(message: bytes) -> bytes:
        whole = json.loads(node.answer(message))
        return json.dumps({"DevID": whole["DevID"]}).encode()

    def wrong(message: bytes) -> bytes:
        whole = json.loads(node.answer(message))
        return json.dumps({**whole, "CredActivation": "AAAA"}).encode()

    good = node.payload()
    bends: list[tuple[ErrorKind, bytes, Callable[[bytes], bytes]]] = [
        (IA, b"{}", node.answer),
        (IA, b"x" * 100, node.answer),
        (PD, encode_attestation_data(stranger), node.answer),
        (IA, thief.payload(), thief.answer),
        (IA, encode_attestation_data(replace(data, certified=b"x")), node.answer),
        (IA, good, lambda _: b"{}"),
        (IA, good, lambda _: b"x"),
        (IA, good, half),
        (IA, good, wrong),
    ]
    for kind, payload, answer in bends:
        error = await site.refusal(payload, answer)
        assert error.kind is kind, error
        assert "nodeattestor(tpm_devid): " in error.message
        assert error.message.count("nodeattestor(") == 1
    assert await site.agents() == []
    await site.attest(good, node.answer)
    assert len(await site.agents()) == 1
    for kind, payload, answer in bends:
        assert (await site.refusal(payload, answer)).kind is kind


async def test_a_banned_node_gets_no_challenge(site: Site) -> None:
    node = site.node()
    result = await site.attest(node.payload(), node.answer)
    await site.operator.channel.unary(
        AGENT + "BanAgent",
        pb.BanAgentRequest(id=result.svid.id),
        empty_pb2.Empty,
        timeout_s=TIMEOUT_S,
    )
    asked = []

    def answer(message: bytes) -> bytes:
        asked.append(message)
        return node.answer(message)

    error = await site.refusal(node.payload(), answer)
    assert error.kind is PD
    assert "banned" in error.message
    assert not asked
