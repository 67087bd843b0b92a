"""Issuing certificates: bodies joined from prepared DER parts, one signature each.

What varies in a leaf is serial, validity, subject, key, subject key identifier and names; all else
comes from the authority as bytes. Who may get which certificate is decided elsewhere.

Spec: SPIFFE X509-SVID sections 3 and 4; RFC 5280 section 4.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.key import Signer, parse_spki, spki_der
from spire_hw.x509 import der, extension
from spire_hw.x509.certificate import key_identifier
from spire_hw.x509.dnsname import check_dns_names
from spire_hw.x509.name import (
    CA_SUBJECT,
    EMPTY_NAME,
    check_name,
    svid_subject,
    with_serial_number,
)
from spire_hw.x509.scheme import scheme_of, seal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.spiffeid import SpiffeId, TrustDomain
    from spire_hw.x509.authority import Issuing, X509Authority

SERIAL_BITS: Final = 128
_MAX_SERIAL_BITS: Final = 159
_VERSION_3: Final = der.encode(0xA0, der.integer(2))
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_GENERALIZED_FROM: Final = 2050
_SVID_CONSTANT: Final = (
    extension.SVID_KEY_USAGE + extension.SVID_EXTENDED_KEY_USAGE + extension.NOT_CA
)


def random_serial() -> int:
    """Return a serial number between 1 and 2^128 - 1."""
    return secrets.randbelow((1 << SERIAL_BITS) - 1) + 1


async def issue_x509_svid(
    authority: X509Authority,
    *,
    spki: bytes,
    spiffe_id: SpiffeId,
    not_before: datetime,
    not_after: datetime,
    dns_names: tuple[str, ...] = (),
    subject_der: bytes | None = None,
    serial: int | None = None,
    extra_extensions: Sequence[extension.Extension] = (),
    check_signature: bool | None = None,
    urgent: bool = False,
) -> bytes:
    """Issue the leaf certificate of an SVID.

    Args:
        authority: who signs.
        spki: DER SubjectPublicKeyInfo of a key that was checked, as `parse_csr` returns it.
        spiffe_id: member of the authority's trust domain, with a path.
        not_before: aware; fractions of a second are dropped.
        not_after: aware; the authority's own end when that is earlier.
        dns_names: DNS SANs; the first also becomes common name of the default subject.
        subject_der: DER Name; None means upstream's `C=US, O=SPIRE`.
        serial: None draws a random one of 128 bits.
        extra_extensions: further extensions, such as a CredentialComposer's.
        check_signature: None verifies the new signature unless the key is in this process.
        urgent: a busy device signs it before others.

    Returns:
        The DER certificate.

    Raises:
        InvalidInputError: ID, DNS name, subject or serial that may not be in a certificate.
        NotReadyError: the validity is empty, because the authority ends before it starts.
        SpireHwError: what the signer raises, or its signature does not hold (INTERNAL).
    """
    if spiffe_id.trust_domain != authority.trust_domain or not spiffe_id.path:
        raise InvalidInputError(
            f'"{spiffe_id}" is not a member of the authority\'s trust domain "{authority.trust_domain}"'
        )
    if dns_names:
        check_dns_names(dns_names)
    if subject_der is None:
        subject_der = svid_subject(dns_names[0] if dns_names else "")
    else:
        check_name(subject_der)
    if dns_names or subject_der == EMPTY_NAME:
        names = extension.subject_alternative_name(
            (spiffe_id.text,), dns_names, critical=subject_der == EMPTY_NAME
        )
    else:
        names = extension.uri_name(spiffe_id.text)
    key_id = extension.subject_key_id(key_identifier(spki))
    extras = _extras(extra_extensions)
    body = der.sequence(
        _VERSION_3,
        _serial(random_serial() if serial is None else serial),
        authority.issuer_part,
        _validity(not_before, min(not_after, authority.not_after)),
        subject_der,
        spki,
        extension.extensions(_SVID_CONSTANT, key_id, authority.key_id_part, names, extras),
    )
    return await seal(
        body, authority.signer, authority.scheme, check=check_signature, urgent=urgent
    )


async def issue_ca_certificate(
    authority: Issuing | None,
    *,
    trust_domain: TrustDomain | None,
    not_before: datetime,
    not_after: datetime,
    signer: Signer | None = None,
    spki: bytes | None = None,
    subject_der: bytes = CA_SUBJECT,
    serial: int | None = None,
    path_length: int | None = None,
    extra_extensions: Sequence[extension.Extension] = (),
    check_signature: bool | None = None,
) -> bytes:
    """Issue a CA certificate, self-signed or signed by an authority.

    Args:
        authority: who signs; None for a self-signed certificate.
        trust_domain: whose SVIDs the new CA signs; its ID becomes the URI SAN. None for a CA that
            signs other CAs only.
        not_before: aware; fractions of a second are dropped.
        not_after: aware; the authority's own end when that is earlier.
        signer: the key of the self-signed certificate.
        spki: DER SubjectPublicKeyInfo the authority certifies, as `parse_csr` returns it.
        subject_der: DER Name; without a serialNumber attribute one is added that holds the
            decimal serial of the self-signed certificate, so that names of CAs differ.
        serial: None draws a random one of 128 bits.
        path_length: CA certificates that may follow below it; None sets no limit.
        extra_extensions: further extensions, such as policies.
        check_signature: None verifies the new signature unless the key is in this process.

    Returns:
        The DER certificate.

    Raises:
        InvalidInputError: neither or both of signer and authority with spki, or a part that may
            not be in a certificate.
        NotReadyError: the validity is empty, because the authority ends before it starts.
        SpireHwError: what the signer raises, or its signature does not hold (INTERNAL).
    """
    number = random_serial() if serial is None else serial
    check_name(subject_der)
    if authority is not None:
        if spki is None or signer is not None:
            raise InvalidInputError("an authority certifies a given key: spki, and no signer")
        parse_spki(spki)
        key, scheme = authority.signer, authority.scheme
        issuer, key_id_part = authority.issuer_part, authority.key_id_part
        not_after = min(not_after, authority.not_after)
    else:
        if signer is None or spki is not None:
            raise InvalidInputError("a self-signed certificate needs a signer, and no spki")
        key, scheme = signer, scheme_of(signer.public_key)
        spki = spki_der(signer.public_key)
        subject_der = with_serial_number(subject_der, str(number))
        issuer = scheme.algorithm + subject_der
        key_id_part = extension.authority_key_id(key_identifier(spki))
    names = b""
    if trust_domain is not None:
        names = extension.subject_alternative_name(
            (str(trust_domain.id),), critical=subject_der == EMPTY_NAME
        )
    elif subject_der == EMPTY_NAME:
        raise InvalidInputError("a CA without a trust domain needs a subject")
    body = der.sequence(
        _VERSION_3,
        _serial(number),
        issuer,
        _validity(not_before, not_after),
        subject_der,
        spki,
        extension.extensions(
            extension.CA_KEY_USAGE,
            extension.ca_with(path_length),
            extension.subject_key_id(key_identifier(spki)),
            key_id_part,
            names,
            _extras(extra_extensions),
        ),
    )
    return await seal(body, key, scheme, check=check_signature, urgent=True)


def _serial(number: int) -> bytes:
    if number <= 0 or number.bit_length() > _MAX_SERIAL_BITS:
        raise InvalidInputError(f"serial number is not between 1 and 2^{_MAX_SERIAL_BITS} - 1")
    return der.integer(number)


def _validity(not_before: datetime, not_after: datetime) -> bytes:
    if not_after <= not_before:
        raise NotReadyError(
            f"certificate would end at {not_after.isoformat()}, before its start at "
            f"{not_before.isoformat()}"
        )
    return _validity_of(not_before.replace(microsecond=0), not_after.replace(microsecond=0))


@lru_cache(maxsize=256)
def _validity_of(not_before: datetime, not_after: datetime) -> bytes:
    return der.sequence(_time(not_before), _time(not_after))


def _time(moment: datetime) -> bytes:
    if moment.tzinfo is None:
        raise InvalidInputError("times in certificates need a time zone")
    utc = moment.astimezone(UTC)
    if utc.year < _GENERALIZED_FROM:
        return der.encode(_UTC_TIME, f"{utc:%y%m%d%H%M%SZ}".encode("ascii"))
    return der.encode(_GENERALIZED_TIME, f"{utc:%Y%m%d%H%M%SZ}".encode("ascii"))


def _extras(extensions: Sequence[extension.Extension]) -> bytes:
    if not extensions:
        return b""
    encoded = [item.encode() for item in extensions]
    own = extension.WRITTEN
    kinds = [item.oid for item in extensions]
    if len(set(kinds)) != len(kinds) or own.intersection(kinds):
        raise InvalidInputError("an extra extension is given twice or is one that we write")
    return b"".join(encoded)
