"""Typed calls to the server; the only place of the agent that knows its wire messages.

One connection at a time: without an identity for bootstrap and attestation, with the agent's SVID
afterwards. The server is known by its SPIFFE ID alone, never by host name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.rpc.client import Channel, connect
from spire_hw.rpc.convert import bundle_from_proto, selector_from_proto, spiffe_id_from_proto
from spire_hw.rpc.status import item_error
from spire_hw.spiffeid import SpiffeId, TrustDomain, server_id
from spire_hw.transport.dialer import Dialer
from spire_hw_agent.cache import AgentEntry, JwtToken

if TYPE_CHECKING:
    from spire_hw.bundle.bundle import Bundle
    from spire_hw.log import Logger
    from spire_hw.plugin.nodeattestor import AgentExchange
    from spire_hw.transport.front import TlsIdentity

_TIMEOUT_S = 30.0
_ATTEST_TIMEOUT_S = 90.0
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
        log: Logger,
    ) -> None:
        self._address = address
        self._port = port
        self._trust_domain = trust_domain
        self._bundle = bundle
        self._log = log
        self._dialer: Dialer | None = None
        self._channel: Channel | None = None
        self._lock = asyncio.Lock()
        self._known: dict[str, AgentEntry] = {}

    async def use_identity(self, identity: TlsIdentity | None) -> None:
        """Make later calls with this identity, over a new connection."""
        async with self._lock:
            old_channel, old_dialer = self._channel, self._dialer
            dialer = Dialer(
                self._address,
                self._port,
                server_id=server_id(self._trust_domain),
                bundle=self._bundle,
                identity=identity,
            )
            self._channel = await connect(dialer)
            self._dialer = dialer
        if old_channel is not None:
            await old_channel.close()
        if old_dialer is not None:
            await old_dialer.close()

    async def close(self) -> None:
        """End the connection."""
        if self._channel is not None:
            await self._channel.close()
        if self._dialer is not None:
            await self._dialer.close()

    async def _call(self, path: str, request: Message, response_type: type[M]) -> M:
        try:
            return await self._use().unary(path, request, response_type, timeout_s=_TIMEOUT_S)
        except SpireHwError as e:
            raise self._explained(e) from e

    def _use(self) -> Channel:
        if self._channel is None:
            raise SpireHwError("not connected to the server", kind=ErrorKind.UNAVAILABLE)
        return self._channel

    def _explained(self, error: SpireHwError) -> SpireHwError:
        """Put the reason of a failed dial, which gRPC does not know, into the error."""
        why = self._dialer.last_error if self._dialer is not None else None
        if error.kind is ErrorKind.UNAVAILABLE and why is not None:
            error.args = (f"server {self._address}:{self._port} cannot be reached: {why}",)
            error.message = error.args[0]
        return error

    # -- node attestation and the agent's own SVID ------------------------------

    async def attest(
        self, attestor: str, csr: bytes, drive: Callable[[AgentExchange], Awaitable[None]]
    ) -> IssuedAgentSvid:
        """Run one attestation; `drive` is the attestor's half of it.

        Raises:
            SpireHwError: the server refused, or the attestor failed.
        """
        exchange = _Exchange(attestor, csr)
        answers = self._use().bidi(
            _AGENT + "AttestAgent",
            exchange.requests(),
            server_agent_pb2.AttestAgentResponse,
            timeout_s=_ATTEST_TIMEOUT_S,
        )
        exchange.answers = answers
        try:
            await drive(exchange)
            result = await exchange.result()
        except SpireHwError as e:
            raise self._explained(e) from e
        finally:
            exchange.finish()
            await answers.aclose()
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
        bundle = bundle_from_proto(answer)
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
        bundle = bundle_from_proto(answer)
        if bundle.trust_domain != trust_domain:
            raise SpireHwError(f"asked for the bundle of {trust_domain}, got another")
        return bundle

    # -- entries -------------------------------------------------------------

    async def sync_entries(self) -> list[AgentEntry]:
        """Return all entries of this agent; only those that changed cross the wire.

        Raises:
            SpireHwError: the server is away, or its answer breaks a rule.
        """
        wanted: asyncio.Queue[server_entry_pb2.SyncAuthorizedEntriesRequest | None]
        wanted = asyncio.Queue()
        wanted.put_nowait(server_entry_pb2.SyncAuthorizedEntriesRequest(output_mask=_MASK))
        answers = self._use().bidi(
            _ENTRY + "SyncAuthorizedEntries",
            _drain(wanted),
            server_entry_pb2.SyncAuthorizedEntriesResponse,
            timeout_s=_TIMEOUT_S,
        )
        try:
            return await self._sync(answers, wanted)
        except SpireHwError as e:
            raise self._explained(e) from e
        finally:
            wanted.put_nowait(None)
            await answers.aclose()

    async def _sync(
        self,
        answers: AsyncIterator[server_entry_pb2.SyncAuthorizedEntriesResponse],
        wanted: asyncio.Queue[server_entry_pb2.SyncAuthorizedEntriesRequest | None],
    ) -> list[AgentEntry]:
        entries: dict[str, AgentEntry] = {}
        missing: list[str] = []
        revisions_only = False
        async for answer in answers:
            for e in answer.entries:
                entries[e.id] = _entry(e)
            for r in answer.entry_revisions:
                revisions_only = True
                known = self._known.get(r.id)
                if known and (known.revision, known.created_at) == (
                    r.revision_number,
                    r.created_at,
                ):
                    entries[r.id] = known
                else:
                    missing.append(r.id)
            if answer.more:
                continue
            if not (revisions_only and missing):
                break
            # The server pages its answer; one request names all that is missing.
            wanted.put_nowait(server_entry_pb2.SyncAuthorizedEntriesRequest(ids=missing))
            missing = []
        self._known = entries
        return list(entries.values())

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
        return [
            IssuedSvid(tuple(r.svid.cert_chain), item_error(r.status)) for r in answer.results
        ]

    async def new_jwt_svid(self, entry: AgentEntry, audience: Sequence[str]) -> JwtToken:
        """Get a JWT-SVID for an entry."""
        request = server_svid_pb2.NewJWTSVIDRequest(entry_id=entry.entry_id, audience=audience)
        answer = await self._call(
            _SVID + "NewJWTSVID", request, server_svid_pb2.NewJWTSVIDResponse
        )
        svid = answer.svid
        if spiffe_id_from_proto(svid.id) != entry.spiffe_id:
            raise SpireHwError("server sent a JWT-SVID for another SPIFFE ID")
        return JwtToken(svid.token, _time(svid.issued_at), _time(svid.expires_at))


class _Exchange:
    """The agent's end of one AttestAgent stream."""

    def __init__(self, attestor: str, csr: bytes) -> None:
        self._attestor = attestor
        self._csr = csr
        self._queue: asyncio.Queue[server_agent_pb2.AttestAgentRequest | None] = asyncio.Queue()
        self._sent = False
        self.answers: AsyncIterator[server_agent_pb2.AttestAgentResponse]

    async def send(self, data: bytes) -> None:
        if self._sent:
            self._queue.put_nowait(server_agent_pb2.AttestAgentRequest(challenge_response=data))
            return
        self._sent = True
        self._queue.put_nowait(
            server_agent_pb2.AttestAgentRequest(
                params=server_agent_pb2.AttestAgentRequest.Params(
                    data=types_pb2.AttestationData(type=self._attestor, payload=data),
                    params=server_agent_pb2.AgentX509SVIDParams(csr=self._csr),
                )
            )
        )

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
        try:
            return await anext(self.answers)
        except StopAsyncIteration:
            raise SpireHwError("server ended the attestation without a result") from None

    def finish(self) -> None:
        self._queue.put_nowait(None)

    def requests(self) -> AsyncIterator[server_agent_pb2.AttestAgentRequest]:
        return _drain(self._queue)


async def _drain(queue: asyncio.Queue[M | None]) -> AsyncIterator[M]:
    while (item := await queue.get()) is not None:
        yield item


def _entry(e: types_pb2.Entry) -> AgentEntry:
    if not e.selectors:
        raise SpireHwError(f"server sent entry {e.id!r} without selectors")
    spiffe_id: SpiffeId = spiffe_id_from_proto(e.spiffe_id)
    return AgentEntry(
        entry_id=e.id,
        spiffe_id=spiffe_id,
        selectors=frozenset(selector_from_proto(s) for s in e.selectors),
        federates_with=tuple(TrustDomain.parse(t) for t in e.federates_with),
        hint=e.hint,
        revision=e.revision_number,
        created_at=e.created_at,
        prefetch=not e.additional_attributes.disable_x509_svid_prefetch,
        jwt_jti=e.additional_attributes.jwt_svid_include_jti,
    )


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
