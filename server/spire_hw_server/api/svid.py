"""SVIDs: minted for operators, issued to agents for the entries they may serve."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from spire_hw._pb import server_svid_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.errors import ErrorKind, InvalidInputError, NotFoundError, SpireHwError
from spire_hw.rpc import convert
from spire_hw.rpc.status import item_status
from spire_hw.spiffeid import SpiffeId, TrustDomain, check_workload_id
from spire_hw.x509.dnsname import check_dns_names
from spire_hw.x509.name import EMPTY_NAME
from spire_hw_server.api.authorize import caller_agent, caller_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.rpc.service import Call
    from spire_hw.x509.csr import Csr
    from spire_hw_server.api.audit import Audit
    from spire_hw_server.api.limits import Limits
    from spire_hw_server.bundles import Bundles
    from spire_hw_server.ca.authority import IssuedJwt, IssuedX509, Issuer
    from spire_hw_server.datastore.records import Entry
    from spire_hw_server.entries import EntryCache

# After so many certificates of a batch the event loop looks after everybody else.
_BREATH: Final = 8
_WIT_OFF: Final = "WIT-SVIDs are not supported"


class SvidService:
    """`spire.api.server.svid.v1.SVID`."""

    def __init__(
        self,
        *,
        trust_domain: TrustDomain,
        entries: EntryCache,
        bundles: Bundles,
        issuer: Issuer,
        limits: Limits,
        audit: Audit,
        jwt_enabled: bool = True,
    ) -> None:
        self._trust_domain = trust_domain
        self._entries = entries
        self._bundles = bundles
        self._issuer = issuer
        self._limits = limits
        self._audit = audit
        self._jwt_enabled = jwt_enabled

    async def mint_x509_svid(
        self, request: pb.MintX509SVIDRequest, call: Call
    ) -> pb.MintX509SVIDResponse:
        """Issue what an operator's CSR asks for, within the rules."""
        csr = convert.csr_from_pb(request.csr)
        spiffe_id = _minted_id(csr, self._trust_domain)
        dns_names = _minted_dns_names(csr)
        self._audit.note(call, spiffe_id=str(spiffe_id), dns_name=",".join(dns_names))
        issued = await self._issuer.x509_svid(
            spki=csr.spki,
            spiffe_id=spiffe_id,
            ttl=self._issuer.profile.x509_ttl(request.ttl),
            dns_names=dns_names,
            subject_der=None if csr.subject == EMPTY_NAME else csr.subject,
        )
        call.log.info("X509-SVID minted", spiffe_id=str(spiffe_id), serial_num=str(issued.serial))
        return pb.MintX509SVIDResponse(
            svid=convert.x509_svid_to_pb(issued.chain, spiffe_id, issued.not_after)
        )

    async def mint_jwt_svid(
        self, request: pb.MintJWTSVIDRequest, call: Call
    ) -> pb.MintJWTSVIDResponse:
        """Issue a JWT-SVID to an operator."""
        self._check_jwt_enabled()
        spiffe_id = convert.id_from_pb(request.id)
        check_workload_id(spiffe_id, self._trust_domain)
        self._audit.note(call, spiffe_id=str(spiffe_id), audience=",".join(request.audience))
        issued = await self._issuer.jwt_svid(
            spiffe_id=spiffe_id,
            audience=_audience(request.audience),
            ttl=self._issuer.profile.jwt_ttl(request.ttl),
        )
        return pb.MintJWTSVIDResponse(svid=_jwt_message(issued, spiffe_id))

    async def mint_wit_svid(
        self, request: pb.MintWITSVIDRequest, call: Call
    ) -> pb.MintWITSVIDResponse:
        """Refuse: WIT-SVIDs are not there."""
        del request, call
        raise SpireHwError(_WIT_OFF, kind=ErrorKind.UNIMPLEMENTED)

    async def batch_new_x509_svid(
        self, request: pb.BatchNewX509SVIDRequest, call: Call
    ) -> pb.BatchNewX509SVIDResponse:
        """Issue X509-SVIDs for entries of the calling agent; each item has its own status."""
        count = len(request.params)
        if not count:
            raise InvalidInputError("missing parameters")
        await self._limits.sign_x509(call, count)
        authorized = self._entries.authorized(caller_agent(call))
        response = pb.BatchNewX509SVIDResponse()
        add = response.results.add
        for number, params in enumerate(request.params, 1):
            result = add()
            error: SpireHwError | None = None
            try:
                entry, issued = await self._new_x509(params, authorized)
            except SpireHwError as e:
                error = e
            else:
                _write_x509(result.svid, issued, entry.spiffe_id, entry.hint)
            _set_status(result.status, error)
            if self._audit.enabled or error is not None:
                self._report(call, params.entry_id, error)
            if number % _BREATH == 0:
                await asyncio.sleep(0)
        return response

    async def _new_x509(
        self, params: pb.NewX509SVIDParams, authorized: Mapping[str, Entry]
    ) -> tuple[Entry, IssuedX509]:
        if not params.entry_id:
            raise InvalidInputError("missing entry ID")
        if not params.csr:
            raise InvalidInputError("missing CSR")
        entry = _authorized_entry(authorized, params.entry_id)
        csr = convert.csr_from_pb(params.csr)
        issued = await self._issuer.x509_svid(
            spki=csr.spki,
            spiffe_id=entry.spiffe_id,
            ttl=self._issuer.profile.x509_ttl(entry.x509_svid_ttl_s),
            dns_names=entry.dns_names,
        )
        return entry, issued

    def _report(self, call: Call, entry_id: str, error: SpireHwError | None) -> None:
        self._audit.item(call, error, registration_id=entry_id)
        if error is not None:
            call.log.warning("X509-SVID not issued", registration_id=entry_id, error=error.message)

    async def new_jwt_svid(
        self, request: pb.NewJWTSVIDRequest, call: Call
    ) -> pb.NewJWTSVIDResponse:
        """Issue a JWT-SVID for an entry of the calling agent."""
        self._check_jwt_enabled()
        await self._limits.sign_jwt(call)
        if not request.entry_id:
            raise InvalidInputError("missing entry ID")
        audience = _audience(request.audience)
        self._audit.note(call, registration_id=request.entry_id, audience=",".join(audience))
        authorized = self._entries.authorized(caller_agent(call))
        entry = _authorized_entry(authorized, request.entry_id)
        issued = await self._issuer.jwt_svid(
            spiffe_id=entry.spiffe_id,
            audience=audience,
            ttl=self._issuer.profile.jwt_ttl(entry.jwt_svid_ttl_s),
            include_jti=entry.jwt_svid_include_jti,
        )
        return pb.NewJWTSVIDResponse(svid=_jwt_message(issued, entry.spiffe_id, entry.hint))

    async def batch_new_wit_svid(
        self, request: pb.BatchNewWITSVIDRequest, call: Call
    ) -> pb.BatchNewWITSVIDResponse:
        """Refuse: WIT-SVIDs are not there."""
        del request, call
        raise SpireHwError(_WIT_OFF, kind=ErrorKind.UNIMPLEMENTED)

    async def new_downstream_x509_ca(
        self, request: pb.NewDownstreamX509CARequest, call: Call
    ) -> pb.NewDownstreamX509CAResponse:
        """Issue the CA certificate of a server below this one."""
        await self._limits.sign_x509(call)
        csr = convert.csr_from_pb(request.csr)
        entries = caller_of(call).entries
        if not entries:
            raise SpireHwError(f"{call.method} was not called by a downstream server")
        ttl = timedelta(seconds=_positive(request.preferred_ttl))
        if not ttl:
            ttl = self._issuer.profile.x509_ttl(entries[0].x509_svid_ttl_s)
        bundle = self._bundles.own
        if not bundle.x509_authorities:
            raise NotFoundError("the server's own bundle is missing")
        issued = await self._issuer.downstream_ca(csr.spki, ttl)
        self._audit.note(call, expires_at=int(issued.not_after.timestamp()))
        return pb.NewDownstreamX509CAResponse(
            ca_cert_chain=issued.chain, x509_authorities=_roots(bundle)
        )

    def _check_jwt_enabled(self) -> None:
        if not self._jwt_enabled:
            raise SpireHwError("JWT functionality is disabled", kind=ErrorKind.UNIMPLEMENTED)


def _roots(bundle: Bundle) -> list[bytes]:
    return [root.der for root in bundle.x509_authorities]


def _positive(seconds: int) -> int:
    if seconds < 0:
        raise InvalidInputError("ttl is negative")
    return seconds


def _minted_id(csr: Csr, trust_domain: TrustDomain) -> SpiffeId:
    if len(csr.uris) != 1:
        raise InvalidInputError(f"CSR must have exactly one URI SAN, it has {len(csr.uris)}")
    spiffe_id = SpiffeId.parse(csr.uris[0])
    check_workload_id(spiffe_id, trust_domain)
    return spiffe_id


def _minted_dns_names(csr: Csr) -> tuple[str, ...]:
    names = check_dns_names(csr.dns_names)
    for wildcard in (name for name in names if name.startswith("*.")):
        for name in names:
            if name != wildcard and name.partition(".")[2] == wildcard[2:]:
                raise InvalidInputError(f"DNS name {name} overlaps with {wildcard}")
    return names


def _audience(values: Iterable[str]) -> list[str]:
    audience = [value for value in values if value]
    if not audience:
        raise InvalidInputError("at least one audience is required")
    return audience


def _authorized_entry(authorized: Mapping[str, Entry], entry_id: str) -> Entry:
    entry = authorized.get(entry_id)
    if entry is None:
        raise NotFoundError("entry not found or not authorized")
    return entry


def _set_status(status: types_pb2.Status, error: SpireHwError | None) -> None:
    if error is None:
        status.message = "OK"
    else:
        status.CopyFrom(item_status(error))


def _write_x509(
    message: types_pb2.X509SVID, issued: IssuedX509, spiffe_id: SpiffeId, hint: str
) -> None:
    message.cert_chain.extend(issued.chain)
    message.id.trust_domain = spiffe_id.trust_domain.name
    message.id.path = spiffe_id.path
    message.expires_at = int(issued.not_after.timestamp())
    message.hint = hint


def _jwt_message(issued: IssuedJwt, spiffe_id: SpiffeId, hint: str = "") -> types_pb2.JWTSVID:
    return convert.jwt_svid_to_pb(
        issued.token, spiffe_id, issued.issued_at, issued.expires_at, hint
    )
