"""Values of `spire.plugin.types` to and from our own.

The messages are those of `spire.api.types` under another name, so reading them is done there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from spire_hw._pb import plugin_types_pb2 as pb
from spire_hw.errors import EncodingError
from spire_hw.rpc import convert
from spire_hw.x509.certificate import load_certificate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root

MAX_CHAIN: Final = 16
MAX_AUTHORITIES: Final = 1024
MAX_SELECTORS: Final = 1000


def bundle_to_pb(bundle: Bundle) -> pb.Bundle:
    """Return the message of a bundle."""
    return pb.Bundle(
        trust_domain=bundle.trust_domain.name,
        x509_authorities=roots_to_pb(bundle.x509_authorities),
        jwt_authorities=[jwt_key_to_pb(key) for key in bundle.jwt_authorities],
        refresh_hint=bundle.refresh_hint_s,
        sequence_number=bundle.sequence,
    )


def bundle_from_pb(message: pb.Bundle) -> Bundle:
    """Return the bundle of a message; WIT authorities, for which we have no use, are left out.

    Raises:
        InvalidInputError: bad trust domain, certificate, key or number.
    """
    _bounded("X.509 authorities", message.x509_authorities)
    _bounded("JWT authorities", message.jwt_authorities)
    return convert.bundle_from_pb(cast("Any", message))


def roots_to_pb(roots: Iterable[X509Root]) -> list[pb.X509Certificate]:
    """Return the messages of roots."""
    return [pb.X509Certificate(asn1=root.der, tainted=root.tainted) for root in roots]


def roots_from_pb(messages: Sequence[pb.X509Certificate]) -> tuple[X509Root, ...]:
    """Return the roots in messages, each once.

    Raises:
        InvalidInputError: not a certificate, or too many.
    """
    _bounded("X.509 authorities", messages)
    return convert.x509_roots_from_pb(cast("Any", messages))


def jwt_key_to_pb(key: JwtAuthority) -> pb.JWTKey:
    """Return the message of a JWT authority."""
    return pb.JWTKey(
        public_key=key.pkix,
        key_id=key.kid,
        expires_at=convert.time_to_pb(key.expires_at),
        tainted=key.tainted,
    )


def jwt_keys_from_pb(messages: Sequence[pb.JWTKey]) -> tuple[JwtAuthority, ...]:
    """Return the JWT authorities in messages.

    Raises:
        InvalidInputError: no key ID, one that occurs twice, a bad key or expiry, or too many.
    """
    _bounded("JWT authorities", messages)
    return convert.jwt_authorities_from_pb(cast("Any", messages))


def chain_from_ders(ders: Sequence[bytes]) -> tuple[bytes, ...]:
    """Return a chain when it is one of certificates.

    Raises:
        EncodingError: empty, too long, or something else in it.
    """
    if not 1 <= len(ders) <= MAX_CHAIN:
        raise EncodingError(
            "certificate chain", f"{len(ders)} certificates, 1 to {MAX_CHAIN} are accepted"
        )
    for der in ders:
        load_certificate(der)
    return tuple(ders)


def _bounded(what: str, messages: Sequence[object]) -> None:
    if len(messages) > MAX_AUTHORITIES:
        raise EncodingError(what, f"{len(messages)} of them, at most {MAX_AUTHORITIES} are taken")
