"""Values of `spire.api.types` to and from our own.

`..._to_pb` never fails on a value of ours; `..._from_pb` checks all it reads and raises
`InvalidInputError` (INVALID_ARGUMENT) otherwise, without repairing anything.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from spire_hw._pb import types_pb2
from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.errors import InvalidInputError, SpireHwError
from spire_hw.key import parse_spki
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.x509.certificate import load_certificate
from spire_hw.x509.csr import Csr, parse_csr

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_MAX_EXPIRY: Final = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp())


def id_to_pb(spiffe_id: SpiffeId) -> types_pb2.SPIFFEID:
    """Return the message of an ID."""
    return types_pb2.SPIFFEID(trust_domain=spiffe_id.trust_domain.name, path=spiffe_id.path)


def id_from_pb(message: types_pb2.SPIFFEID, what: str = "SPIFFE ID") -> SpiffeId:
    """Return the ID a message names.

    Args:
        message: trust domain and path.
        what: how an error calls it, such as `parent ID`.

    Raises:
        InvalidInputError: not a SPIFFE ID; nothing is normalised.
    """
    if not message.trust_domain:
        raise InvalidInputError(f"{what}: trust domain is missing")
    path = message.path
    if path and not path.startswith("/"):
        raise InvalidInputError(f"{what}: path must start with a slash")
    try:
        trust_domain = TrustDomain.parse(message.trust_domain)
        return SpiffeId.parse(f"spiffe://{trust_domain.name}{path}")
    except InvalidInputError as e:
        raise InvalidInputError(f"{what}: {e.message}") from e


def trust_domain_from_pb(name: str, what: str = "trust domain") -> TrustDomain:
    """Return the trust domain of a field that names one, or has its ID as upstream's tools write.

    Raises:
        InvalidInputError: neither a name nor the ID of a trust domain.
    """
    try:
        return TrustDomain.parse(name.removeprefix("spiffe://"))
    except InvalidInputError as e:
        raise InvalidInputError(f"{what}: {e.message}") from e


def selector_to_pb(selector: Selector) -> types_pb2.Selector:
    """Return the message of a selector."""
    return types_pb2.Selector(type=selector.type, value=selector.value)


def selector_from_pb(message: types_pb2.Selector) -> Selector:
    """Return the selector of a message.

    Raises:
        InvalidInputError: type or value is not allowed.
    """
    return Selector(type=message.type, value=message.value)


def selectors_from_pb(messages: Iterable[types_pb2.Selector]) -> frozenset[Selector]:
    """Return the set of selectors in messages; duplicates fall together.

    Raises:
        InvalidInputError: one of them is not allowed.
    """
    return frozenset(selector_from_pb(message) for message in messages)


def match_from_pb(match: int) -> int:
    """Return a match behaviour that is known (exact 0, subset 1, superset 2, any 3).

    Raises:
        InvalidInputError: any other number.
    """
    if match not in types_pb2.SelectorMatch.MatchBehavior.values():
        raise InvalidInputError(f"match behavior {match} is unknown")
    return match


def csr_from_pb(data: bytes) -> Csr:
    """Return a request whose signature holds; every fault of it is the caller's.

    Raises:
        InvalidInputError: there is none, or it is malformed.
    """
    if not data:
        raise InvalidInputError("missing CSR")
    try:
        return parse_csr(data)
    except SpireHwError as e:
        raise InvalidInputError(f"malformed CSR: {e.message}") from e


def time_to_pb(moment: datetime | None) -> int:
    """Return Unix seconds, 0 for None."""
    return 0 if moment is None else int(moment.timestamp())


def time_from_pb(seconds: int, what: str = "time") -> datetime | None:
    """Return the moment of Unix seconds, None for 0.

    Raises:
        InvalidInputError: negative or past the year 9999.
    """
    if not 0 <= seconds <= _MAX_EXPIRY:
        raise InvalidInputError(f"{what} is out of range")
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def bundle_to_pb(bundle: Bundle, mask: types_pb2.BundleMask | None = None) -> types_pb2.Bundle:
    """Return the message of a bundle, cut down to a mask; None means all of it."""
    message = types_pb2.Bundle(trust_domain=bundle.trust_domain.name)
    if mask is None or mask.x509_authorities:
        message.x509_authorities.extend(
            types_pb2.X509Certificate(asn1=root.der, tainted=root.tainted)
            for root in bundle.x509_authorities
        )
    if mask is None or mask.jwt_authorities:
        message.jwt_authorities.extend(jwt_authority_to_pb(key) for key in bundle.jwt_authorities)
    if mask is None or mask.refresh_hint:
        message.refresh_hint = bundle.refresh_hint_s
    if mask is None or mask.sequence_number:
        message.sequence_number = bundle.sequence
    return message


def jwt_authority_to_pb(key: JwtAuthority) -> types_pb2.JWTKey:
    """Return the message of a JWT authority."""
    return types_pb2.JWTKey(
        public_key=key.pkix,
        key_id=key.kid,
        expires_at=time_to_pb(key.expires_at),
        tainted=key.tainted,
    )


def bundle_from_pb(message: types_pb2.Bundle) -> Bundle:
    """Return the bundle of a message.

    Raises:
        InvalidInputError: bad trust domain, certificate, key or number; the message says where.
    """
    if message.refresh_hint < 0:
        raise InvalidInputError("bundle: refresh hint is negative")
    return Bundle(
        trust_domain_from_pb(message.trust_domain),
        x509_roots_from_pb(message.x509_authorities),
        jwt_authorities_from_pb(message.jwt_authorities),
        message.refresh_hint,
        message.sequence_number,
    )


def x509_roots_from_pb(
    messages: Sequence[types_pb2.X509Certificate],
) -> tuple[X509Root, ...]:
    """Return the roots in messages, each once.

    Raises:
        InvalidInputError: not a certificate.
    """
    roots: dict[bytes, X509Root] = {}
    for number, message in enumerate(messages):
        try:
            load_certificate(message.asn1)
        except InvalidInputError as e:
            raise InvalidInputError(f"X.509 authority {number}: {e.message}") from e
        roots.setdefault(message.asn1, X509Root(message.asn1, message.tainted))
    return tuple(roots.values())


def jwt_authorities_from_pb(messages: Sequence[types_pb2.JWTKey]) -> tuple[JwtAuthority, ...]:
    """Return the JWT authorities in messages.

    Raises:
        InvalidInputError: no key ID, one that occurs twice, a bad key or expiry.
    """
    keys: dict[str, JwtAuthority] = {}
    for number, message in enumerate(messages):
        what = f"JWT authority {number}"
        if not message.key_id:
            raise InvalidInputError(f"{what}: key ID is missing")
        if message.key_id in keys:
            raise InvalidInputError(f'{what}: key ID "{message.key_id}" occurs twice')
        try:
            parse_spki(message.public_key)
        except InvalidInputError as e:
            raise InvalidInputError(f"{what}: {e.message}") from e
        keys[message.key_id] = JwtAuthority(
            message.key_id,
            message.public_key,
            time_from_pb(message.expires_at, f"{what}: expiry"),
            message.tainted,
        )
    return tuple(keys.values())


def x509_svid_to_pb(
    chain: Sequence[bytes], spiffe_id: SpiffeId, not_after: datetime, hint: str = ""
) -> types_pb2.X509SVID:
    """Return the message of an X509-SVID: chain as DER, leaf first, roots left out."""
    return types_pb2.X509SVID(
        cert_chain=chain, id=id_to_pb(spiffe_id), expires_at=time_to_pb(not_after), hint=hint
    )


def jwt_svid_to_pb(
    token: str, spiffe_id: SpiffeId, issued_at: datetime, expires_at: datetime, hint: str = ""
) -> types_pb2.JWTSVID:
    """Return the message of a JWT-SVID."""
    return types_pb2.JWTSVID(
        token=token,
        id=id_to_pb(spiffe_id),
        expires_at=time_to_pb(expires_at),
        issued_at=time_to_pb(issued_at),
        hint=hint,
    )
