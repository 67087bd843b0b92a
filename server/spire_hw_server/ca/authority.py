"""Signs: X509-SVIDs, CA certificates and JWT-SVIDs with the authorities that are active.

Who may get what is decided by the callers. A signature that a device or another process made is
verified before it leaves (`spire_hw.x509.scheme.seal` and `spire_hw.jose.jws` do that).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, Final

from spire_hw.errors import (
    ErrorKind,
    InvalidInputError,
    NotReadyError,
    PluginError,
    SpireHwError,
)
from spire_hw.spiffeid import SpiffeId, server_id
from spire_hw.svid.jwtsvid import build_claims, sign_claims
from spire_hw.telemetry.metrics import NO_METRICS
from spire_hw.x509.authority import X509Authority
from spire_hw.x509.issue import issue_ca_certificate, issue_x509_svid, random_serial
from spire_hw.x509.name import svid_subject
from spire_hw_server.ca.compose import Amended, Composers
from spire_hw_server.ca.profile import BACKDATE, Profile, capped, downstream_subject

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from spire_hw.clock import Clock
    from spire_hw.key import Signer
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw.x509.extension import Extension

_DEVICE_KINDS: Final = frozenset(
    {
        ErrorKind.UNAVAILABLE,
        ErrorKind.DEADLINE_EXCEEDED,
        ErrorKind.RESOURCE_EXHAUSTED,
        ErrorKind.FAILED_PRECONDITION,
    }
)
_SIGNED_X509: Final = ("server_ca", "sign", "x509_svid")
_SIGNED_CA: Final = ("server_ca", "sign", "x509_ca_svid")
_SIGNED_JWT: Final = ("server_ca", "sign", "jwt_svid")


class Role(Enum):
    """Whose X509-SVID it is."""

    SERVER = "server"
    AGENT = "agent"
    WORKLOAD = "workload"


@dataclass(frozen=True, slots=True)
class IssuedX509:
    """A certificate that was issued.

    Attributes:
        chain: DER, leaf first, without the root.
        serial: of the leaf.
        not_after: end of the leaf.
    """

    chain: tuple[bytes, ...]
    serial: int
    not_after: datetime


@dataclass(frozen=True, slots=True)
class IssuedCa:
    """A CA certificate that was issued: DER, its authority id, its end."""

    certificate: bytes
    authority_id: str
    not_after: datetime


@dataclass(frozen=True, slots=True)
class IssuedJwt:
    """A token that was issued; the token is a secret."""

    token: str
    issued_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class JwtKey:
    """The JWT authority that signs."""

    kid: str
    signer: Signer
    not_after: datetime


class Issuer:
    """The active authorities and what is signed with them."""

    def __init__(
        self,
        profile: Profile,
        clock: Clock,
        composers: Composers | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self.profile = profile
        self._metrics = metrics
        self._clock = clock
        self._composers = composers or Composers()
        self._server_id = server_id(profile.trust_domain)
        self._x509: X509Authority | None = None
        self._jwt: JwtKey | None = None

    @property
    def x509(self) -> X509Authority:
        """Return the X.509 authority that signs.

        Raises:
            NotReadyError: there is none yet.
        """
        if self._x509 is None:
            raise NotReadyError("no X.509 authority is active yet")
        return self._x509

    @property
    def jwt(self) -> JwtKey:
        """Return the JWT authority that signs.

        Raises:
            NotReadyError: there is none yet.
        """
        if self._jwt is None:
            raise NotReadyError("no JWT authority is active yet")
        return self._jwt

    def use_x509(self, certificate: bytes, chain: tuple[bytes, ...], signer: Signer) -> None:
        """Sign with this X.509 authority from now on.

        Raises:
            InvalidInputError: certificate and key do not fit, or it is no CA certificate.
        """
        self._x509 = X509Authority(certificate, signer, chain)

    def use_jwt(self, kid: str, not_after: datetime, signer: Signer) -> None:
        """Sign with this JWT authority from now on."""
        self._jwt = JwtKey(kid, signer, not_after)

    async def self_signed(self, signer: Signer, now: datetime, ttl: timedelta) -> IssuedCa:
        """Return a new self-signed CA certificate for a key.

        Raises:
            SpireHwError: the signer failed.
        """
        not_after = now + ttl
        amended = await self.ca_subject()
        certificate = await issue_ca_certificate(
            None,
            trust_domain=self.profile.trust_domain,
            not_before=now - BACKDATE,
            not_after=not_after,
            signer=signer,
            subject_der=amended.subject,
            extra_extensions=amended.extensions,
        )
        made = X509Authority(certificate, signer)
        return IssuedCa(certificate, made.authority_id, made.not_after)

    async def ca_subject(self) -> Amended:
        """Return subject and further extensions of this server's CA certificates.

        Raises:
            SpireHwError: a CredentialComposer failed.
        """
        if not self._composers:
            return Amended(self.profile.ca_subject)
        return await self._composers.ca(self.profile.ca_subject)

    async def x509_svid(
        self,
        *,
        spki: bytes,
        spiffe_id: SpiffeId,
        ttl: timedelta,
        dns_names: tuple[str, ...] = (),
        subject_der: bytes | None = None,
        role: Role = Role.WORKLOAD,
    ) -> IssuedX509:
        """Issue an X509-SVID.

        Args:
            spki: DER SubjectPublicKeyInfo of a checked key.
            spiffe_id: whose it is.
            ttl: its life, cut at the end of the authority.
            dns_names: DNS SANs.
            subject_der: DER Name, None for the default.
            role: what CredentialComposers are told it is.

        Raises:
            InvalidInputError: a name that may not be in a certificate.
            SpireHwError: no authority, or it could not sign.
        """
        serial = random_serial()
        try:
            extensions: tuple[Extension, ...] = ()
            if self._composers:
                subject_der = subject_der or svid_subject(dns_names[0] if dns_names else "")
                amended = await self._amended(role, spiffe_id, spki, subject_der, dns_names)
                subject_der, dns_names = amended.subject, amended.dns_names
                extensions = amended.extensions
            authority = self.x509
            now = self._clock.now()
            not_after = capped(_floor(now), ttl, authority.not_after)
            leaf = await issue_x509_svid(
                authority,
                spki=spki,
                spiffe_id=spiffe_id,
                not_before=_floor(now) - BACKDATE,
                not_after=not_after,
                dns_names=dns_names,
                subject_der=subject_der,
                serial=serial,
                extra_extensions=extensions,
                urgent=role is Role.SERVER,
            )
        except InvalidInputError:
            raise
        except SpireHwError as e:
            raise _internal("could not sign X509-SVID", e) from e
        self._metrics.count(_SIGNED_X509)
        return IssuedX509(authority.svid_chain(leaf), serial, not_after)

    async def _amended(
        self,
        role: Role,
        spiffe_id: SpiffeId,
        spki: bytes,
        subject: bytes,
        dns_names: tuple[str, ...],
    ) -> Amended:
        match role:
            case Role.SERVER:
                return await self._composers.server_svid(subject)
            case Role.AGENT:
                return await self._composers.agent_svid(spiffe_id, spki, subject)
            case Role.WORKLOAD:
                return await self._composers.workload_svid(spiffe_id, spki, subject, dns_names)

    async def agent_svid(self, spki: bytes, agent_id: SpiffeId) -> IssuedX509:
        """Issue an agent's SVID; as `x509_svid`."""
        return await self.x509_svid(
            spki=spki, spiffe_id=agent_id, ttl=self.profile.agent_ttl, role=Role.AGENT
        )

    async def server_svid(self, spki: bytes) -> IssuedX509:
        """Issue this server's own SVID; as `x509_svid`."""
        return await self.x509_svid(
            spki=spki,
            spiffe_id=self._server_id,
            ttl=self.profile.x509_svid_ttl,
            role=Role.SERVER,
        )

    async def downstream_ca(self, spki: bytes, ttl: timedelta) -> IssuedX509:
        """Issue the CA certificate of a server below this one.

        Returns:
            The chain from the new CA up to, not including, the root.

        Raises:
            InvalidInputError: the key is too weak.
            SpireHwError: no authority, or it could not sign.
        """
        serial = random_serial()
        try:
            authority = self.x509
            now = _floor(self._clock.now())
            not_after = capped(now, ttl, authority.not_after)
            subject = downstream_subject(authority.subject_der, max(1, len(authority.chain)))
            amended = await self._composers.ca(subject) if self._composers else Amended(subject)
            certificate = await issue_ca_certificate(
                authority,
                trust_domain=self.profile.trust_domain,
                not_before=now - BACKDATE,
                not_after=not_after,
                spki=spki,
                subject_der=amended.subject,
                serial=serial,
                extra_extensions=amended.extensions,
            )
        except InvalidInputError:
            raise
        except SpireHwError as e:
            raise _internal("could not sign downstream CA", e) from e
        self._metrics.count(_SIGNED_CA)
        return IssuedX509(authority.svid_chain(certificate), serial, not_after)

    async def jwt_svid(
        self,
        *,
        spiffe_id: SpiffeId,
        audience: Sequence[str],
        ttl: timedelta,
        include_jti: bool = False,
    ) -> IssuedJwt:
        """Issue a JWT-SVID.

        Raises:
            InvalidInputError: no audience, or an ID that may not be in a token.
            SpireHwError: no authority, or it could not sign.
        """
        try:
            key = self.jwt
            now = _floor(self._clock.now())
            expires_at = capped(now, ttl, key.not_after)
            claims = build_claims(
                spiffe_id=spiffe_id,
                audience=audience,
                issued_at=now,
                expires_at=expires_at,
                issuer=self.profile.jwt_issuer,
                with_jti=include_jti,
            )
            if self._composers:
                claims = await self._composers.jwt_svid(spiffe_id, claims)
                expires_at = datetime.fromtimestamp(claims["exp"], UTC)
            token = await sign_claims(key.signer, key.kid, claims)
        except InvalidInputError:
            raise
        except SpireHwError as e:
            raise _internal("could not sign JWT-SVID", e) from e
        self._metrics.count(_SIGNED_JWT)
        return IssuedJwt(token, now, expires_at)


def _floor(now: datetime) -> datetime:
    return now.replace(microsecond=0)


def _internal(what: str, cause: SpireHwError) -> SpireHwError:
    """Tell what failed; a device that is away stays the caller's reason to try again."""
    passed_on = isinstance(cause, PluginError) and cause.kind in _DEVICE_KINDS
    kind = cause.kind if passed_on else ErrorKind.INTERNAL
    return SpireHwError(f"{what}: {cause.message}", kind=kind)
