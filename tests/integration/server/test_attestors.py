"""Attestation with challenges, by an attestor that follows a script."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from spire_hw._pb import server_agent_pb2 as pb
from spire_hw._pb import server_entry_pb2, types_pb2
from spire_hw.config import hcl
from spire_hw.errors import (
    AttestationError,
    DeniedError,
    DeniedReason,
    ErrorKind,
    Finding,
    InvalidInputError,
    SpireHwError,
)
from spire_hw.plugin.info import PluginKind, Side
from spire_hw.plugin.nodeattestor import AttestationRequest, AttestedIdentity
from spire_hw.spiffeid import TrustDomain, agent_id
from spire_hw_plugins import builtin
from spire_hw_server.app import Server
from spire_hw_server.config import build_settings
from spire_hw_sim.servers import (
    AGENT,
    ENTRY,
    TIMEOUT_S,
    Operator,
    ScriptedAgent,
    entry_message,
    make_csr,
    server_config,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault
    from spire_hw.plugin.info import Builder, HostInfo

pytestmark = pytest.mark.asyncio

TD = TrustDomain("example.org")


class EchoAttestor:
    """Asks for the payload twice over and believes it."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host

    def validate(self, config: Body) -> list[ConfigFault]:
        del config
        return []

    async def configure(self, config: Body) -> None:
        del config

    async def close(self) -> None:
        return None

    async def attest(self, request: AttestationRequest) -> AttestedIdentity:
        name = request.payload.decode()
        spiffe_id = agent_id(TD, "echo", name)
        await request.admit(spiffe_id)
        for number in range(2):
            answer = await request.challenge(b"%d" % number)
            if answer != request.payload:
                raise AttestationError([Finding("wrong_echo", "the echo is wrong")])
        return AttestedIdentity(spiffe_id, [f"name:{name}"], can_reattest=True)


def table(kind: PluginKind, name: str) -> Builder:
    if (kind, name) == (PluginKind.NODE_ATTESTOR, "echo"):
        return EchoAttestor
    return builtin.lookup(kind, name, Side.SERVER)


@pytest_asyncio.fixture
async def server(short_dir: Path) -> AsyncIterator[Server]:
    limits = "ratelimit { attestation = false signing = false }"
    text = server_config(short_dir, key_manager="memory", more=limits)
    text = text.replace('NodeAttestor "join_token"', 'NodeAttestor "echo"')
    running = Server(build_settings(hcl.parse(text, "server.conf")), table=table)
    await running.start()
    yield running
    await running.close()


class Node(ScriptedAgent):
    """An agent that echoes, or does something else."""

    async def echo(self, name: str, *answers: pb.AttestAgentRequest) -> bool:
        """Attest; return whether the server wants it to attest again instead of renewing."""
        params = pb.AttestAgentRequest.Params(
            data=types_pb2.AttestationData(type="echo", payload=name.encode()),
            params=pb.AgentX509SVIDParams(csr=await make_csr(self.key)),
        )
        self.chain = ()
        challenges = []
        async with (
            await self.channel() as channel,
            channel.bidi(
                AGENT + "AttestAgent", pb.AttestAgentResponse, timeout_s=TIMEOUT_S
            ) as call,
        ):
            await call.send(pb.AttestAgentRequest(params=params))
            for answer in answers:
                challenge = await call.receive()
                assert challenge is not None
                challenges.append(challenge.challenge)
                await call.send(answer)
            await call.done_sending()
            result = await call.receive()
            assert await call.receive() is None
        assert result is not None
        assert challenges == [b"0", b"1"]
        self.take(result.result.svid)
        return result.result.reattestable


def response(data: bytes) -> pb.AttestAgentRequest:
    return pb.AttestAgentRequest(challenge_response=data)


async def node(server: Server, operator: Operator) -> Node:
    return Node(server.port, await operator.bundle(), server.clock)


async def count(operator: Operator) -> int:
    answer = await operator.channel.unary(
        AGENT + "CountAgents",
        pb.CountAgentsRequest(),
        pb.CountAgentsResponse,
        timeout_s=TIMEOUT_S,
    )
    return answer.count


async def authorized(agent: ScriptedAgent, channel: Any = None) -> list[str]:
    request = server_entry_pb2.GetAuthorizedEntriesRequest()
    answer = server_entry_pb2.GetAuthorizedEntriesResponse
    path = ENTRY + "GetAuthorizedEntries"
    if channel is None:
        found = await agent.call(path, request, answer)
    else:
        found = await channel.unary(path, request, answer, timeout_s=TIMEOUT_S)
    return [e.spiffe_id.path for e in found.entries]


async def test_challenges_go_both_ways_and_selectors_make_aliases(
    server: Server, operator: Operator
) -> None:
    alias = TD.member("rack")
    await operator.create(
        entry_message("/rack", TD.member("spire", "server"), ["echo:name:one"]),
        entry_message("/w", alias),
    )
    one = await node(server, operator)
    assert await one.echo("one", response(b"one"), response(b"one"))
    assert str(one.spiffe_id) == "spiffe://example.org/spire/agent/echo/one"
    assert await authorized(one) == ["/w"]
    two = await node(server, operator)
    await two.echo("two", response(b"two"), response(b"two"))
    assert await authorized(two) == []
    with pytest.raises(DeniedError) as caught:
        await one.renew()
    assert caught.value.reason is DeniedReason.AGENT_MUST_REATTEST


async def test_attesting_again_replaces_the_svid(server: Server, operator: Operator) -> None:
    one = await node(server, operator)
    await one.echo("one", response(b"one"), response(b"one"))
    before = ScriptedAgent(one.port, one.bundle, one.clock, one.key, one.chain)
    await one.echo("one", response(b"one"), response(b"one"))
    await authorized(one)
    with pytest.raises(DeniedError) as caught:
        await authorized(before)
    assert caught.value.reason is DeniedReason.AGENT_NOT_ACTIVE
    assert await count(operator) == 1


@pytest.mark.parametrize(
    "answers",
    [
        (),
        (response(b"one"),),
        (response(b"wrong"),),
        (response(b"one"), response(b"wrong")),
        (response(b"one"), pb.AttestAgentRequest(params={})),
        (pb.AttestAgentRequest(),),
        (response(b"x" * 100_000),),
    ],
)
async def test_a_failed_exchange_stores_nothing(
    server: Server, operator: Operator, answers: tuple[pb.AttestAgentRequest, ...]
) -> None:
    one = await node(server, operator)
    with pytest.raises((SpireHwError, AssertionError)) as caught:
        await one.echo("one", *answers)
    if isinstance(caught.value, SpireHwError):
        assert caught.value.kind in {ErrorKind.INVALID_ARGUMENT, ErrorKind.RESOURCE_EXHAUSTED}
    assert await count(operator) == 0


async def test_a_banned_node_does_not_attest_until_it_is_evicted(
    server: Server, operator: Operator
) -> None:
    from google.protobuf import empty_pb2  # noqa: PLC0415

    one = await node(server, operator)
    await one.echo("one", response(b"one"), response(b"one"))
    where = types_pb2.SPIFFEID(trust_domain="example.org", path="/spire/agent/echo/one")
    await operator.channel.unary(
        AGENT + "BanAgent", pb.BanAgentRequest(id=where), empty_pb2.Empty, timeout_s=TIMEOUT_S
    )
    with pytest.raises(DeniedError) as caught:
        await one.echo("one")
    assert caught.value.reason is None
    await operator.channel.unary(
        AGENT + "DeleteAgent", pb.DeleteAgentRequest(id=where), empty_pb2.Empty, timeout_s=TIMEOUT_S
    )
    await one.echo("one", response(b"one"), response(b"one"))


async def test_a_caller_that_goes_away_ends_its_attestation(
    server: Server, operator: Operator
) -> None:
    one = await node(server, operator)
    csr = await make_csr(one.key)
    params = pb.AttestAgentRequest.Params(
        data=types_pb2.AttestationData(type="echo", payload=b"one"), params={"csr": csr}
    )
    async with (
        await one.channel() as channel,
        channel.bidi(AGENT + "AttestAgent", pb.AttestAgentResponse, timeout_s=TIMEOUT_S) as call,
    ):
        await call.send(pb.AttestAgentRequest(params=params))
        await call.receive()
    await one.echo("two", response(b"two"), response(b"two"))
    assert await count(operator) == 1


async def test_many_first_calls_with_a_renewed_svid_all_pass(
    server: Server, operator: Operator
) -> None:
    agent = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    await agent.attest(await operator.token())
    agent.take(await agent.renew())
    async with await agent.channel() as channel:
        answers = await asyncio.gather(*(authorized(agent, channel) for _ in range(20)))
    assert answers == [[]] * 20


async def test_a_ban_beats_the_first_use_of_a_renewed_svid(
    server: Server, operator: Operator
) -> None:
    agent = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    await agent.attest(await operator.token())
    agent.take(await agent.renew())
    assert agent.spiffe_id is not None
    await server.manager._store.ban_node(agent.spiffe_id)
    with pytest.raises(DeniedError) as caught:
        await authorized(agent)
    assert caught.value.reason is DeniedReason.AGENT_BANNED


async def test_without_the_store_agents_hear_of_an_internal_error(
    server: Server, operator: Operator
) -> None:
    agent = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    await agent.attest(await operator.token())
    agent.take(await agent.renew())
    async with await agent.channel() as channel:
        await server.manager._store.close()
        with pytest.raises(SpireHwError) as caught:
            await authorized(agent, channel)
    assert caught.value.kind is ErrorKind.INTERNAL


async def test_an_unknown_step_is_invalid(server: Server, operator: Operator) -> None:
    one = await node(server, operator)
    with pytest.raises(InvalidInputError):
        await one.echo("one", pb.AttestAgentRequest())
