"""Typed calls to the server; the only place of the agent that knows its wire messages.

One connection at a time: without an identity for bootstrap and attestation, with the agent's SVID
afterwards. The server is known by its SPIFFE ID alone, never by host name.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import Message

from spire_hw._pb import (
    server_agent_pb2,
    server_bundle_pb2,
    server_entry_pb2,
    server_svid_pb2,
    types_pb2,
)
from spire_hw.errors import SpireHwError, UnavailableError
from spire_hw.rpc.client import Bidi, Channel, connect
from spire_hw.rpc.convert import bundle_from_pb, id_from_pb, selector_from_pb
from spire_hw.rpc.status import item_error
from spire_hw.spiffeid import SpiffeId, TrustDomain, server_id
from spire_hw.transport.dialer import Dialer
from spire_hw_agent.entry import AgentEntry, JwtToken

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.nodeattestor import AgentExchange
    from spire_hw.transport.tls import TlsIdentity

_TIMEOUT_S = 30.0
_ATTEST_TIMEOUT_S = 90.0
_GRACE_S = 5.0
_AGENT = "/spire.api.server.agent.v1.Agent/"
_BUNDLE = "/spire.api.server.bundle.v1.Bundle/"
_ENTRY = "/spire.api.server.entry.v1.Entry/"
_SVID = "/spire.api.server.svid.v1.SVID/"

# Members of an entry the agent works with (the mask of every synchronisation).
_MASK = types_pb2.EntryMask(
    spiffe_id=True,
    selectors=True,
    federates_with=True,
    admin=True,
    downstream=True,
    revision_number=True,
    store_svid=True,
    hint=True,
    created_at=True,
    additional_attributes=True,
)

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class IssuedAgentSvid:
    """What attestation or renewal gave.

    Attributes:
        chain: DER, leaf first.
    """

    chain: tuple[bytes, ...]
    reattestable: bool


@dataclass(frozen=True, slots=True)
class IssuedSvid:
    """One answer of a batch: a chain, or why there is none."""

    chain: tuple[bytes, ...]
    error: SpireHwError | None


class Upstream:
    """The server as this agent sees it.

    Args:
        bundle: the current trust bundle, asked at every dial; None to dial trusting whatever
            chain the server shows (its SPIFFE ID is still demanded).
    """

    def __init__(
        self,
        address: str,
        port: int,
        trust_domain: TrustDomain,
        bundle: Callable[[], Bundle | None],
        *,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._address = address
        self._port = port
        self._trust_domain = trust_domain
        self._bundle = bundle
        self._clock = clock
        self._log = log
        self._connection: _Connection | None = None
        self._known: dict[str, AgentEntry] = {}

    async def use_identity(self, identity: TlsIdentity | None) -> None:
        """Make later calls with this identity, over a new connection."""
        known = self._bundle()
        old = self._connection
        channel = await connect(
            Dialer(
                self._address,
                self._port,
                server_id=server_id(self._trust_domain),
                bundle=None if known is None else lambda: self._bundle() or known,
                identity=identity,
                clock=self._clock,
                log=self._log,
            )
        )
        self._connection = _Connection(channel)
        if old is not None:
            await old.retire()

    async def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            await self._connection.channel.close()

    async def _call(self, path: str, request: Message, response_type: type[M]) -> M:
        with self._use() as channel:
            return await channel.unary(path, request, response_type, timeout_s=_TIMEOUT_S)

    def _use(self) -> AbstractContextManager[Channel]:
        if self._connection is None:
            raise UnavailableError("not connected to the server")
        return self._connection.use()

    # -- node attestation and the agent's own SVID ------------------------------

    async def attest(
        self, attestor: str, csr: bytes, drive: Callable[[AgentExchange], Awaitable[None]]
    ) -> IssuedAgentSvid:
        """Run one attestation; `drive` is the attestor's half of it.

        Raises:
            SpireHwError: the server refused, or the attestor failed.
        """
        with self._use() as channel:
            async with channel.bidi(
                _AGENT + "AttestAgent",
                server_agent_pb2.AttestAgentResponse,
                timeout_s=_ATTEST_TIMEOUT_S,
            ) as stream:
                exchange = _Exchange(attestor, csr, stream)
                await drive(exchange)
                result = await exchange.result()
        return IssuedAgentSvid(tuple(result.svid.cert_chain), result.reattestable)

    async def renew(self, csr: bytes) -> IssuedAgentSvid:
        """Get a new SVID for an agent that does not attest again."""
        request = server_agent_pb2.RenewAgentRequest(
            params=server_agent_pb2.AgentX509SVIDParams(csr=csr)
        )
        answer = await self._call(
            _AGENT + "RenewAgent", request, server_agent_pb2.RenewAgentResponse
        )
        return IssuedAgentSvid(tuple(answer.svid.cert_chain), reattestable=False)

    async def post_status(self, agent_version: str) -> None:
        """Tell the server which version runs here."""
        request = server_agent_pb2.PostStatusRequest(agent_version=agent_version)
        await self._call(_AGENT + "PostStatus", request, server_agent_pb2.PostStatusResponse)

    # -- bundles -------------------------------------------------------------

    async def get_bundle(self) -> Bundle:
        """Return the own trust domain's bundle.

        Raises:
            SpireHwError: INTERNAL, the server sent another trust domain's.
        """
        answer = await self._call(
            _BUNDLE + "GetBundle", server_bundle_pb2.GetBundleRequest(), types_pb2.Bundle
        )
        bundle = bundle_from_pb(answer)
        if bundle.trust_domain != self._trust_domain:
            raise SpireHwError(f"server sent the bundle of {bundle.trust_domain}")
        return bundle

    async def get_federated_bundle(self, trust_domain: TrustDomain) -> Bundle:
        """Return a foreign bundle.

        Raises:
            NotFoundError: the server has none.
        """
        request = server_bundle_pb2.GetFederatedBundleRequest(trust_domain=trust_domain.name)
        answer = await self._call(_BUNDLE + "GetFederatedBundle", request, types_pb2.Bundle)
        bundle = bundle_from_pb(answer)
        if bundle.trust_domain != trust_domain:
            raise SpireHwError(f"asked for the bundle of {trust_domain}, got another")
        return bundle

    # -- entries -------------------------------------------------------------

    async def sync_entries(self) -> list[AgentEntry]:
        """Return all entries of this agent; only those that changed cross the wire.

        Raises:
            SpireHwError: the server is away, or its answer breaks a rule.
        """
        entries: dict[str, AgentEntry] = {}
        with self._use() as channel:
            async with channel.bidi(
                _ENTRY + "SyncAuthorizedEntries",
                server_entry_pb2.SyncAuthorizedEntriesResponse,
                timeout_s=_TIMEOUT_S,
            ) as stream:
                await stream.send(server_entry_pb2.SyncAuthorizedEntriesRequest(output_mask=_MASK))
                changed = await self._collect(stream, entries)
                if changed:
                    await stream.send(server_entry_pb2.SyncAuthorizedEntriesRequest(ids=changed))
                    await self._collect(stream, entries)
                await stream.done_sending()
        self._known = entries
        return list(entries.values())

    async def _collect(
        self,
        stream: Bidi[server_entry_pb2.SyncAuthorizedEntriesResponse],
        entries: dict[str, AgentEntry],
    ) -> list[str]:
        """Take one paged answer; return the ids whose entries have to be asked for."""
        changed: list[str] = []
        while True:
            answer = await stream.receive()
            if answer is None:
                raise SpireHwError("server ended the synchronisation early")
            for e in answer.entries:
                entries[e.id] = _entry(e)
            for r in answer.entry_revisions:
                known = self._known.get(r.id)
                held = (known.revision, known.created_at) if known else None
                if known and held == (r.revision_number, r.created_at):
                    entries[r.id] = known
                else:
                    changed.append(r.id)
            if not answer.more:
                return changed

    # -- SVIDs for workloads ---------------------------------------------------

    async def new_x509_svids(self, requests: Sequence[tuple[str, bytes]]) -> list[IssuedSvid]:
        """Have CSRs signed.

        Args:
            requests: (entry id, DER CSR) pairs.

        Returns:
            One answer for each request, in order.
        """
        message = server_svid_pb2.BatchNewX509SVIDRequest(
            params=[
                server_svid_pb2.NewX509SVIDParams(entry_id=entry_id, csr=csr)
                for entry_id, csr in requests
            ]
        )
        answer = await self._call(
            _SVID + "BatchNewX509SVID", message, server_svid_pb2.BatchNewX509SVIDResponse
        )
        if len(answer.results) != len(requests):
            raise SpireHwError("server answered another number of SVIDs than it was asked for")
        return [IssuedSvid(tuple(r.svid.cert_chain), item_error(r.status)) for r in answer.results]

    async def new_jwt_svid(self, entry: AgentEntry, audience: Sequence[str]) -> JwtToken:
        """Get a JWT-SVID for an entry."""
        request = server_svid_pb2.NewJWTSVIDRequest(entry_id=entry.entry_id, audience=audience)
        answer = await self._call(_SVID + "NewJWTSVID", request, server_svid_pb2.NewJWTSVIDResponse)
        svid = answer.svid
        if id_from_pb(svid.id) != entry.spiffe_id:
            raise SpireHwError("server sent a JWT-SVID for another SPIFFE ID")
        return JwtToken(svid.token, _time(svid.issued_at), _time(svid.expires_at))


class _Connection:
    """A channel that lets the calls on it finish before it goes."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def use(self) -> Iterator[Channel]:
        """Hold the channel for one call."""
        self._calls += 1
        self._idle.clear()
        try:
            yield self.channel
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def retire(self) -> None:
        """Wait a while for the calls in progress, then close."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await self._idle.wait()
        await self.channel.close()


class _Exchange:
    """The agent's end of one AttestAgent stream."""

    def __init__(
        self, attestor: str, csr: bytes, stream: Bidi[server_agent_pb2.AttestAgentResponse]
    ) -> None:
        self._attestor = attestor
        self._csr = csr
        self._stream = stream
        self._sent = False

    async def send(self, data: bytes) -> None:
        message = server_agent_pb2.AttestAgentRequest()
        if self._sent:
            message.challenge_response = data
        else:
            self._sent = True
            message.params.data.type = self._attestor
            message.params.data.payload = data
            message.params.params.csr = self._csr
        await self._stream.send(message)

    async def receive(self) -> bytes:
        answer = await self._next()
        if answer.WhichOneof("step") != "challenge":
            raise SpireHwError("server answered a result where a challenge was expected")
        return answer.challenge

    async def result(self) -> server_agent_pb2.AttestAgentResponse.Result:
        answer = await self._next()
        if answer.WhichOneof("step") != "result":
            raise SpireHwError("server sent a challenge where the result was expected")
        return answer.result

    async def _next(self) -> server_agent_pb2.AttestAgentResponse:
        answer = await self._stream.receive()
        if answer is None:
            raise SpireHwError("server ended the attestation without a result")
        return answer


def _entry(e: types_pb2.Entry) -> AgentEntry:
    if not e.selectors:
        raise SpireHwError(f"server sent entry {e.id!r} without selectors")
    spiffe_id: SpiffeId = id_from_pb(e.spiffe_id)
    return AgentEntry(
        entry_id=e.id,
        spiffe_id=spiffe_id,
        selectors=frozenset(selector_from_pb(s) for s in e.selectors),
        federates_with=tuple(TrustDomain.parse(t) for t in e.federates_with),
        hint=e.hint,
        revision=e.revision_number,
        created_at=e.created_at,
        prefetch=not e.additional_attributes.disable_x509_svid_prefetch,
        jwt_jti=e.additional_attributes.jwt_svid_include_jti,
    )


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
