"""NodeAttestor over gRPC, both halves.

Source: `spire.plugin.{agent,server}.nodeattestor.v1`. The RPCs carry neither the CSR nor its key, so
a service gives its attestor None for both.
"""

from __future__ import annotations

import asyncio
import ipaddress
from typing import TYPE_CHECKING, Final

from spire_hw._pb import plugin_agent_nodeattestor_pb2 as agent_pb
from spire_hw._pb import plugin_server_nodeattestor_pb2 as server_pb
from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError
from spire_hw.goplugin.facade.dialogue import converse, heard
from spire_hw.goplugin.facade.values import MAX_SELECTORS
from spire_hw.plugin.info import Side
from spire_hw.plugin.nodeattestor import AttestationRequest, AttestedIdentity
from spire_hw.rpc.service import bind
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId
from spire_hw.transport.peer import source_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from spire_hw.goplugin.facade.link import Link, LinkBidi
    from spire_hw.plugin.nodeattestor import (
        AgentExchange,
        AgentNodeAttestor,
        ServerNodeAttestor,
        SvidKey,
    )
    from spire_hw.rpc.service import Call, Method

_AID: Final = "/spire.plugin.agent.nodeattestor.v1.NodeAttestor/AidAttestation"
_ATTEST: Final = "/spire.plugin.server.nodeattestor.v1.NodeAttestor/Attest"
_CLIENT_IP: Final = "x-forwarded-client-ip"
_FORWARDED_HOST: Final = "x-untrusted-forwarded-host"
# What a server of ours takes of an attestor at most.
_MAX_MESSAGE_BYTES: Final = 1 << 20
_MAX_ROUNDS: Final = 16
# A slow TPM makes an RSA endorsement key in most of a minute.
_PATIENCE_S: Final = 180.0


def remote(link: Link, side: Side) -> RemoteAgentAttestor | RemoteServerAttestor:
    """Return the contract of one half over an external plugin."""
    return RemoteAgentAttestor(link) if side is Side.AGENT else RemoteServerAttestor(link)


def methods(plugin: AgentNodeAttestor | ServerNodeAttestor, side: Side) -> list[Method]:
    """Return the service of one half over an object of its contract."""
    if side is Side.AGENT:
        service: object = AgentService(plugin)  # type: ignore[arg-type]  # by side
        descriptor = agent_pb.DESCRIPTOR
    else:
        service = ServerService(plugin)  # type: ignore[arg-type]
        descriptor = server_pb.DESCRIPTOR
    return bind(descriptor.services_by_name["NodeAttestor"], service)


class RemoteAgentAttestor:
    """The agent half, external; see `spire_hw.plugin.nodeattestor.AgentNodeAttestor`."""

    def __init__(self, link: Link, *, patience_s: float = _PATIENCE_S) -> None:
        self._link = link
        self._patience_s = patience_s

    async def aid_attestation(self, exchange: AgentExchange, svid_key: SvidKey | None) -> None:
        """Relay between plugin and server until the server asks nothing more."""
        del svid_key  # the RPC has no place for it
        async with self._link.bidi(_AID, agent_pb.PayloadOrChallengeResponse) as call:
            await self._relay(call, exchange)

    async def _relay(
        self, call: LinkBidi[agent_pb.PayloadOrChallengeResponse], exchange: AgentExchange
    ) -> None:
        await exchange.send(await self._said(call, "payload"))
        for _ in range(_MAX_ROUNDS):
            challenge = await exchange.next_challenge()
            if challenge is None:
                return
            await call.send(agent_pb.Challenge(challenge=challenge))
            await exchange.send(await self._said(call, "challenge_response"))
        raise InvalidInputError(f"server sent more than {_MAX_ROUNDS} challenges")

    async def _said(
        self, call: LinkBidi[agent_pb.PayloadOrChallengeResponse], wanted: str
    ) -> bytes:
        words = wanted.replace("_", " ")
        try:
            async with asyncio.timeout(self._patience_s):
                answer = await call.receive()
        except TimeoutError:
            raise SpireHwError(
                f"{self._link.prefix}: no {words} within {self._patience_s:g} s",
                kind=ErrorKind.DEADLINE_EXCEEDED,
            ) from None
        if answer is None:
            self._link.refuse(f"it ended before its {words}")
        if answer.WhichOneof("data") != wanted:
            self._link.refuse(f"no {words} in it")
        data: bytes = getattr(answer, wanted)
        if not 1 <= len(data) <= _MAX_MESSAGE_BYTES:
            self._link.refuse(f"a {words} of {len(data)} bytes")
        return data


class RemoteServerAttestor:
    """The server half, external; see `spire_hw.plugin.nodeattestor.ServerNodeAttestor`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def attest(self, request: AttestationRequest) -> AttestedIdentity:
        """Relay between plugin and agent until the plugin has decided."""
        headers = ((_CLIENT_IP, _address(request.source)), (_FORWARDED_HOST, ""))
        async with self._link.bidi(_ATTEST, server_pb.AttestResponse, headers) as call:
            return await self._relay(call, request)

    async def _relay(
        self, call: LinkBidi[server_pb.AttestResponse], request: AttestationRequest
    ) -> AttestedIdentity:
        await call.send(server_pb.AttestRequest(payload=request.payload))
        for _ in range(_MAX_ROUNDS):
            answer = await call.receive()
            step = None if answer is None else answer.WhichOneof("response")
            if answer is None or step is None:
                break
            if step == "agent_attributes":
                return self._identity(answer.agent_attributes)
            if len(answer.challenge) > _MAX_MESSAGE_BYTES:
                self._link.refuse(f"a challenge of {len(answer.challenge)} bytes")
            response = await request.challenge(answer.challenge)
            await call.send(server_pb.AttestRequest(challenge_response=response))
        return self._link.refuse(f"no agent attributes, or more than {_MAX_ROUNDS} challenges")

    def _identity(self, message: server_pb.AgentAttributes) -> AttestedIdentity:
        values = self._link.bounded("selectors", message.selector_values, MAX_SELECTORS)
        with self._link.checking("agent attributes"):
            for value in values:
                Selector(self._link.name, value)
            identity = SpiffeId.parse(message.spiffe_id)
        return AttestedIdentity(identity, list(values), message.can_reattest)


class AgentService:
    """The gRPC service over an agent half."""

    def __init__(self, plugin: AgentNodeAttestor) -> None:
        self._plugin = plugin

    async def aid_attestation(
        self, requests: AsyncIterator[agent_pb.Challenge], call: Call
    ) -> AsyncIterator[agent_pb.PayloadOrChallengeResponse]:
        """Serve AidAttestation; the plugin speaks first."""

        async def talk(say: Callable[[agent_pb.PayloadOrChallengeResponse], None]) -> None:
            await self._plugin.aid_attestation(_HostExchange(requests, say), None)

        async for message in converse(talk):
            yield message


class _HostExchange:
    """The stream to a host as an agent half sees it."""

    def __init__(
        self,
        requests: AsyncIterator[agent_pb.Challenge],
        say: Callable[[agent_pb.PayloadOrChallengeResponse], None],
    ) -> None:
        self._requests = requests
        self._say = say
        self._sent = False

    @property
    def server_verified(self) -> bool:
        """Tell nothing good of a server that the host alone knows."""
        return False

    async def send(self, data: bytes) -> None:
        """Send the payload, later a challenge response."""
        if self._sent:
            message = agent_pb.PayloadOrChallengeResponse(challenge_response=data)
        else:
            message = agent_pb.PayloadOrChallengeResponse(payload=data)
        self._sent = True
        self._say(message)

    async def receive(self) -> bytes:
        """Return the next challenge."""
        return (await heard(self._requests, "a challenge")).challenge

    async def next_challenge(self) -> bytes | None:
        """Return the next challenge, None when the host has ended."""
        request = await anext(self._requests, None)
        return None if request is None else request.challenge


class ServerService:
    """The gRPC service over a server half."""

    def __init__(self, plugin: ServerNodeAttestor) -> None:
        self._plugin = plugin

    async def attest(
        self, requests: AsyncIterator[server_pb.AttestRequest], call: Call
    ) -> AsyncIterator[server_pb.AttestResponse]:
        """Serve Attest."""
        first = await heard(requests, "a payload")
        if first.WhichOneof("request") != "payload" or not first.payload:
            raise InvalidInputError("the first message must be a payload")
        source = source_of(next(iter(call.header(_CLIENT_IP)), ""))

        async def talk(say: Callable[[server_pb.AttestResponse], None]) -> None:
            async def challenge(data: bytes) -> bytes:
                say(server_pb.AttestResponse(challenge=data))
                answer = await heard(requests, "a challenge response")
                if answer.WhichOneof("request") != "challenge_response":
                    raise InvalidInputError("expected a challenge response")
                return answer.challenge_response

            request = AttestationRequest(first.payload, challenge, None, _admit, source)
            found = await self._plugin.attest(request)
            attributes = server_pb.AgentAttributes(
                spiffe_id=str(found.agent_id),
                selector_values=found.selector_values,
                can_reattest=found.can_reattest,
            )
            say(server_pb.AttestResponse(agent_attributes=attributes))

        async for message in converse(talk):
            yield message


async def _admit(agent_id: SpiffeId) -> None:
    """Let everybody in: whom the host bans is known to the host alone, which looks afterwards."""


def _address(source: str) -> str:
    """Return the IP address an exchange comes from, "" where only its network is known."""
    try:
        return str(ipaddress.ip_address(source))
    except ValueError:
        return ""
