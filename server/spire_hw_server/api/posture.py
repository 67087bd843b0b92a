"""Heartbeats of agents, and what operators see and do of nodes' machines."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from spire_hw._pb import hw_posture_pb2 as pb
from spire_hw.errors import ErrorKind, InvalidInputError, LimitError, NotFoundError, SpireHwError
from spire_hw.posture.verdict import NodeState
from spire_hw.spiffeid import SpiffeId, TrustDomain, check_agent_id
from spire_hw.transport.peer import TcpPeer
from spire_hw_server.api.authorize import caller_node
from spire_hw_server.api.entry import listed, parse_page
from spire_hw_server.api.posture_message import (
    encode_posture,
    encode_record,
    encode_response,
    parse_answer,
    parse_boot_id,
)
from spire_hw_server.datastore.records import NodeFilter
from spire_hw_server.posture.deflated import inflate
from spire_hw_server.posture.heartbeat import ANSWER_S
from spire_hw_server.posture.stream import Stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime

    from spire_hw.clock import Clock
    from spire_hw.posture.heartbeat import HeartbeatChallenge
    from spire_hw.rpc.service import Call
    from spire_hw_server.api.audit import Audit
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.records import Node, Posture
    from spire_hw_server.posture.postures import Postures
    from spire_hw_server.posture.stream import Answer, StateMessage

_FIRST_MESSAGE_S: Final = 10.0
# What fits into a message with all that is around it.
_MAX_DOCUMENT_BYTES: Final = 3 * 1024 * 1024 + 512 * 1024
_STATES: Final = frozenset(state.value for state in NodeState)


class PostureService:
    """`spire_hw.server.v1.Posture`."""

    def __init__(self, *, postures: Postures) -> None:
        self._heartbeats = postures.heartbeats

    async def heartbeat(
        self, requests: AsyncIterator[pb.HeartbeatRequest], call: Call
    ) -> AsyncIterator[pb.HeartbeatResponse]:
        """Hold a stream to an agent; it is told and asked as things happen."""
        stream = await _opened(requests, call)

        async def send(message: HeartbeatChallenge | StateMessage) -> None:
            await call.reply(encode_response(message, timeout_s=ANSWER_S))

        with self._heartbeats.open(stream, _answers(requests), send) as session:
            yield encode_response(await session.greeting(), timeout_s=ANSWER_S)
            await session.run()


async def _opened(requests: AsyncIterator[pb.HeartbeatRequest], call: Call) -> Stream:
    node, peer = caller_node(call), call.peer
    if not isinstance(peer, TcpPeer) or not peer.chain:
        raise SpireHwError("heartbeats come over TCP", kind=ErrorKind.UNAUTHENTICATED)
    try:
        async with asyncio.timeout(_FIRST_MESSAGE_S):
            first = await anext(requests, None)
    except TimeoutError as e:
        raise SpireHwError(
            f"no hello within {_FIRST_MESSAGE_S:g} s", kind=ErrorKind.DEADLINE_EXCEEDED
        ) from e
    if first is None or first.WhichOneof("step") != "hello":
        raise InvalidInputError("envelope: expected hello")
    leaf = peer.chain[0]
    spki = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return Stream(
        agent_id=node.agent_id,
        attestation_type=node.attestation_type,
        serial_number=str(leaf.serial_number),
        not_after=leaf.not_valid_after_utc,
        spki_sha256=hashlib.sha256(spki).digest(),
        can_answer=first.hello.can_answer,
        boot_id=parse_boot_id(first.hello.boot_id),
    )


async def _answers(requests: AsyncIterator[pb.HeartbeatRequest]) -> AsyncIterator[Answer]:
    async for request in requests:
        yield parse_answer(request)


class PostureAdminService:
    """`spire_hw.server.v1.PostureAdmin`."""

    def __init__(
        self,
        *,
        trust_domain: TrustDomain,
        store: Datastore,
        postures: Postures,
        audit: Audit,
        clock: Clock,
    ) -> None:
        self._trust_domain = trust_domain
        self._store = store
        self._postures = postures
        self._audit = audit
        self._clock = clock

    async def get_state(self, request: pb.GetStateRequest, call: Call) -> pb.NodePosture:
        """Return what is known of one node."""
        agent_id = self._agent_id(request.agent_id, call)
        node = await self._store.get_node(agent_id)
        return self._encode(node, await self._current(agent_id))

    async def list_states(self, request: pb.ListStatesRequest, call: Call) -> pb.ListStatesResponse:
        """Return nodes, whole or page by page."""
        del call
        unknown = set(request.states) - _STATES
        if unknown:
            raise InvalidInputError(f"there is no state {min(unknown)[:32]!a}")
        page = await listed(
            self._store.list_nodes(NodeFilter(), parse_page(request.page_size, request.page_token))
        )
        known = await self._store.get_postures([node.agent_id for node in page.nodes])
        found = [self._encode(node, known.get(node.agent_id)) for node in page.nodes]
        wanted = set(request.states) or _STATES
        return pb.ListStatesResponse(
            nodes=[node for node in found if node.state in wanted],
            next_page_token=page.next_token,
        )

    async def list_evidence(
        self, request: pb.ListEvidenceRequest, call: Call
    ) -> pb.ListEvidenceResponse:
        """Return the history of a node, the newest first."""
        agent_id = self._agent_id(request.agent_id, call)
        parse = parse_page(request.page_size, request.page_token)
        page = await listed(self._store.list_evidence(agent_id, parse))
        return pb.ListEvidenceResponse(
            records=[encode_record(agent_id.text, record) for record in page.records],
            next_page_token=page.next_token,
        )

    async def get_evidence(
        self, request: pb.GetEvidenceRequest, call: Call
    ) -> pb.GetEvidenceResponse:
        """Return one whole evidence."""
        agent_id = self._agent_id(request.agent_id, call)
        if not request.id:
            document = await self._postures.latest(agent_id)
            return pb.GetEvidenceResponse(document=_fitting(document))
        record = await self._store.get_evidence(agent_id, request.id)
        if record.document is None:
            raise NotFoundError(f'evidence {request.id} of "{agent_id}" is not kept whole')
        return pb.GetEvidenceResponse(
            record=encode_record(agent_id.text, record), document=_fitting(inflate(record.document))
        )

    async def release(self, request: pb.ReleaseRequest, call: Call) -> pb.NodePosture:
        """Lift a quarantine."""
        agent_id = self._agent_id(request.agent_id, call)
        posture = await self._postures.operators.release(agent_id, request.comment)
        self._audit.note(call, comment=request.comment)
        return self._encode(await self._store.get_node(agent_id), posture)

    async def quarantine(self, request: pb.QuarantineRequest, call: Call) -> pb.NodePosture:
        """Put a node in quarantine until an operator releases it."""
        agent_id = self._agent_id(request.agent_id, call)
        posture = await self._postures.operators.quarantine(agent_id, request.comment)
        self._audit.note(call, comment=request.comment)
        return self._encode(await self._store.get_node(agent_id), posture)

    async def _current(self, agent_id: SpiffeId) -> Posture | None:
        """Return a posture with the times of heartbeats that are not stored yet."""
        known = await self._postures.ledger.get(agent_id)
        return None if known is None else known.posture

    def _agent_id(self, text: str, call: Call) -> SpiffeId:
        agent_id = SpiffeId.parse(text)
        check_agent_id(agent_id, self._trust_domain)
        self._audit.note(call, spiffe_id=agent_id.text)
        return agent_id

    def _encode(self, node: Node, posture: Posture | None) -> pb.NodePosture:
        state = shown_state(node, posture, self._clock.now())
        message = encode_posture(node.agent_id.text, posture, state)
        message.by_operator = self._postures.operators.is_by_operator(posture)
        message.connected = self._postures.heartbeats.is_connected(node.agent_id)
        return message


def shown_state(node: Node, posture: Posture | None, now: datetime) -> str:
    """Return the word for a node's state; what follows from the node itself goes first."""
    if node.banned:
        return NodeState.BANNED.value
    if node.quarantine:
        return NodeState.QUARANTINED.value
    ends_at = max(filter(None, (node.expires_at, node.new_expires_at)))
    if ends_at <= now:
        return NodeState.EXPIRED.value
    return NodeState.ATTESTED.value if posture is None else posture.state


def _fitting(document: bytes) -> bytes:
    if len(document) > _MAX_DOCUMENT_BYTES:
        raise LimitError(f"evidence of {len(document)} bytes is too large for an answer")
    return document
