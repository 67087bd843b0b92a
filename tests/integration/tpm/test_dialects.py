"""Peers that others wrote for SPIRE: their agents at our server, our agent at their servers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tpm2_pytss.constants import ESYS_TR

from spire_hw.config.hcl import Body
from spire_hw.errors import AttestationError, ErrorKind, NotReadyError
from spire_hw.key import spki_der
from spire_hw.plugin.nodeattestor import AttestationRequest, AttestedIdentity
from spire_hw.posture.evidence import Tier
from spire_hw.tpm.endorsement import EkType
from tests.integration.tpm.gopeers import Dialect, GoAgent, GoServer
from tests.integration.tpm.leaks import nothing_left_behind
from tests.integration.tpm.parties import Bench, Exchange, admit_all, codes, node, serving

if TYPE_CHECKING:
    from spire_hw_plugins.nodeattestor.tpm.agent import TpmAgentAttestor
    from spire_hw_plugins.nodeattestor.tpm.server import TpmServer
    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.asyncio
DIALECTS: tuple[Dialect, ...] = ("A", "A with key", "B")


async def attest(agent: GoAgent, server: TpmServer) -> AttestedIdentity:
    spki = spki_der(ec.generate_private_key(ec.SECP256R1()).public_key())

    async def ask(payload: bytes) -> AttestedIdentity:
        return await server.attest(AttestationRequest(payload, agent.answer, spki, admit_all))

    found: AttestedIdentity = await agent.attest(ask)
    return found


@pytest.mark.parametrize("ek_type", [EkType.RSA_2048, EkType.EC_P256])
@pytest.mark.parametrize("dialect", ["A", "B"])
async def test_their_agents_get_in_where_activation_is_enough(
    bench: Bench, tpm: Swtpm, dialect: Dialect, ek_type: EkType
) -> None:
    server = await serving(bench, accept_activation_only=True)
    with nothing_left_behind(tpm):
        found = await attest(GoAgent(tpm.tcti, dialect, ek_type=ek_type), server)
    assert found.agent_id.path.startswith("/spire/agent/tpm/")
    assert found.selector_values == ["tier:activation"]
    assert found.can_reattest
    assert found.evidence is not None
    assert (found.evidence.tier, found.evidence.ak_hierarchy) == (Tier.ACTIVATION, "owner")
    assert not found.evidence.key_in_tpm
    async with node(bench, tpm, ek_type) as n:
        stream = Exchange()
        ours = asyncio.gather(n.agent.aid_attestation(stream, n.key), serve(server, stream, n.key))
        assert (await ours)[1].agent_id == found.agent_id


async def serve(server: TpmServer, stream: Exchange, key: object) -> AttestedIdentity:
    payload = await stream.to_server.get()
    spki = spki_der(key.public_key)  # type: ignore[attr-defined]
    return await server.attest(AttestationRequest(payload, stream.challenge, spki, admit_all))


async def test_a_bare_key_is_enough_for_a_key_that_is_enrolled(bench: Bench, tpm: Swtpm) -> None:
    agent, reader = GoAgent(tpm.tcti, "A with key"), GoServer("A with key")

    async def look(payload: bytes) -> None:
        reader.challenge(payload)

    await agent.attest(look)
    server = await serving(
        bench, ek_policy="hash", ek_hashes=[reader.ek_hash], accept_activation_only=True
    )
    found = await attest(agent, server)
    assert found.agent_id.path == f"/spire/agent/tpm/{reader.ek_hash}"


async def test_their_agents_are_refused_unless_it_is_said(bench: Bench, tpm: Swtpm) -> None:
    server = await serving(bench)
    with nothing_left_behind(tpm), pytest.raises(AttestationError) as caught:
        await attest(GoAgent(tpm.tcti), server)
    assert caught.value.kind is ErrorKind.PERMISSION_DENIED
    assert caught.value.message == "policy: this server requires a quote [activation_only]"


async def test_an_attestation_key_of_the_null_hierarchy_is_refused(
    bench: Bench, tpm: Swtpm
) -> None:
    server = await serving(bench, accept_activation_only=True)
    with pytest.raises(AttestationError) as caught:
        await attest(GoAgent(tpm.tcti, hierarchy=ESYS_TR.NULL), server)
    assert codes(caught.value) == ["ak_hierarchy"]


async def drive(agent: TpmAgentAttestor, key: object, server: GoServer) -> Exchange:
    """Let our agent attest at their server; return what was said."""
    stream = Exchange()

    async def serve_() -> None:
        challenge = server.challenge(await stream.to_server.get())
        await stream.to_agent.put(challenge)
        server.check(await stream.to_server.get())

    async with asyncio.TaskGroup() as group:
        task = group.create_task(serve_())
        try:
            await agent.aid_attestation(stream, key)  # type: ignore[arg-type]
        except BaseException:
            task.cancel()
            raise
    return stream


@pytest.mark.parametrize("ek_type", [EkType.RSA_2048, EkType.EC_P256])
@pytest.mark.parametrize("dialect", ["A", "B"])
async def test_our_agent_at_their_servers(
    bench: Bench, tpm: Swtpm, dialect: Dialect, ek_type: EkType
) -> None:
    async with node(bench, tpm, ek_type) as n:
        settings = {"tcti": tpm.tcti, "ek_type": ek_type.value, "accept_activation_only": True}
        await n.agent.configure(Body.from_dict(settings))
        with nothing_left_behind(tpm):
            stream = await drive(n.agent, n.key, GoServer(dialect))
    assert b'"quotes"' not in stream.sent[1]


async def test_our_agent_does_not_unless_it_is_said(bench: Bench, tpm: Swtpm) -> None:
    async with node(bench, tpm) as n:
        with (
            nothing_left_behind(tpm),
            pytest.raises(BaseExceptionGroup) as caught,
        ):
            await drive(n.agent, n.key, GoServer("B"))
    (error,) = caught.value.exceptions
    assert isinstance(error, NotReadyError)
    assert "accept_activation_only = true" in error.message
