"""Typed calls to the server.

One lasting connection with the agent's SVID; each attestation has a short one of its own without.
The server is known by its SPIFFE ID alone, never by host name. What it answers is checked for form
here: a page without end, entries nobody asked for or a token for somebody else go no further.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import Message

from spire_hw._pb import (
    hw_posture_pb2,
    server_agent_pb2,
    server_bundle_pb2,
    server_entry_pb2,
    server_svid_pb2,
    types_pb2,
)
from spire_hw.aio.watch import Watch
from spire_hw.errors import NotReadyError, SpireHwError, UnavailableError
from spire_hw.rpc.client import Channel, connect
from spire_hw.rpc.status import item_error
from spire_hw.spiffeid import TrustDomain, server_id
from spire_hw.transport.dialer import Dialer
from spire_hw.x509.chain import UnknownAuthorityError
from spire_hw_agent.upstream.answers import read_bundle, read_token
from spire_hw_agent.upstream.attestation import Exchange
from spire_hw_agent.upstream.connection import Connection
from spire_hw_agent.upstream.entries import EntryBook
from spire_hw_agent.upstream.posture import HEARTBEAT, HeartbeatStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.nodeattestor import AgentExchange
    from spire_hw.transport.tls import TlsIdentity
    from spire_hw_agent.entry import AgentEntry, JwtToken
    from spire_hw_agent.trust import Trust

_TIMEOUT_S = 30.0
# More than a server grants the slowest TPM.
_ATTEST_TIMEOUT_S = 150.0
_AGENT = "/spire.api.server.agent.v1.Agent/"
_BUNDLE = "/spire.api.server.bundle.v1.Bundle/"
_ENTRY = "/spire.api.server.entry.v1.Entry/"
_SVID = "/spire.api.server.svid.v1.SVID/"

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

    Attributes:
        version: counts the identities used so far; tells which one a refusal was about.
        identity: the one in use, None while there is none.
    """

    def __init__(
        self,
        address: str,
        port: int,
        trust_domain: TrustDomain,
        trust: Trust,
        *,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._address = address
        self._port = port
        self._trust_domain = trust_domain
        self._trust = trust
        self._clock = clock
        self._log = log
        self._connection: Connection | None = None
        self._entries = EntryBook(trust_domain, log)
        self.version = 0
        self.identity: Watch[TlsIdentity | None] = Watch(None)

    def tls_identity(self) -> TlsIdentity:
        """Return what the agent shows now.

        Raises:
            NotReadyError: it has no SVID.
        """
        if self.identity.value is None:
            raise NotReadyError("the agent has no SVID yet")
        return self.identity.value

    async def use_identity(self, identity: TlsIdentity | None) -> None:
        """Make later calls with this identity, over a new connection; None: make no more calls."""
        old, self._connection = self._connection, None
        self.version += 1
        if identity is not None:
            self._connection = Connection(await self._dial(identity))
        self.identity.set(identity)  # a heartbeat stream on the old connection ends now
        if old is not None:
            await old.retire()

    async def _dial(self, identity: TlsIdentity) -> Channel:
        known = self._trust.bundle
        if known is None:
            raise UnavailableError("no trust bundle yet")
        return await connect(self._dialer(lambda: self._trust.bundle or known, identity))

    def _dialer(
        self, bundle: Callable[[], Bundle] | None, identity: TlsIdentity | None = None
    ) -> Dialer:
        return Dialer(
            self._address,
            self._port,
            server_id=server_id(self._trust_domain),
            bundle=bundle,
            identity=identity,
            clock=self._clock,
            log=self._log,
        )

    async def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            await self._connection.channel.close()

    async def _call(self, path: str, request: Message, response_type: type[M]) -> M:
        with self._use() as channel:
            return await channel.unary(path, request, response_type, timeout_s=_TIMEOUT_S)

    @contextmanager
    def _use(self) -> Iterator[Channel]:
        if self._connection is None:
            raise UnavailableError("the agent has no identity at the moment, it is attesting")
        with self._connection.use() as channel, self._noting():
            yield channel

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Tell `Trust` whether the server could be verified by the bundle."""
        try:
            yield
        except SpireHwError as e:
            if isinstance(e.__cause__, UnknownAuthorityError):
                self._trust.distrust()
            raise
        self._trust.trust_again()

    # -- node attestation and the agent's own SVID ------------------------------

    async def attest(
        self,
        attestor: str,
        csr: bytes,
        drive: Callable[[AgentExchange], Awaitable[None]],
        trusted: Bundle | None,
    ) -> tuple[IssuedAgentSvid, Bundle]:
        """Run one attestation on a connection of its own, without an identity.

        Args:
            attestor: name of the node attestor.
            csr: DER.
            drive: the attestor's half of it.
            trusted: whom to verify the server by; None trusts whatever chain it shows.

        Returns:
            What was issued, and the bundle the server publishes.

        Raises:
            SpireHwError: the server refused, or the attestor failed.
        """
        dialer = self._dialer(None if trusted is None else lambda: trusted)
        async with await connect(dialer) as channel:
            with self._noting():
                async with AsyncExitStack() as stack:
                    stream = channel.bidi(
                        _AGENT + "AttestAgent",
                        server_agent_pb2.AttestAgentResponse,
                        timeout_s=_ATTEST_TIMEOUT_S,
                    )
                    exchange = Exchange(
                        attestor,
                        csr,
                        lambda: stack.enter_async_context(stream),
                        server_verified=trusted is not None,
                    )
                    await drive(exchange)
                    result = await exchange.result()
                bundle = await self._get_bundle(channel)
        return IssuedAgentSvid(tuple(result.svid.cert_chain), result.reattestable), bundle

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

    # -- heartbeats ------------------------------------------------------------

    @asynccontextmanager
    async def heartbeat(self) -> AsyncIterator[HeartbeatStream]:
        """Open a heartbeat stream; errors as in any call, UNIMPLEMENTED from servers without it."""
        with self._use() as channel:
            async with channel.bidi(HEARTBEAT, hw_posture_pb2.HeartbeatResponse) as call:
                yield HeartbeatStream(call)

    # -- bundles -------------------------------------------------------------

    async def get_bundle(self) -> Bundle:
        """Return the own trust domain's bundle.

        Raises:
            SpireHwError: INTERNAL, the server sent another trust domain's.
        """
        with self._use() as channel:
            return await self._get_bundle(channel)

    async def _get_bundle(self, channel: Channel) -> Bundle:
        request = server_bundle_pb2.GetBundleRequest()
        answer = await channel.unary(
            _BUNDLE + "GetBundle", request, types_pb2.Bundle, timeout_s=_TIMEOUT_S
        )
        return read_bundle(answer, self._trust_domain)

    async def get_federated_bundle(self, trust_domain: TrustDomain) -> Bundle:
        """Return a foreign bundle.

        Raises:
            NotFoundError: the server has none.
        """
        request = server_bundle_pb2.GetFederatedBundleRequest(trust_domain=trust_domain.name)
        answer = await self._call(_BUNDLE + "GetFederatedBundle", request, types_pb2.Bundle)
        return read_bundle(answer, trust_domain)

    # -- entries -------------------------------------------------------------

    async def sync_entries(self) -> list[AgentEntry]:
        """Return all entries of this agent; see `EntryBook.synchronise`."""
        with self._use() as channel:
            async with channel.bidi(
                _ENTRY + "SyncAuthorizedEntries",
                server_entry_pb2.SyncAuthorizedEntriesResponse,
                timeout_s=_TIMEOUT_S,
            ) as stream:
                return await self._entries.synchronise(stream)

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
        return read_token(answer.svid, entry.spiffe_id, audience)
