"""The Workload API: SVIDs and bundles for whoever is at the other end of the socket.

Source: SPIFFE Workload API, sections 4 to 6. The caller is attested once per call from its socket;
nothing in a request says who it is. Answers come from memory: no network, disk or device here,
but for a JWT-SVID that is not cached.
"""

from __future__ import annotations

import json
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.struct_pb2 import Struct

from spire_hw._pb import workload_pb2
from spire_hw.bundle.document import encode_jwks
from spire_hw.errors import (
    DeniedError,
    ErrorKind,
    InvalidInputError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.logsample import Sampler
from spire_hw.rotation import should_rotate
from spire_hw.spiffeid import SpiffeId
from spire_hw.svid.jwtsvid import verify_jwt_svid
from spire_hw.transport.peer import UnixPeer
from spire_hw_agent.entry import AgentEntry, JwtToken

if TYPE_CHECKING:
    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.rpc.service import Call
    from spire_hw.selector import Selector
    from spire_hw.spiffeid import TrustDomain
    from spire_hw.transport.peer import CallerProcess
    from spire_hw_agent.cache import Cache, WorkloadUpdate
    from spire_hw_agent.workload.attest import Attestors

NewJwtSvid = Callable[[AgentEntry, Sequence[str]], Awaitable[JwtToken]]

# Claims every JWT-SVID may carry; others of foreign tokens are filtered (spiffe-rules 31).
_OWN_CLAIMS = frozenset({"sub", "aud", "exp"})
_MAX_AUDIENCES = 64
_MAX_AUDIENCE_BYTES = 8 << 10  # leaves room in the 16 KiB a token may have
_LEEWAY = timedelta(seconds=30)


class WorkloadApi:
    """`SpiffeWorkloadAPI`, methods in proto order.

    Args:
        check: raises why the agent cannot answer anybody now.
        new_jwt_svid: asks the server for one token.
        open_bundles: serve the own bundle to callers without an identity too.
    """

    def __init__(
        self,
        cache: Cache,
        attestors: Attestors,
        *,
        clock: Clock,
        check: Callable[[], None],
        new_jwt_svid: NewJwtSvid,
        open_bundles: bool = False,
        foreign_claims: Collection[str] = (),
    ) -> None:
        self._cache = cache
        self._attestors = attestors
        self._clock = clock
        self._refusals = Sampler(clock)
        self._check = check
        self._new_jwt_svid = new_jwt_svid
        self._open_bundles = open_bundles
        self._foreign_claims = _OWN_CLAIMS | frozenset(foreign_claims)

    async def fetch_x509_svid(
        self, request: workload_pb2.X509SVIDRequest, call: Call
    ) -> AsyncIterator[bytes]:
        """Stream the caller's X509-SVIDs, keys and bundles."""
        self._cache.expire(self._clock.now())
        last: bytes | None = None
        async with aclosing(self._updates(call)) as updates:
            async for update in updates:
                if not update.granted:
                    raise self._refused(call)
                if update.identities is None:
                    continue
                answer = _encoded(update, "x509_svid", _x509_svid_response)
                if answer != last:
                    last = answer
                    yield answer

    async def fetch_x509_bundles(
        self, request: workload_pb2.X509BundlesRequest, call: Call
    ) -> AsyncIterator[bytes]:
        """Stream the X.509 bundles the caller may use."""
        async for answer in self._bundle_answers(call, "x509_bundles", _x509_bundles_response):
            yield answer

    async def fetch_jwt_svid(
        self, request: workload_pb2.JWTSVIDRequest, call: Call
    ) -> workload_pb2.JWTSVIDResponse:
        """Return JWT-SVIDs for the asked audiences.

        Raises:
            InvalidInputError: no audience, or spiffe_id is not an ID.
            DeniedError: the caller has no (such) identity.
            UnavailableError: the server cannot be asked.
        """
        audience = [a for a in request.audience if a]
        if not audience:
            raise InvalidInputError("audience must be specified")
        if len(audience) > _MAX_AUDIENCES:
            raise InvalidInputError(f"at most {_MAX_AUDIENCES} audiences can be asked for")
        if sum(len(a.encode()) for a in audience) > _MAX_AUDIENCE_BYTES:
            raise InvalidInputError(f"audiences are longer than {_MAX_AUDIENCE_BYTES} bytes in all")
        wanted = SpiffeId.parse(request.spiffe_id) if request.spiffe_id else None
        _, selectors = await self._caller(call)
        entries = [e for e in self._cache.matching(selectors) if wanted in {None, e.spiffe_id}]
        if not entries:
            raise self._refused(call)
        response = workload_pb2.JWTSVIDResponse()
        for entry in entries:
            token = await self._token(entry, audience)
            response.svids.add(spiffe_id=str(entry.spiffe_id), svid=token, hint=entry.hint)
        return response

    async def fetch_jwt_bundles(
        self, request: workload_pb2.JWTBundlesRequest, call: Call
    ) -> AsyncIterator[bytes]:
        """Stream the JWT key sets the caller may use."""
        async for answer in self._bundle_answers(call, "jwt_bundles", _jwt_bundles_response):
            yield answer

    async def validate_jwt_svid(
        self, request: workload_pb2.ValidateJWTSVIDRequest, call: Call
    ) -> workload_pb2.ValidateJWTSVIDResponse:
        """Check a JWT-SVID for the caller.

        Raises:
            InvalidInputError: audience or token missing, or the token does not hold.
        """
        if not request.audience:
            raise InvalidInputError("audience must be specified")
        if not request.svid:
            raise InvalidInputError("svid must be specified")
        _, selectors = await self._caller(call)
        bundles = self._bundles_for(selectors, call)
        svid = verify_jwt_svid(
            request.svid,
            audience=request.audience,
            bundles=bundles,
            at=self._clock.now(),
            leeway=_LEEWAY,
        )
        claims = dict(svid.claims)
        if svid.spiffe_id.trust_domain != self._cache.bundle.trust_domain:
            claims = {k: v for k, v in claims.items() if k in self._foreign_claims}
        claims["aud"] = list(svid.audience)
        return workload_pb2.ValidateJWTSVIDResponse(
            spiffe_id=str(svid.spiffe_id), claims=_struct(claims)
        )

    def fetch_wit_svid(
        self, request: workload_pb2.WITSVIDRequest, call: Call
    ) -> AsyncIterator[bytes]:
        """Refuse: WIT-SVIDs are not served."""
        raise SpireHwError("WIT-SVIDs are not served", kind=ErrorKind.UNIMPLEMENTED)

    def fetch_wit_bundles(
        self, request: workload_pb2.WITBundlesRequest, call: Call
    ) -> AsyncIterator[bytes]:
        """Refuse: WIT-SVIDs are not served."""
        raise SpireHwError("WIT-SVIDs are not served", kind=ErrorKind.UNIMPLEMENTED)

    # -- who is calling, and what for ------------------------------------------

    async def _caller(self, call: Call) -> tuple[CallerProcess, frozenset[Selector]]:
        self._check()
        if not isinstance(call.peer, UnixPeer):
            raise SpireHwError("caller is not local", kind=ErrorKind.UNAUTHENTICATED)
        process = call.peer.process
        return process, await self._attestors.attest(process)

    def _refused(self, call: Call) -> DeniedError:
        """Return the refusal of a caller nothing is registered for; some of them are logged."""
        uid = call.peer.process.uid if isinstance(call.peer, UnixPeer) else None
        left_out = self._refusals.admit(uid)
        if left_out is not None:
            call.log.error("No identity issued", registered=False, left_out=left_out)
        return DeniedError("no identity issued")

    async def _updates(self, call: Call) -> AsyncGenerator[WorkloadUpdate, None]:
        """Yield every state of what the caller may have, the first at once."""
        process, selectors = await self._caller(call)
        with self._cache.subscribe(selectors) as watch:
            async for update in watch:
                self._check()
                if not process.alive():
                    raise SpireHwError(
                        "the calling process has ended", kind=ErrorKind.UNAUTHENTICATED
                    )
                yield update

    async def _bundle_answers(
        self, call: Call, name: str, build: Callable[[WorkloadUpdate], bytes]
    ) -> AsyncIterator[bytes]:
        last: bytes | None = None
        async with aclosing(self._updates(call)) as updates:
            async for update in updates:
                # Bundles need no SVID: the matching entries alone give the right to them.
                if not update.granted and not self._open_bundles:
                    raise self._refused(call)
                answer = _encoded(update, name, build)
                if answer != last:
                    last = answer
                    yield answer

    def _bundles_for(self, selectors: frozenset[Selector], call: Call) -> dict[TrustDomain, Bundle]:
        entries = self._cache.matching(selectors)
        if not entries and not self._open_bundles:
            raise self._refused(call)
        own = self._cache.bundle
        return {own.trust_domain: own, **self._cache.federated_of(entries)}

    async def _token(self, entry: AgentEntry, audience: Sequence[str]) -> str:
        now, tokens = self._clock.now(), self._cache.tokens
        cached = None if entry.jwt_jti else tokens.get(entry, audience, now)
        if cached is not None and self._is_withdrawn(cached):
            cached = None
        if cached is not None and not should_rotate(now, cached.issued_at, cached.expires_at):
            return cached.token
        try:
            fresh = await self._new_jwt_svid(entry, audience)
        except SpireHwError as e:
            if cached is not None:
                return cached.token
            raise UnavailableError(f"JWT-SVID cannot be fetched: {e.message}") from e
        if self._cache.entries.get(entry.entry_id) != entry:
            raise UnavailableError("the identity changed while its JWT-SVID was being issued")
        if not entry.jwt_jti:
            tokens.put(entry, audience, fresh)
        return fresh.token

    def _is_withdrawn(self, token: JwtToken) -> bool:
        authority = self._cache.bundle.jwt_key(token.kid)
        return authority is not None and authority.tainted


def _encoded(update: WorkloadUpdate, name: str, build: Callable[[WorkloadUpdate], bytes]) -> bytes:
    answer = update.encoded.get(name)
    if answer is None:
        answer = update.encoded[name] = build(update)
    return answer


def _x509_svid_response(update: WorkloadUpdate) -> bytes:
    bundle = _der(update.bundle)
    response = workload_pb2.X509SVIDResponse(
        svids=[
            workload_pb2.X509SVID(
                spiffe_id=str(i.svid.spiffe_id),
                x509_svid=b"".join(i.svid.chain),
                x509_svid_key=i.svid.private_key,
                bundle=bundle,
                hint=i.entry.hint,
            )
            for i in update.identities or ()
        ],
        federated_bundles={str(td.id): _der(b) for td, b in update.federated.items()},
    )
    return response.SerializeToString(deterministic=True)


def _x509_bundles_response(update: WorkloadUpdate) -> bytes:
    response = workload_pb2.X509BundlesResponse(
        bundles={str(b.trust_domain.id): _der(b) for b in _all(update)}
    )
    return response.SerializeToString(deterministic=True)


def _jwt_bundles_response(update: WorkloadUpdate) -> bytes:
    response = workload_pb2.JWTBundlesResponse(
        bundles={str(b.trust_domain.id): encode_jwks(b) for b in _all(update)}
    )
    return response.SerializeToString(deterministic=True)


def _all(update: WorkloadUpdate) -> list[Bundle]:
    return [update.bundle, *update.federated.values()]


def _der(bundle: Bundle) -> bytes:
    return b"".join(root.der for root in bundle.x509_authorities)


def _struct(claims: Mapping[str, Any]) -> Struct:
    try:
        # Through JSON: a Struct holds what JSON does, numbers as doubles.
        return ParseDict(json.loads(json.dumps(claims)), Struct())
    except (ParseError, TypeError, ValueError, RecursionError) as e:
        raise InvalidInputError("claims of the token cannot be represented") from e
