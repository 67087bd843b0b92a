"""Typed calls to the server; the only place of the agent that knows its wire messages.

One lasting connection with the agent's SVID; each attestation has a short one of its own without.
The server is known by its SPIFFE ID alone, never by host name. What it answers is checked for form
here: a page without end, entries nobody asked for or a token for somebody else go no further.
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
from spire_hw.errors import (
    InvalidInputError,
    SpireHwError,
    UnavailableError,
    VerificationError,
)
from spire_hw.jose.jws import parse_compact
from spire_hw.rpc.client import Bidi, Channel, connect
from spire_hw.rpc.convert import bundle_from_pb, id_from_pb, selector_from_pb
from spire_hw.rpc.status import item_error
from spire_hw.spiffeid import SpiffeId, TrustDomain, server_id
from spire_hw.svid.jwtsvid import parse_issued_jwt_svid
from spire_hw.transport.dialer import Dialer
from spire_hw.x509.chain import UnknownAuthorityError
from spire_hw_agent.entry import AgentEntry, JwtToken

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.nodeattestor import AgentExchange
    from spire_hw.transport.tls import TlsIdentity
    from spire_hw_agent.trust import Trust

_TIMEOUT_S = 30.0
_ATTEST_TIMEOUT_S = 90.0
_GRACE_S = 5.0
_PAGE = 500
_MAX_ENTRIES = 100_000
_MAX_HINT_BYTES = 1024
_EPOCH = datetime.fromtimestamp(0, UTC)
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

    Attributes:
        version: counts the identities used so far; tells which one a refusal was about.
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
        self._connection: _Connection | None = None
        self._known: dict[str, AgentEntry] = {}
        self._passed_over: dict[str, tuple[int, int]] = {}
        self.version = 0

    async def use_identity(self, identity: TlsIdentity | None) -> None:
        """Make later calls with this identity, over a new connection; None: make no more calls."""
        old, self._connection = self._connection, None
        self.version += 1
        if identity is not None:
            self._connection = _Connection(await self._dial(identity))
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
                async with channel.bidi(
                    _AGENT + "AttestAgent",
                    server_agent_pb2.AttestAgentResponse,
                    timeout_s=_ATTEST_TIMEOUT_S,
                ) as stream:
                    exchange = _Exchange(attestor, csr, stream)
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
        bundle = _bundle(answer)
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
        bundle = _bundle(answer)
        if bundle.trust_domain != trust_domain:
            raise SpireHwError(f"asked for the bundle of {trust_domain}, got another")
        return bundle

    # -- entries -------------------------------------------------------------

    async def sync_entries(self) -> list[AgentEntry]:
        """Return all entries of this agent; only those that changed cross the wire.

        Raises:
            SpireHwError: the server is away, or its answer breaks a rule.
        """
        with self._use() as channel:
            async with channel.bidi(
                _ENTRY + "SyncAuthorizedEntries",
                server_entry_pb2.SyncAuthorizedEntriesResponse,
                timeout_s=_TIMEOUT_S,
            ) as stream:
                await stream.send(server_entry_pb2.SyncAuthorizedEntriesRequest(output_mask=_MASK))
                pages = _Pages(stream)
                await pages.collect()
                entries, changed = self._sort_out(pages)
                for start in range(0, len(changed), _PAGE):
                    ids = changed[start : start + _PAGE]
                    await stream.send(server_entry_pb2.SyncAuthorizedEntriesRequest(ids=ids))
                    asked = _Pages(stream, wanted=frozenset(ids))
                    await asked.collect()
                    entries |= self._parse(asked.entries)
                await stream.done_sending()
        seen = pages.entries.keys() | pages.revisions.keys()
        self._passed_over = {i: r for i, r in self._passed_over.items() if i in seen}
        self._known = entries
        return list(entries.values())

    def _sort_out(self, pages: _Pages) -> tuple[dict[str, AgentEntry], list[str]]:
        """Return the entries at hand, and the ids of those that have to be asked for."""
        entries = self._parse(pages.entries)
        changed: list[str] = []
        for r in pages.revisions.values():
            known = self._known.get(r.id)
            if known and (known.revision, known.created_at) == (r.revision_number, r.created_at):
                entries[r.id] = known
            elif self._passed_over.get(r.id) != (r.revision_number, r.created_at):
                changed.append(r.id)
        return entries, changed

    def _parse(self, messages: Mapping[str, types_pb2.Entry]) -> dict[str, AgentEntry]:
        """Return the entries that can be served; one that cannot must not stop the others."""
        entries: dict[str, AgentEntry] = {}
        for message in messages.values():
            revision = (message.revision_number, message.created_at)
            try:
                entries[message.id] = _entry(message, self._trust_domain)
            except InvalidInputError as e:
                if self._passed_over.get(message.id) != revision:
                    self._log.error(
                        "Entry cannot be served, it is passed over",
                        entry_id=message.id,
                        error=e.message,
                    )
                self._passed_over[message.id] = revision
            else:
                self._passed_over.pop(message.id, None)
        return entries

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
        return _token(answer.svid, entry.spiffe_id, audience)


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
        self._result: server_agent_pb2.AttestAgentResponse | None = None

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
        challenge = await self.next_challenge()
        if challenge is None:
            raise SpireHwError("server answered a result where a challenge was expected")
        return challenge

    async def next_challenge(self) -> bytes | None:
        if self._result is None:
            answer = await self._next()
            if answer.WhichOneof("step") == "challenge":
                return answer.challenge
            self._result = answer
        return None

    async def result(self) -> server_agent_pb2.AttestAgentResponse.Result:
        answer = await self._next() if self._result is None else self._result
        if answer.WhichOneof("step") != "result":
            raise SpireHwError("server sent a challenge where the result was expected")
        return answer.result

    async def _next(self) -> server_agent_pb2.AttestAgentResponse:
        answer = await self._stream.receive()
        if answer is None:
            raise SpireHwError("server ended the attestation without a result")
        return answer


class _Pages:
    """One answer of a synchronisation in pages, within bounds.

    Args:
        wanted: ids that were asked for; None for the first answer, which may hold any.
    """

    def __init__(
        self,
        stream: Bidi[server_entry_pb2.SyncAuthorizedEntriesResponse],
        wanted: frozenset[str] | None = None,
    ) -> None:
        self._stream = stream
        self._wanted = wanted
        self.entries: dict[str, types_pb2.Entry] = {}
        self.revisions: dict[str, server_entry_pb2.EntryRevision] = {}

    async def collect(self) -> None:
        """Take all pages.

        Raises:
            SpireHwError: INTERNAL, the answer breaks a rule.
        """
        more = True
        while more:
            answer = await self._stream.receive()
            if answer is None:
                raise SpireHwError("server ended the synchronisation early")
            more = answer.more
            if more and not answer.entries and not answer.entry_revisions:
                raise SpireHwError("server sent an empty page and announced another")
            self._take(answer)

    def _take(self, answer: server_entry_pb2.SyncAuthorizedEntriesResponse) -> None:
        if self._wanted is not None and answer.entry_revisions:
            raise SpireHwError("server sent revisions where entries were asked for")
        for e in answer.entries:
            if self._wanted is not None and e.id not in self._wanted:
                raise SpireHwError("server sent an entry that was not asked for")
            self._once(e.id)
            self.entries[e.id] = e
        for r in answer.entry_revisions:
            self._once(r.id)
            self.revisions[r.id] = r

    def _once(self, entry_id: str) -> None:
        if not entry_id or entry_id in self.entries or entry_id in self.revisions:
            raise SpireHwError("server sent an entry twice, or one without an id")
        if len(self.entries) + len(self.revisions) >= _MAX_ENTRIES:
            raise SpireHwError(f"server sent more than {_MAX_ENTRIES} entries")


def _bundle(message: types_pb2.Bundle) -> Bundle:
    try:
        return bundle_from_pb(message)
    except InvalidInputError as e:
        raise SpireHwError(f"server sent a bundle that does not parse: {e.message}") from e


def _entry(e: types_pb2.Entry, trust_domain: TrustDomain) -> AgentEntry:
    if not e.selectors:
        raise InvalidInputError("it has no selectors")
    spiffe_id = id_from_pb(e.spiffe_id)
    if not spiffe_id.is_member_of(trust_domain):
        raise InvalidInputError(f"{spiffe_id} is of another trust domain")
    if len(e.hint.encode()) > _MAX_HINT_BYTES:
        raise InvalidInputError(f"its hint is longer than {_MAX_HINT_BYTES} bytes")
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


def _token(svid: types_pb2.JWTSVID, wanted: SpiffeId, audience: Sequence[str]) -> JwtToken:
    try:
        made = parse_issued_jwt_svid(svid.token)
    except VerificationError as e:
        raise SpireHwError(f"server sent a JWT-SVID that does not parse: {e.message}") from e
    if made.spiffe_id != wanted:
        raise SpireHwError(f"server sent a JWT-SVID for {made.spiffe_id} instead of {wanted}")
    if set(made.audience) != set(audience):
        raise SpireHwError("server sent a JWT-SVID for another audience")
    return JwtToken(
        made.token,
        made.issued_at or _EPOCH,
        made.expires_at,
        parse_compact(made.token).kid,
    )
