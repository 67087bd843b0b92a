"""Agents: attested, renewed, listed, banned, evicted; the tokens they may join with."""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from google.protobuf import empty_pb2

from spire_hw._pb import server_agent_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.errors import (
    AlreadyExistsError,
    DeniedError,
    DeniedReason,
    ErrorKind,
    InvalidInputError,
    LimitError,
    SpireHwError,
)
from spire_hw.rpc import convert
from spire_hw.selector import Selector
from spire_hw.spiffeid import (
    SpiffeId,
    TrustDomain,
    agent_id,
    check_agent_id,
    check_segment,
    check_workload_id,
)
from spire_hw.transport.peer import TcpPeer
from spire_hw_server.api.authorize import caller_node
from spire_hw_server.api.entry import listed, parse_page
from spire_hw_server.api.entry_message import parse_selector_match
from spire_hw_server.datastore.records import (
    Entry,
    JoinToken,
    KeyInUseError,
    KeyRole,
    Node,
    NodeFilter,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from spire_hw.clock import Clock
    from spire_hw.plugin.nodeattestor import Challenge
    from spire_hw.rpc.service import Call
    from spire_hw.x509.csr import Csr
    from spire_hw_server.admission import Admissions
    from spire_hw_server.api.audit import Audit
    from spire_hw_server.api.limits import Limits
    from spire_hw_server.api.nodes import NodeCache
    from spire_hw_server.ca.authority import IssuedX509, Issuer
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.entries import EntryCache

JOIN_TOKEN: Final = "join_token"  # noqa: S105 - the attestor's name
MAX_VERSION: Final = 255
# How long an attestation stream may stay silent before its first message.
_FIRST_MESSAGE_S: Final = 10.0
_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}) [+-]\d\d", re.ASCII)


class AgentService:
    """`spire.api.server.agent.v1.Agent`."""

    def __init__(
        self,
        *,
        trust_domain: TrustDomain,
        store: Datastore,
        nodes: NodeCache,
        entries: EntryCache,
        admissions: Admissions,
        issuer: Issuer,
        limits: Limits,
        audit: Audit,
        clock: Clock,
    ) -> None:
        self._trust_domain = trust_domain
        self._store = store
        self._nodes = nodes
        self._entries = entries
        self._admissions = admissions
        self._issuer = issuer
        self._limits = limits
        self._audit = audit
        self._clock = clock
        self._issuing: set[SpiffeId] = set()

    async def count_agents(
        self, request: pb.CountAgentsRequest, call: Call
    ) -> pb.CountAgentsResponse:
        """Return how many agents there are."""
        del call
        where = parse_filter(request.filter) if request.HasField("filter") else NodeFilter()
        return pb.CountAgentsResponse(count=await self._store.count_nodes(where))

    async def list_agents(self, request: pb.ListAgentsRequest, call: Call) -> pb.ListAgentsResponse:
        """Return agents, whole or page by page."""
        del call
        where = parse_filter(request.filter) if request.HasField("filter") else NodeFilter()
        mask = request.output_mask if request.HasField("output_mask") else None
        page = await listed(
            self._store.list_nodes(where, parse_page(request.page_size, request.page_token))
        )
        return pb.ListAgentsResponse(
            agents=[encode_agent(n, mask) for n in page.nodes], next_page_token=page.next_token
        )

    async def get_agent(self, request: pb.GetAgentRequest, call: Call) -> types_pb2.Agent:
        """Return one agent."""
        spiffe_id = self._agent_id(request, call)
        node = await self._store.get_node(spiffe_id)
        return encode_agent(node, request.output_mask if request.HasField("output_mask") else None)

    async def delete_agent(self, request: pb.DeleteAgentRequest, call: Call) -> empty_pb2.Empty:
        """Evict an agent: it may attest again."""
        spiffe_id = self._agent_id(request, call)
        await self._store.delete_node(spiffe_id)
        self._nodes.forget(spiffe_id)
        await self._entries.refresh()
        call.log.info("agent deleted", spiffe_id=str(spiffe_id))
        return empty_pb2.Empty()

    async def ban_agent(self, request: pb.BanAgentRequest, call: Call) -> empty_pb2.Empty:
        """Ban an agent: it may not attest again before it is evicted."""
        spiffe_id = self._agent_id(request, call)
        await self._store.ban_node(spiffe_id)
        self._nodes.forget(spiffe_id)
        call.log.info("agent banned", spiffe_id=str(spiffe_id))
        return empty_pb2.Empty()

    async def attest_agent(
        self, requests: AsyncIterator[pb.AttestAgentRequest], call: Call
    ) -> AsyncIterator[pb.AttestAgentResponse]:
        """Attest a node and give its agent an SVID."""
        await self._limits.attest(call)
        first = await _first(requests)
        if first is None:
            raise InvalidInputError("stream was closed before the first message")
        if first.WhichOneof("step") != "params":
            raise InvalidInputError("malformed param: missing params")

        async def challenge(data: bytes) -> bytes:
            await call.reply(pb.AttestAgentResponse(challenge=data))
            answer = await anext(requests, None)
            if answer is None:
                raise InvalidInputError("stream was closed before the challenge was answered")
            if answer.WhichOneof("step") != "challenge_response":
                raise InvalidInputError("malformed param: expected a challenge response")
            return answer.challenge_response

        yield pb.AttestAgentResponse(result=await self.attest(first.params, challenge, call))

    async def renew_agent(self, request: pb.RenewAgentRequest, call: Call) -> pb.RenewAgentResponse:
        """Give an agent a new SVID, which becomes the current one when it is first used."""
        await self._limits.sign_x509(call)
        node = caller_node(call)
        self._audit.note(call, spiffe_id=str(node.agent_id))
        if node.can_reattest:
            raise DeniedError(
                "agent must reattest instead of renew", DeniedReason.AGENT_MUST_REATTEST
            )
        if not request.HasField("params"):
            raise InvalidInputError("params cannot be nil")
        csr = convert.csr_from_pb(request.params.csr)
        key = hashlib.sha256(csr.spki).digest()
        try:
            await self._store.find_node(node.agent_id, {KeyRole.NEW_SVID: key})
            issued = await self._issuer.agent_svid(csr.spki, node.agent_id)
            await self._store.set_node_serials(
                node.agent_id,
                serial_number=node.serial_number,
                expires_at=node.expires_at,
                new_serial_number=str(issued.serial),
                new_expires_at=issued.not_after,
                expected_serial_number=node.serial_number,
                new_key=key,
            )
        except KeyInUseError as e:
            raise self._admissions.reused(node.attestation_type, node.agent_id, e) from e
        self._nodes.forget(node.agent_id)
        return pb.RenewAgentResponse(svid=_svid_message(issued, node.agent_id))

    async def post_status(self, request: pb.PostStatusRequest, call: Call) -> pb.PostStatusResponse:
        """Take note of an agent's version."""
        await self._limits.post_status(call)
        if len(request.agent_version) > MAX_VERSION:
            raise InvalidInputError(f"agent version is longer than {MAX_VERSION} characters")
        if not request.agent_version.isprintable():
            raise InvalidInputError("agent version has characters that cannot be shown")
        node = caller_node(call)
        if request.agent_version != node.agent_version:
            await self._store.set_node_version(node.agent_id, request.agent_version)
            self._nodes.forget(node.agent_id)
        return pb.PostStatusResponse()

    async def create_join_token(
        self, request: pb.CreateJoinTokenRequest, call: Call
    ) -> types_pb2.JoinToken:
        """Make a token that lets one node join once."""
        self._audit.note(call, ttl=request.ttl)
        if request.ttl < 1:
            raise InvalidInputError("ttl is required, you must provide one")
        alias_id = None
        if request.HasField("agent_id"):
            alias_id = convert.id_from_pb(request.agent_id)
            check_workload_id(alias_id, self._trust_domain)
            self._audit.note(call, spiffe_id=str(alias_id))
        value = request.token or str(uuid.uuid4())
        check_segment(value)
        expires_at = self._clock.now().replace(microsecond=0) + timedelta(seconds=request.ttl)
        alias = None if alias_id is None else self._alias(value, alias_id)
        try:
            await self._store.create_join_token(JoinToken(value, expires_at), alias)
        except AlreadyExistsError as e:
            raise SpireHwError(
                "could not create token: it exists already", kind=ErrorKind.INTERNAL
            ) from e
        if alias is not None:
            await self._entries.refresh()
        return types_pb2.JoinToken(value=value, expires_at=int(expires_at.timestamp()))

    def _alias(self, token: str, alias_id: SpiffeId) -> Entry:
        parent_id = agent_id(self._trust_domain, JOIN_TOKEN, token)
        selector = Selector(type="spiffe_id", value=str(parent_id))
        return Entry(entry_id="", spiffe_id=alias_id, parent_id=parent_id, selectors=(selector,))

    def _agent_id(self, request: Any, call: Call) -> SpiffeId:
        if not request.HasField("id"):
            raise InvalidInputError("invalid agent ID: request must specify SPIFFE ID")
        spiffe_id = convert.id_from_pb(request.id)
        check_agent_id(spiffe_id, self._trust_domain)
        self._audit.note(call, spiffe_id=str(spiffe_id))
        return spiffe_id

    async def attest(
        self,
        params: pb.AttestAgentRequest.Params,
        challenge: Challenge,
        call: Call,
    ) -> pb.AttestAgentResponse.Result:
        """Admit a node, sign its agent's SVID, store both; in this order.

        Raises:
            SpireHwError: any of it failed; nothing is stored then.
        """
        data, csr = _checked_params(params)
        self._audit.note(call, agent_node_attestor_type=data.type)
        admission = await self._admissions.admit(
            data.type,
            data.payload,
            csr.spki,
            challenge,
            caller=_address(call),
            source=_source(call),
        )
        self._audit.note(call, spiffe_id=str(admission.agent_id))
        with self._alone(admission.agent_id):
            with self._admissions.own_faults("cannot issue", admission.agent_id):
                issued = await self._issuer.agent_svid(csr.spki, admission.agent_id)
            await self._admissions.store(
                admission, serial_number=str(issued.serial), expires_at=issued.not_after
            )
        self._nodes.forget(admission.agent_id)
        await self._entries.refresh_own()
        return pb.AttestAgentResponse.Result(
            svid=_svid_message(issued, admission.agent_id), reattestable=admission.can_reattest
        )

    @contextmanager
    def _alone(self, agent_id: SpiffeId) -> Iterator[None]:
        """Issue to one of several that proved to be the same node at the same time."""
        if agent_id in self._issuing:
            raise LimitError("this node is attesting already")
        self._issuing.add(agent_id)
        try:
            yield
        finally:
            self._issuing.discard(agent_id)


async def _first(requests: AsyncIterator[pb.AttestAgentRequest]) -> pb.AttestAgentRequest | None:
    try:
        async with asyncio.timeout(_FIRST_MESSAGE_S):
            return await anext(requests, None)
    except TimeoutError as e:
        raise SpireHwError(
            f"no attestation data within {_FIRST_MESSAGE_S:g} s",
            kind=ErrorKind.DEADLINE_EXCEEDED,
        ) from e


def _checked_params(
    params: pb.AttestAgentRequest.Params,
) -> tuple[types_pb2.AttestationData, Csr]:
    if not params.HasField("data"):
        raise InvalidInputError("malformed param: missing attestation data")
    if not params.HasField("params"):
        raise InvalidInputError("malformed param: missing X509-SVID parameters")
    if not params.params.csr:
        raise InvalidInputError("malformed param: missing CSR")
    if not params.data.type:
        raise InvalidInputError("malformed param: missing attestation data type")
    if not params.data.payload:
        raise InvalidInputError("malformed param: missing attestation data payload")
    csr = convert.csr_from_pb(params.params.csr)
    if not csr.bare:
        # Who it is for is proved, never asked for.
        raise InvalidInputError("csr: names and extensions are not accepted here")
    return params.data, csr


def _address(call: Call) -> str:
    return call.peer.address if isinstance(call.peer, TcpPeer) else ""


def _source(call: Call) -> str:
    return call.peer.source if isinstance(call.peer, TcpPeer) else ""


def _svid_message(issued: IssuedX509, spiffe_id: SpiffeId) -> types_pb2.X509SVID:
    return convert.x509_svid_to_pb(issued.chain, spiffe_id, issued.not_after)


def encode_agent(node: Node, mask: types_pb2.AgentMask | None = None) -> types_pb2.Agent:
    """Return the message of an attested node; a mask leaves fields out, never the id."""
    message = types_pb2.Agent(id=convert.id_to_pb(node.agent_id))
    if mask is None or mask.attestation_type:
        message.attestation_type = node.attestation_type
    if mask is None or mask.x509svid_serial_number:
        message.x509svid_serial_number = node.serial_number
    if mask is None or mask.x509svid_expires_at:
        message.x509svid_expires_at = int(node.expires_at.timestamp())
    if mask is None or mask.selectors:
        for selector in node.selectors:
            message.selectors.add(type=selector.type, value=selector.value)
    if mask is None or mask.banned:
        message.banned = node.banned
    if mask is None or mask.can_reattest:
        message.can_reattest = node.can_reattest
    if mask is None or mask.agent_version:
        message.agent_version = node.agent_version
    return message


def parse_filter(message: Any) -> NodeFilter:
    """Return the filter of a list or count request.

    Raises:
        InvalidInputError: bad selectors.
    """
    where = NodeFilter(attestation_type=message.by_attestation_type or None)
    if message.HasField("by_selector_match"):
        where = replace(where, selectors=parse_selector_match(message.by_selector_match))
    if message.HasField("by_banned"):
        where = replace(where, banned=message.by_banned.value)
    if message.HasField("by_can_reattest"):
        where = replace(where, can_reattest=message.by_can_reattest.value)
    return replace(where, expires_before=parse_go_time(message.by_expires_before))


def parse_go_time(text: str) -> datetime | None:
    """Return a time in Go's layout `2006-01-02 15:04:05 -0700 -07`; None, as upstream, for others."""
    found = _TIME.fullmatch(text)
    if found is None:
        return None
    try:
        return datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S %z").astimezone(UTC)
    except (ValueError, OverflowError):
        return None
