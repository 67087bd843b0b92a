"""Every method by every kind of caller, over real TLS and the unix socket; and the fields they send."""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from google.protobuf import empty_pb2

from spire_hw import log as logs
from spire_hw._pb import (
    server_agent_pb2,
    server_bundle_pb2,
    server_entry_pb2,
    types_pb2,
)
from spire_hw.errors import DeniedError, DeniedReason, ErrorKind, SpireHwError
from spire_hw.rpc import convert
from spire_hw_server.api.policy import LOCAL_SERVICES, POLICY, CallerClass, service_of
from spire_hw_server.app import Server
from spire_hw_sim.pki import Authority
from spire_hw_sim.servers import (
    AGENT,
    BUNDLE,
    ENTRY,
    TIMEOUT_S,
    Operator,
    ScriptedAgent,
    entry_message,
    joined_agent,
    server_settings,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio

PARTNER = Authority("partner.test")
OPERATOR_THERE = "spiffe://partner.test/operator"
MORE = f"""
ratelimit {{ attestation = false signing = false }}
admin_ids = ["{OPERATOR_THERE}"]
"""
STREAMS = ("AttestAgent", "SyncAuthorizedEntries", "Watch")
AUTHORIZED = ENTRY + "GetAuthorizedEntries"
# No effect on what later calls of the matrix need.
METHODS = sorted(m for m in POLICY if "TrustDomain" not in m and not m.endswith("Watch"))


@dataclass
class Cast:
    """Everybody who may call, by name: an agent's script and what it may pass for."""

    server: Server
    operator: Operator
    callers: dict[str, tuple[ScriptedAgent, set[CallerClass], DeniedReason | None]]


async def _admin(operator: Operator, name: str, agent: ScriptedAgent) -> None:
    assert agent.spiffe_id is not None
    request = getattr(server_agent_pb2, name + "Request")(id=convert.id_to_pb(agent.spiffe_id))
    await operator.channel.unary(AGENT + name, request, empty_pb2.Empty, timeout_s=TIMEOUT_S)


def partner(server: Server, agent: ScriptedAgent, path: str) -> ScriptedAgent:
    stranger = ScriptedAgent(server.port, agent.bundle, server.clock)
    identity = PARTNER.identity(path)
    assert identity.private_key is not None
    stranger.key, stranger.chain = identity.private_key, identity.chain_der
    return stranger


@pytest_asyncio.fixture
async def cast(short_dir: Path, clock: SimClock) -> AsyncIterator[Cast]:
    server = Server(server_settings(short_dir, key_manager="memory", more=MORE), clock=clock)
    await server.start()
    operator = Operator(server.settings.socket_path)
    agent, banned, evicted, renewed = [await joined_agent(server, operator) for _ in range(4)]
    assert agent.spiffe_id is not None
    foreign = types_pb2.Bundle(
        trust_domain="partner.test",
        x509_authorities=[types_pb2.X509Certificate(asn1=PARTNER.der)],
    )
    await operator.channel.unary(
        BUNDLE + "BatchSetFederatedBundle",
        server_bundle_pb2.BatchSetFederatedBundleRequest(bundle=[foreign]),
        server_bundle_pb2.BatchSetFederatedBundleResponse,
        timeout_s=TIMEOUT_S,
    )
    made = await operator.create(
        entry_message("/plain", agent.spiffe_id),
        entry_message("/admin", agent.spiffe_id, admin=True),
        entry_message("/down", agent.spiffe_id, downstream=True),
        entry_message("/spirex/agent/join_token/x", agent.spiffe_id),
    )
    plain, admin, down, imitator = [await agent.workload(m.entry.id) for m in made]
    await _admin(operator, "BanAgent", banned)
    await _admin(operator, "DeleteAgent", evicted)
    old = ScriptedAgent(server.port, renewed.bundle, server.clock, renewed.key, renewed.chain)
    renewed.take(await renewed.renew())
    await _authorized(renewed)  # the first use makes the new one current
    stranger = ScriptedAgent(server.port, agent.bundle, server.clock)
    any_ = CallerClass.ANY
    yield Cast(
        server,
        operator,
        {
            "anonymous": (stranger, {any_}, None),
            "workload": (plain, {any_}, DeniedReason.AGENT_NOT_ATTESTED),
            "imitator": (imitator, {any_}, DeniedReason.AGENT_NOT_ATTESTED),
            "admin": (admin, {any_, CallerClass.ADMIN}, DeniedReason.AGENT_NOT_ATTESTED),
            "downstream": (down, {any_, CallerClass.DOWNSTREAM}, DeniedReason.AGENT_NOT_ATTESTED),
            "foreign admin": (
                partner(server, agent, OPERATOR_THERE),
                {any_, CallerClass.ADMIN},
                DeniedReason.AGENT_NOT_ATTESTED,
            ),
            "banned": (banned, {any_}, DeniedReason.AGENT_BANNED),
            "evicted": (evicted, {any_}, DeniedReason.AGENT_NOT_ATTESTED),
            "superseded": (old, {any_}, DeniedReason.AGENT_NOT_ACTIVE),
            "agent": (agent, {any_, CallerClass.AGENT}, None),
        },
    )
    await operator.close()
    await server.close()


async def _authorized(agent: ScriptedAgent) -> None:
    await agent.call(
        AUTHORIZED,
        server_entry_pb2.GetAuthorizedEntriesRequest(),
        server_entry_pb2.GetAuthorizedEntriesResponse,
    )


async def outcome(channel: Any, method: str) -> SpireHwError | None:
    """Call with an empty request and return the error."""
    try:
        if method.endswith(STREAMS):
            async with channel.bidi(method, empty_pb2.Empty, timeout_s=TIMEOUT_S) as call:
                await call.send(empty_pb2.Empty())
                await call.done_sending()
                await call.receive()
        else:
            await channel.unary(method, empty_pb2.Empty(), empty_pb2.Empty, timeout_s=TIMEOUT_S)
    except SpireHwError as e:
        return e
    return None


def refused(error: SpireHwError | None, method: str) -> bool:
    return (
        isinstance(error, DeniedError)
        and error.message == f"authorization denied for method {method}"
    )


async def test_every_method_by_every_caller_over_tls(cast: Cast) -> None:
    for name, (caller, classes, reason) in cast.callers.items():
        async with await caller.channel() as channel:
            for method in METHODS:
                error = await outcome(channel, method)
                if service_of(method) in LOCAL_SERVICES:
                    assert error is not None, (name, method)
                    assert error.kind is ErrorKind.UNIMPLEMENTED, (name, method)
                    continue
                allowed = POLICY[method]
                assert refused(error, method) is allowed.isdisjoint(classes), (name, method, error)
                if isinstance(error, DeniedError) and refused(error, method):
                    expected = reason if CallerClass.AGENT in allowed else None
                    assert error.reason is expected, (name, method)


async def test_the_unix_socket_makes_nobody_an_agent_or_admin(cast: Cast) -> None:
    for method in METHODS:
        error = await outcome(cast.operator.channel, method)
        may = not POLICY[method].isdisjoint({CallerClass.ANY, CallerClass.LOCAL})
        assert refused(error, method) is not may, (method, error)
        if isinstance(error, DeniedError):
            assert error.reason is None


async def test_members_of_other_trust_domains_do_not_connect(cast: Cast) -> None:
    agent = cast.callers["agent"][0]
    for path in (
        "spiffe://partner.test/other",
        "spiffe://partner.test/spire/agent/join_token/x",
        "spiffe://example.org/spire/agent/join_token/x",
        str(agent.spiffe_id),
    ):
        stranger = partner(cast.server, agent, path)
        with pytest.raises(SpireHwError) as caught:
            await _authorized(stranger)
        assert caught.value.kind is ErrorKind.UNAVAILABLE


async def test_an_svid_that_expires_on_an_open_connection_loses_its_rights(
    cast: Cast, clock: SimClock
) -> None:
    agent, _, _ = cast.callers["agent"]
    admin, _, _ = cast.callers["admin"]
    async with await agent.channel() as channel, await admin.channel() as admins:
        assert await outcome(channel, AUTHORIZED) is None
        assert await outcome(admins, ENTRY + "CountEntries") is None
        await clock.advance(timedelta(hours=1, seconds=5))
        error = await outcome(channel, AUTHORIZED)
        assert isinstance(error, DeniedError)
        assert error.reason is DeniedReason.AGENT_EXPIRED
        error = await outcome(admins, ENTRY + "CountEntries")
        assert refused(error, ENTRY + "CountEntries")


async def test_rights_end_with_the_entry_and_with_its_time(cast: Cast, clock: SimClock) -> None:
    agent, _, _ = cast.callers["agent"]
    assert agent.spiffe_id is not None
    ends = int((clock.now() + timedelta(seconds=60)).timestamp())
    (made,) = await cast.operator.create(
        entry_message("/brief", agent.spiffe_id, admin=True, expires_at=ends)
    )
    brief = await agent.workload(made.entry.id)
    async with await brief.channel() as channel:
        assert await outcome(channel, ENTRY + "CountEntries") is None
        await clock.advance(timedelta(seconds=61))
        assert refused(await outcome(channel, ENTRY + "CountEntries"), ENTRY + "CountEntries")
    admin, _, _ = cast.callers["admin"]
    async with await admin.channel() as channel:
        assert await outcome(channel, ENTRY + "CountEntries") is None
        entries = await cast.operator.channel.unary(
            ENTRY + "ListEntries",
            server_entry_pb2.ListEntriesRequest(),
            server_entry_pb2.ListEntriesResponse,
            timeout_s=TIMEOUT_S,
        )
        ids = [e.id for e in entries.entries if e.admin]
        await cast.operator.channel.unary(
            ENTRY + "BatchDeleteEntry",
            server_entry_pb2.BatchDeleteEntryRequest(ids=ids),
            server_entry_pb2.BatchDeleteEntryResponse,
            timeout_s=TIMEOUT_S,
        )
        assert refused(await outcome(channel, ENTRY + "CountEntries"), ENTRY + "CountEntries")


async def test_a_ban_takes_effect_on_open_connections_at_once(cast: Cast) -> None:
    agent, _, _ = cast.callers["agent"]
    async with await agent.channel() as channel:
        assert await outcome(channel, AUTHORIZED) is None
        await _admin(cast.operator, "BanAgent", agent)
        error = await outcome(channel, AUTHORIZED)
        assert isinstance(error, DeniedError)
        assert error.reason is DeniedReason.AGENT_BANNED


def _id(path: str, trust_domain: str = "example.org") -> types_pb2.SPIFFEID:
    return types_pb2.SPIFFEID(trust_domain=trust_domain, path=path)


BAD_FIELDS: dict[str, dict[str, Any]] = {
    "reserved": {"spiffe_id": _id("/spire")},
    "an agent": {"spiffe_id": _id("/spire/agent/join_token/x")},
    "the server": {"spiffe_id": _id("/spire/server")},
    "no path": {"spiffe_id": _id("")},
    "foreign": {"spiffe_id": _id("/x", "partner.test")},
    "trust domain in capitals": {"spiffe_id": _id("/x", "Example.org")},
    "dots": {"spiffe_id": _id("/a/../b")},
    "percent": {"spiffe_id": _id("/%2e%2e/spire/agent")},
    "slash at the end": {"spiffe_id": _id("/a/")},
    "control character": {"spiffe_id": _id("/a\nb")},
    "NUL": {"spiffe_id": _id("/a\0b")},
    "unicode": {"spiffe_id": _id("/\uff41")},
    "long": {"spiffe_id": _id("/" + "a" * 2048)},
    "trust domain with a path": {"spiffe_id": _id("/x", "example.org/spire/agent")},
    "parent foreign": {"parent_id": _id("/x", "partner.test")},
    "hint of a mebibyte": {"hint": "x" * (1 << 20)},
    "hint too long in bytes": {"hint": "ä" * 513},
    "selector with NUL": {"selectors": [types_pb2.Selector(type="unix", value="a\0b")]},
    "selector without a type": {"selectors": [types_pb2.Selector(type="", value="a")]},
    "selector without a value": {"selectors": [types_pb2.Selector(type="unix", value="")]},
    "selector type with colon": {"selectors": [types_pb2.Selector(type="a:b", value="c")]},
    "selector too long": {"selectors": [types_pb2.Selector(type="a", value="c" * 2049)]},
    "negative TTL": {"x509_svid_ttl": -1},
    "lowest TTL": {"jwt_svid_ttl": -(1 << 31)},
    "time that is none": {"expires_at": (1 << 62)},
    "negative time": {"expires_at": -1},
    "DNS name with a space": {"dns_names": ["a b"]},
    "DNS wildcard inside": {"dns_names": ["a.*.example"]},
    "DNS name of dots": {"dns_names": [".."]},
    "DNS name with NUL": {"dns_names": ["a\0.example"]},
    "DNS name that is long": {"dns_names": ["a" * 64 + ".example"]},
    "id with a slash": {"id": "../x"},
    "id that is long": {"id": "x" * 256},
    "federation without a bundle": {"federates_with": ["nobody.test"]},
    "federation with no name": {"federates_with": ["no/name"]},
}


async def test_fields_of_entries_that_are_refused(cast: Cast) -> None:
    parent = cast.callers["agent"][0].spiffe_id
    assert parent is not None
    entries = []
    for fields in BAD_FIELDS.values():
        message = entry_message("/good", parent)
        for name in fields:
            message.ClearField(name)
        message.MergeFrom(types_pb2.Entry(**fields))
        entries.append(message)
    results = await cast.operator.create(*entries)
    for name, result in zip(BAD_FIELDS, results, strict=True):
        assert result.status.code in {
            ErrorKind.INVALID_ARGUMENT.value,
            ErrorKind.FAILED_PRECONDITION.value,
            ErrorKind.NOT_FOUND.value,
        }, (name, result.status)
        assert result.status.message.isprintable(), name
        assert len(result.status.message) < 3000, name
    assert await cast.operator.create(entry_message("/good", parent))


async def test_the_same_entry_is_created_once_whoever_is_first(cast: Cast) -> None:
    parent = cast.callers["agent"][0].spiffe_id
    assert parent is not None
    selectors = ["unix:uid:1", "unix:uid:2", "unix:uid:1"]
    one = entry_message("/same", parent, selectors)
    other = entry_message("/same", parent, selectors[::-1])
    answers = await asyncio.gather(*(cast.operator.create(m) for m in (one, other) * 4))
    codes = sorted(result.status.code for (result,) in answers)
    assert codes == [0] + [ErrorKind.ALREADY_EXISTS.value] * 7
    assert len({result.entry.id for (result,) in answers}) == 1


@pytest.mark.parametrize(
    "token", ["x", "-1", "99999999999999999999", "1' OR '1'='1", "\0", "\u0661"]
)
async def test_page_tokens_that_are_none(cast: Cast, token: str) -> None:
    for path, request, answer in (
        (ENTRY + "ListEntries", server_entry_pb2.ListEntriesRequest, "ListEntriesResponse"),
        (AGENT + "ListAgents", server_agent_pb2.ListAgentsRequest, "ListAgentsResponse"),
    ):
        module = server_entry_pb2 if path.startswith(ENTRY) else server_agent_pb2
        error, page = None, None
        try:
            page = await cast.operator.channel.unary(
                path,
                request(page_size=1, page_token=token),
                getattr(module, answer),
                timeout_s=TIMEOUT_S,
            )
        except SpireHwError as e:
            error = e
        if error is None:
            assert page is not None
            assert len(page.ListFields()) <= 2
        else:
            assert error.kind in {ErrorKind.INTERNAL, ErrorKind.INVALID_ARGUMENT}
            assert error.message.isprintable()


@pytest.mark.parametrize(
    "version", ["\x1b[2J\x1b]0;owned\x07", "1.0\nlevel=error", "x" * 256, "\x9b31m"]
)
async def test_versions_that_would_write_on_a_terminal_are_refused(
    cast: Cast, version: str
) -> None:
    agent = cast.callers["agent"][0]
    with pytest.raises(SpireHwError) as caught:
        await agent.call(
            AGENT + "PostStatus",
            server_agent_pb2.PostStatusRequest(agent_version=version),
            server_agent_pb2.PostStatusResponse,
        )
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


async def test_a_caller_in_a_loop_does_not_fill_the_log(cast: Cast) -> None:
    stranger, _, _ = cast.callers["anonymous"]
    stream = io.StringIO()
    logs.configure(logs.LogSettings(), stream=stream)
    try:
        async with await stranger.channel() as channel:
            for _ in range(30):
                with pytest.raises(DeniedError):
                    await channel.unary(
                        AUTHORIZED,
                        server_entry_pb2.GetAuthorizedEntriesRequest(),
                        server_entry_pb2.GetAuthorizedEntriesResponse,
                        timeout_s=TIMEOUT_S,
                    )
    finally:
        logs.unconfigure()
    assert stream.getvalue().count("call denied") == 10
