"""Requests that make no sense: refused with the right word, nothing stored, nothing broken."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import empty_pb2

from spire_hw._pb import (
    server_agent_pb2,
    server_bundle_pb2,
    server_entry_pb2,
    server_svid_pb2,
    types_pb2,
)
from spire_hw.errors import DeniedError, ErrorKind, InvalidInputError, SpireHwError
from spire_hw_server.api.policy import POLICY, CallerClass
from spire_hw_sim.pki import Authority
from spire_hw_sim.servers import (
    AGENT,
    BUNDLE,
    ENTRY,
    SVID,
    TIMEOUT_S,
    Operator,
    ScriptedAgent,
    entry_message,
    make_csr,
)

if TYPE_CHECKING:
    from spire_hw_server.app import Server

pytestmark = pytest.mark.asyncio

SEED = 20261122
AUTHORIZED = ENTRY + "GetAuthorizedEntries"


class Raw:
    """Stands in for a message and serialises to given bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's name
        return self._data


async def send(channel: Any, method: str, data: bytes) -> None:
    await channel.unary(method, Raw(data), empty_pb2.Empty, timeout_s=TIMEOUT_S)


async def counts(operator: Operator) -> tuple[int, int, int]:
    """Return how many agents and entries there are, and the bundle's sequence."""
    agents = await operator.channel.unary(
        AGENT + "CountAgents",
        server_agent_pb2.CountAgentsRequest(),
        server_agent_pb2.CountAgentsResponse,
        timeout_s=TIMEOUT_S,
    )
    entries = await operator.channel.unary(
        ENTRY + "CountEntries",
        server_entry_pb2.CountEntriesRequest(),
        server_entry_pb2.CountEntriesResponse,
        timeout_s=TIMEOUT_S,
    )
    bundle = await operator.bundle()
    return agents.count, entries.count, bundle.sequence


async def authorized(agent: ScriptedAgent) -> None:
    await agent.call(
        AUTHORIZED,
        server_entry_pb2.GetAuthorizedEntriesRequest(),
        server_entry_pb2.GetAuthorizedEntriesResponse,
    )


STREAMS = ("AttestAgent", "SyncAuthorizedEntries", "Watch")
UNARY = sorted(
    method
    for method, allowed in POLICY.items()
    if not method.endswith(STREAMS)
    and "TrustDomain" not in method
    and CallerClass.DOWNSTREAM not in allowed
)


async def test_bytes_that_are_no_message_are_invalid_for_every_method(
    operator: Operator, agent: ScriptedAgent
) -> None:
    before = await counts(operator)
    async with await agent.channel() as channel:
        for method in UNARY:
            caller = channel if CallerClass.AGENT in POLICY[method] else operator.channel
            for data in (b"\xff\xff\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x08"):
                with pytest.raises(SpireHwError) as caught:
                    await send(caller, method, data)
                assert caught.value.kind is ErrorKind.INVALID_ARGUMENT, (method, data)
    assert await counts(operator) == before


async def test_random_bytes_never_break_a_method(operator: Operator, agent: ScriptedAgent) -> None:
    chance = random.Random(SEED)  # noqa: S311 - repeatable, not secret
    answers: list[tuple[ErrorKind, str, bytes]] = []
    harmless = [m for m in UNARY if "LocalAuthority" not in m and "Logger" not in m]
    async with await agent.channel() as channel:
        for method in harmless:
            caller = channel if CallerClass.AGENT in POLICY[method] else operator.channel
            for _ in range(8):
                data = chance.randbytes(chance.randrange(1, 40))
                try:
                    await send(caller, method, data)
                except SpireHwError as e:
                    answers.append((e.kind, method, data))
    broken = [a for a in answers if a[0] in {ErrorKind.UNKNOWN, ErrorKind.INTERNAL}]
    assert broken == []
    assert (await operator.bundle()).x509_authorities


async def test_a_stranger_gets_nothing_but_the_status(server: Server, operator: Operator) -> None:
    stranger = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    closed = [m for m, allowed in POLICY.items() if CallerClass.ANY not in allowed]
    async with await stranger.channel() as channel:
        for method in closed:
            with pytest.raises(SpireHwError) as caught:  # noqa: PT012 - one call, two shapes
                if method.endswith(STREAMS):
                    async with channel.bidi(method, empty_pb2.Empty, timeout_s=5) as call:
                        await call.send(empty_pb2.Empty())
                        await call.receive()
                else:
                    await channel.unary(method, empty_pb2.Empty(), empty_pb2.Empty, timeout_s=5)
            error = caught.value
            assert error.kind in {ErrorKind.PERMISSION_DENIED, ErrorKind.UNIMPLEMENTED}, method
            if isinstance(error, DeniedError):
                assert error.reason is None
                assert error.message == f"authorization denied for method {method}"


async def test_certificates_that_are_no_svid_do_not_connect(
    server: Server, operator: Operator, agent: ScriptedAgent
) -> None:
    bundle = await operator.bundle()
    for identity in (
        Authority("example.org").identity("/spire/agent/join_token/x"),
        Authority("other.test").identity("/admin"),
    ):
        impostor = ScriptedAgent(server.port, bundle, server.clock)
        assert identity.private_key is not None
        impostor.key, impostor.chain = identity.private_key, identity.chain_der
        with pytest.raises(SpireHwError) as caught:
            await authorized(impostor)
        assert caught.value.kind is ErrorKind.UNAVAILABLE
    thief = ScriptedAgent(server.port, bundle, server.clock)
    thief.chain = agent.chain
    with pytest.raises(SpireHwError):
        await authorized(thief)
    await authorized(agent)


async def test_oversized_requests_are_refused(operator: Operator, agent: ScriptedAgent) -> None:
    before = await counts(operator)
    big = server_svid_pb2.BatchNewX509SVIDRequest(
        params=[server_svid_pb2.NewX509SVIDParams(entry_id="x", csr=b"x" * (5 << 20))]
    )
    with pytest.raises(SpireHwError) as caught:
        await agent.call(SVID + "BatchNewX509SVID", big, server_svid_pb2.BatchNewX509SVIDResponse)
    assert caught.value.kind is ErrorKind.RESOURCE_EXHAUSTED
    async with await agent.channel() as channel:
        (result,) = await agent.batch_new(channel, [("x" * 100_000, b"x" * 100_000)])
    assert result.status.code in {3, 5}
    assert await counts(operator) == before


async def test_tokens_that_are_no_tokens_get_nowhere(
    server: Server, operator: Operator, agent: ScriptedAgent
) -> None:
    before = await counts(operator)
    stranger = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    for token in ("../x", str(agent.spiffe_id), "a/b", "", "x" * 70_000, "\x00", "é"):
        with pytest.raises(SpireHwError) as caught:
            await stranger.attest(token)
        assert caught.value.kind in {ErrorKind.INVALID_ARGUMENT, ErrorKind.RESOURCE_EXHAUSTED}
    await authorized(agent)
    assert await counts(operator) == before


async def test_an_agent_gets_nothing_for_entries_of_others(
    server: Server, operator: Operator, agent: ScriptedAgent
) -> None:
    other = ScriptedAgent(server.port, agent.bundle, server.clock)
    await other.attest(await operator.token())
    assert other.spiffe_id is not None
    (created,) = await operator.create(entry_message("/theirs", other.spiffe_id))
    async with await agent.channel() as channel:
        (result,) = await agent.batch_new(channel, [(created.entry.id, await make_csr(agent.key))])
    assert result.status.code == ErrorKind.NOT_FOUND.value
    request = server_svid_pb2.NewJWTSVIDRequest(entry_id=created.entry.id, audience=["a"])
    with pytest.raises(SpireHwError) as caught:
        await agent.call(SVID + "NewJWTSVID", request, server_svid_pb2.NewJWTSVIDResponse)
    assert caught.value.kind is ErrorKind.NOT_FOUND


async def test_the_own_bundle_cannot_be_set_as_a_foreign_one(operator: Operator) -> None:
    before = await operator.bundle()
    own = types_pb2.Bundle(
        trust_domain="example.org",
        x509_authorities=[types_pb2.X509Certificate(asn1=Authority("example.org").der)],
    )
    for name in ("BatchSetFederatedBundle", "BatchUpdateFederatedBundle"):
        request = getattr(server_bundle_pb2, name + "Request")(bundle=[own])
        answer = getattr(server_bundle_pb2, name + "Response")
        done = await operator.channel.unary(BUNDLE + name, request, answer, timeout_s=TIMEOUT_S)
        assert [r.status.code for r in done.results] == [ErrorKind.INVALID_ARGUMENT.value]
    assert await operator.bundle() == before


async def test_a_stream_may_end_or_break_at_any_point(
    server: Server, operator: Operator, agent: ScriptedAgent
) -> None:
    request = server_entry_pb2.SyncAuthorizedEntriesRequest(ids=["x"] * 1000)
    answer = server_entry_pb2.SyncAuthorizedEntriesResponse
    async with await agent.channel() as channel:
        for first in (request, None):
            async with channel.bidi(
                ENTRY + "SyncAuthorizedEntries", answer, timeout_s=TIMEOUT_S
            ) as call:
                if first is not None:
                    await call.send(first)
                    with pytest.raises(InvalidInputError):
                        await call.receive()
    stranger = ScriptedAgent(server.port, agent.bundle, server.clock)
    async with await stranger.channel() as channel:
        for _ in range(5):
            async with channel.bidi(
                AGENT + "AttestAgent", server_agent_pb2.AttestAgentResponse, timeout_s=TIMEOUT_S
            ) as attest:
                await attest.send(server_agent_pb2.AttestAgentRequest(challenge_response=b"x"))
    await authorized(agent)
    assert (await counts(operator))[:2] == (1, 0)
