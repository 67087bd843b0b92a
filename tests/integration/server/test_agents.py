# ruff: noqa: S106
"""Agents from attestation to ban, over real sockets."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import empty_pb2

from spire_hw._pb import server_agent_pb2 as pb
from spire_hw._pb import server_entry_pb2, types_pb2
from spire_hw.errors import (
    DeniedError,
    DeniedReason,
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    NotReadyError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.key import KeyType, generate_private_key
from spire_hw.rpc import convert
from spire_hw.spiffeid import SpiffeId
from spire_hw.svid.x509svid import verify_x509_svid
from spire_hw.x509.certificate import load_certificate
from spire_hw_sim.pki import Authority
from spire_hw_sim.servers import (
    AGENT,
    ENTRY,
    TIMEOUT_S,
    Operator,
    ScriptedAgent,
    joined_agent,
    make_csr,
)

if TYPE_CHECKING:
    from spire_hw_server.app import Server
    from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio

AUTHORIZED = ENTRY + "GetAuthorizedEntries"


async def authorized(agent: ScriptedAgent) -> list[types_pb2.Entry]:
    response = await agent.call(
        AUTHORIZED,
        server_entry_pb2.GetAuthorizedEntriesRequest(),
        server_entry_pb2.GetAuthorizedEntriesResponse,
    )
    return list(response.entries)


async def admin(operator: Operator, name: str, request: Any, answer: Any = empty_pb2.Empty) -> Any:
    return await operator.channel.unary(AGENT + name, request, answer, timeout_s=TIMEOUT_S)


def by_id(agent: ScriptedAgent) -> types_pb2.SPIFFEID:
    assert agent.spiffe_id is not None
    return convert.id_to_pb(agent.spiffe_id)


async def test_a_join_token_lets_one_agent_in_once(server: Server, operator: Operator) -> None:
    token = await operator.token()
    agent = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    result = await agent.attest(token)
    assert not result.reattestable
    assert str(agent.spiffe_id) == f"spiffe://example.org/spire/agent/join_token/{token}"
    bundle = await operator.bundle()
    assert verify_x509_svid(agent.chain, bundle, server.clock.now()) == agent.spiffe_id
    leaf = load_certificate(agent.chain[0])
    assert result.svid.expires_at == int(leaf.not_valid_after_utc.timestamp())
    assert await authorized(agent) == []
    again = ScriptedAgent(server.port, bundle, server.clock)
    with pytest.raises(InvalidInputError):
        await again.attest(token)


async def test_the_token_of_a_named_agent_brings_its_alias(
    server: Server, operator: Operator
) -> None:
    alias = SpiffeId("spiffe://example.org/node/one")
    agent = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    await agent.attest(await operator.token(alias))
    entries = await authorized(agent)
    assert [convert.id_from_pb(e.spiffe_id) for e in entries] == [alias]
    assert [s.type for s in entries[0].selectors] == ["spiffe_id"]
    await admin(operator, "DeleteAgent", pb.DeleteAgentRequest(id=by_id(agent)))
    left = await operator.channel.unary(
        ENTRY + "CountEntries",
        server_entry_pb2.CountEntriesRequest(),
        server_entry_pb2.CountEntriesResponse,
        timeout_s=TIMEOUT_S,
    )
    assert left.count == 0


async def test_an_expired_token_is_refused(
    server: Server, operator: Operator, clock: SimClock
) -> None:
    token = await operator.token(ttl=60)
    agent = ScriptedAgent(server.port, await operator.bundle(), clock)
    await clock.advance(timedelta(seconds=61))
    with pytest.raises(InvalidInputError):
        await agent.attest(token)
    nodes = await admin(operator, "CountAgents", pb.CountAgentsRequest(), pb.CountAgentsResponse)
    assert nodes.count == 0


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (pb.CreateJoinTokenRequest(), ErrorKind.INVALID_ARGUMENT),
        (pb.CreateJoinTokenRequest(ttl=-1), ErrorKind.INVALID_ARGUMENT),
        (pb.CreateJoinTokenRequest(ttl=5, token="a/b"), ErrorKind.INVALID_ARGUMENT),
        (
            pb.CreateJoinTokenRequest(
                ttl=5, agent_id={"trust_domain": "example.org", "path": "/spire/agent/x"}
            ),
            ErrorKind.INVALID_ARGUMENT,
        ),
        (
            pb.CreateJoinTokenRequest(ttl=5, agent_id={"trust_domain": "other.test", "path": "/x"}),
            ErrorKind.INVALID_ARGUMENT,
        ),
        (pb.CreateJoinTokenRequest(ttl=5, token="taken"), ErrorKind.INTERNAL),
    ],
)
async def test_bad_tokens_are_not_made(
    operator: Operator, request_: pb.CreateJoinTokenRequest, kind: ErrorKind
) -> None:
    taken = pb.CreateJoinTokenRequest(ttl=5, token="taken")
    made = await admin(operator, "CreateJoinToken", taken, types_pb2.JoinToken)
    assert made.value == "taken"
    with pytest.raises(SpireHwError) as caught:
        await admin(operator, "CreateJoinToken", request_, types_pb2.JoinToken)
    assert caught.value.kind is kind


async def test_a_banned_agent_is_refused_at_once_and_for_good(
    operator: Operator, agent: ScriptedAgent
) -> None:
    async with await agent.channel() as open_channel:
        request = server_entry_pb2.GetAuthorizedEntriesRequest()
        answer = server_entry_pb2.GetAuthorizedEntriesResponse
        await open_channel.unary(AUTHORIZED, request, answer, timeout_s=TIMEOUT_S)
        await admin(operator, "BanAgent", pb.BanAgentRequest(id=by_id(agent)))
        with pytest.raises(DeniedError) as caught:
            await open_channel.unary(AUTHORIZED, request, answer, timeout_s=TIMEOUT_S)
    assert caught.value.reason is DeniedReason.AGENT_BANNED
    shown = await admin(operator, "GetAgent", pb.GetAgentRequest(id=by_id(agent)), types_pb2.Agent)
    assert shown.banned
    assert shown.x509svid_serial_number == ""
    with pytest.raises(DeniedError) as caught:
        await agent.renew()
    assert caught.value.reason is DeniedReason.AGENT_BANNED


async def test_an_evicted_agent_is_not_attested_any_more(
    operator: Operator, agent: ScriptedAgent
) -> None:
    assert await authorized(agent) == []
    await admin(operator, "DeleteAgent", pb.DeleteAgentRequest(id=by_id(agent)))
    with pytest.raises(DeniedError) as caught:
        await authorized(agent)
    assert caught.value.reason is DeniedReason.AGENT_NOT_ATTESTED


async def test_an_expired_agent_hears_it_on_its_open_connection(
    clock: SimClock, agent: ScriptedAgent
) -> None:
    async with await agent.channel() as channel:
        request = server_entry_pb2.GetAuthorizedEntriesRequest()
        answer = server_entry_pb2.GetAuthorizedEntriesResponse
        await channel.unary(AUTHORIZED, request, answer, timeout_s=TIMEOUT_S)
        await clock.advance(timedelta(hours=1))
        with pytest.raises(DeniedError) as caught:
            await channel.unary(AUTHORIZED, request, answer, timeout_s=TIMEOUT_S)
    assert caught.value.reason is DeniedReason.AGENT_EXPIRED


async def test_a_renewed_svid_takes_over_at_its_first_use(
    operator: Operator, agent: ScriptedAgent
) -> None:
    old = ScriptedAgent(agent.port, agent.bundle, agent.clock, agent.key, agent.chain)
    agent.key = generate_private_key(KeyType.EC_P256)
    request = pb.RenewAgentRequest(params=pb.AgentX509SVIDParams(csr=await make_csr(agent.key)))
    answer = await old.call(AGENT + "RenewAgent", request, pb.RenewAgentResponse)
    await authorized(old)
    agent.take(answer.svid)
    await authorized(agent)
    await authorized(agent)
    with pytest.raises(DeniedError) as caught:
        await authorized(old)
    assert caught.value.reason is DeniedReason.AGENT_NOT_ACTIVE
    shown = await admin(operator, "GetAgent", pb.GetAgentRequest(id=by_id(agent)), types_pb2.Agent)
    assert shown.x509svid_serial_number == str(load_certificate(agent.chain[0]).serial_number)
    assert shown.x509svid_expires_at == answer.svid.expires_at


async def test_a_renewal_may_be_asked_for_with_the_renewed_svid(agent: ScriptedAgent) -> None:
    for _ in range(3):
        agent.take(await agent.renew())
    await authorized(agent)


async def test_renewal_needs_a_request_that_holds(agent: ScriptedAgent) -> None:
    for params in (None, pb.AgentX509SVIDParams(), pb.AgentX509SVIDParams(csr=b"junk")):
        request = pb.RenewAgentRequest(params=params)
        with pytest.raises(InvalidInputError):
            await agent.call(AGENT + "RenewAgent", request, pb.RenewAgentResponse)


async def test_a_reattestable_agent_may_not_renew(
    server: Server, operator: Operator, agent: ScriptedAgent
) -> None:
    store = server.manager._store
    assert agent.spiffe_id is not None
    node = await store.get_node(agent.spiffe_id)
    await store.put_node(replace(node, can_reattest=True))
    with pytest.raises(DeniedError) as caught:
        await agent.renew()
    assert caught.value.reason is DeniedReason.AGENT_MUST_REATTEST


async def test_the_version_of_an_agent_is_kept(operator: Operator, agent: ScriptedAgent) -> None:
    for _ in range(2):
        await agent.call(
            AGENT + "PostStatus",
            pb.PostStatusRequest(agent_version="1.2.3"),
            pb.PostStatusResponse,
        )
    shown = await admin(operator, "GetAgent", pb.GetAgentRequest(id=by_id(agent)), types_pb2.Agent)
    assert shown.agent_version == "1.2.3"
    with pytest.raises(InvalidInputError):
        await agent.call(
            AGENT + "PostStatus",
            pb.PostStatusRequest(agent_version="x" * 256),
            pb.PostStatusResponse,
        )


async def test_agents_are_listed_counted_and_filtered(
    server: Server, operator: Operator, clock: SimClock
) -> None:
    agents = [await joined_agent(server, operator) for _ in range(3)]
    await admin(operator, "BanAgent", pb.BanAgentRequest(id=by_id(agents[0])))

    async def found(**fields: Any) -> int:
        listed = await admin(
            operator,
            "ListAgents",
            pb.ListAgentsRequest(filter=pb.ListAgentsRequest.Filter(**fields)),
            pb.ListAgentsResponse,
        )
        counted = await admin(
            operator,
            "CountAgents",
            pb.CountAgentsRequest(filter=pb.CountAgentsRequest.Filter(**fields)),
            pb.CountAgentsResponse,
        )
        assert counted.count == len(listed.agents)
        return len(listed.agents)

    later = (clock.now() + timedelta(hours=2)).strftime("%Y-%m-%d %H:%M:%S +0000 +00")
    sooner = clock.now().strftime("%Y-%m-%d %H:%M:%S +0000 +00")
    assert await found() == 3
    assert await found(by_attestation_type="join_token") == 3
    assert await found(by_attestation_type="tpm") == 0
    assert await found(by_banned={"value": True}) == 1
    assert await found(by_banned={"value": False}) == 2
    assert await found(by_can_reattest={"value": True}) == 0
    assert await found(by_expires_before=later) == 3
    assert await found(by_expires_before=sooner) == 0
    assert await found(by_expires_before="whenever") == 3

    seen: list[str] = []
    token = ""
    while True:
        page = await admin(
            operator,
            "ListAgents",
            pb.ListAgentsRequest(
                page_size=2,
                page_token=token,
                output_mask=types_pb2.AgentMask(attestation_type=True),
            ),
            pb.ListAgentsResponse,
        )
        seen += [a.id.path for a in page.agents]
        assert all(a.attestation_type and not a.x509svid_serial_number for a in page.agents)
        token = page.next_page_token
        if not token:
            break
    assert sorted(seen) == sorted(by_id(a).path for a in agents)


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (pb.ListAgentsRequest(page_size=-1), ErrorKind.INVALID_ARGUMENT),
        (pb.ListAgentsRequest(page_size=1, page_token="junk"), ErrorKind.INTERNAL),
        (
            pb.ListAgentsRequest(filter={"by_selector_match": {"selectors": []}}),
            ErrorKind.INVALID_ARGUMENT,
        ),
    ],
)
async def test_bad_list_requests(
    operator: Operator, request_: pb.ListAgentsRequest, kind: ErrorKind
) -> None:
    with pytest.raises(SpireHwError) as caught:
        await admin(operator, "ListAgents", request_, pb.ListAgentsResponse)
    assert caught.value.kind is kind


@pytest.mark.parametrize("name", ["GetAgent", "DeleteAgent", "BanAgent"])
async def test_agents_that_are_not_there(operator: Operator, name: str) -> None:
    request_type = getattr(pb, name + "Request")
    answer = types_pb2.Agent if name == "GetAgent" else empty_pb2.Empty
    unknown = types_pb2.SPIFFEID(trust_domain="example.org", path="/spire/agent/x/nobody")
    with pytest.raises(NotFoundError):
        await admin(operator, name, request_type(id=unknown), answer)
    for bad in (
        None,
        types_pb2.SPIFFEID(trust_domain="example.org", path="/workload"),
        types_pb2.SPIFFEID(trust_domain="other.test", path="/spire/agent/x/1"),
        types_pb2.SPIFFEID(trust_domain="example.org"),
    ):
        with pytest.raises(InvalidInputError):
            await admin(operator, name, request_type(id=bad), answer)


async def _first(agent: ScriptedAgent, *requests: pb.AttestAgentRequest) -> Any:
    async with (
        await agent.channel() as channel,
        channel.bidi(AGENT + "AttestAgent", pb.AttestAgentResponse, timeout_s=TIMEOUT_S) as call,
    ):
        for request in requests:
            await call.send(request)
        await call.done_sending()
        return await call.receive()


async def test_attestation_refuses_what_is_incomplete(server: Server, operator: Operator) -> None:
    stranger = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    csr = await make_csr(stranger.key)
    data = types_pb2.AttestationData(type="join_token", payload=b"x")
    params = pb.AgentX509SVIDParams(csr=csr)
    broken = bytearray(csr)
    broken[-1] ^= 1
    whole = pb.AttestAgentRequest.Params
    bad = [
        (),
        (pb.AttestAgentRequest(challenge_response=b"x"),),
        (pb.AttestAgentRequest(),),
        (pb.AttestAgentRequest(params=whole()),),
        (pb.AttestAgentRequest(params=whole(data=data)),),
        (pb.AttestAgentRequest(params=whole(data=data, params=pb.AgentX509SVIDParams())),),
        (pb.AttestAgentRequest(params=whole(data={"payload": b"x"}, params=params)),),
        (pb.AttestAgentRequest(params=whole(data={"type": "join_token"}, params=params)),),
        (pb.AttestAgentRequest(params=whole(data=data, params={"csr": bytes(broken)})),),
        (pb.AttestAgentRequest(params=whole(data=data, params={"csr": b"\x30\x00"})),),
    ]
    for requests in bad:
        with pytest.raises(InvalidInputError):
            await _first(stranger, *requests)
    unknown = whole(data={"type": "nope", "payload": b"x"}, params=params)
    with pytest.raises(NotReadyError):
        await _first(stranger, pb.AttestAgentRequest(params=unknown))
    count = await admin(operator, "CountAgents", pb.CountAgentsRequest(), pb.CountAgentsResponse)
    assert count.count == 0


async def test_a_bad_csr_does_not_spend_the_token(server: Server, operator: Operator) -> None:
    token = await operator.token()
    agent = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    data = types_pb2.AttestationData(type="join_token", payload=token.encode())
    params = pb.AttestAgentRequest.Params(data=data, params={"csr": b"junk"})
    with pytest.raises(InvalidInputError):
        await _first(agent, pb.AttestAgentRequest(params=params))
    await agent.attest(token)


async def test_strangers_and_agents_may_do_only_what_is_theirs(
    server: Server, operator: Operator, agent: ScriptedAgent
) -> None:
    stranger = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    for caller in (stranger, agent):
        with pytest.raises(DeniedError) as caught:
            await caller.call(AGENT + "ListAgents", pb.ListAgentsRequest(), pb.ListAgentsResponse)
        assert caught.value.reason is None
    with pytest.raises(DeniedError) as caught:
        await authorized(stranger)
    assert caught.value.reason is None
    with pytest.raises(DeniedError):
        await operator.channel.unary(
            AUTHORIZED,
            server_entry_pb2.GetAuthorizedEntriesRequest(),
            server_entry_pb2.GetAuthorizedEntriesResponse,
            timeout_s=TIMEOUT_S,
        )


async def test_an_svid_of_another_authority_does_not_connect(
    server: Server, operator: Operator
) -> None:
    other = Authority("example.org")
    identity = other.identity("/spire/agent/join_token/x")
    impostor = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    assert identity.private_key is not None
    impostor.key, impostor.chain = identity.private_key, identity.chain_der
    with pytest.raises(UnavailableError):
        await authorized(impostor)
