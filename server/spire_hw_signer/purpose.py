"""Certificates and requests to be signed, read and held against what keys may sign (pure).

A server that was taken over can ask for any signature its keys could make. It gets those an honest
one asks for: SVIDs of its own trust domain that end soon, its own CA certificate, requests for it,
and tokens (`tokenpurpose`). Bytes that are not strict DER are refused before they are understood in
two ways.

Spec: RFC 5280 section 4; RFC 2986; SPIFFE X509-SVID sections 3 to 5.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError, VerificationError
from spire_hw.key import EC_SPKI_HEADS, KeyType, SignOptions, parse_spki, spki_der
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.x509 import der
from spire_hw.x509.dnsname import check_dns_name
from spire_hw.x509.name import check_name, decode_name
from spire_hw.x509.scheme import algorithm_identifier

if TYPE_CHECKING:
    from spire_hw_signer.policy import X509Rule

MAX_CONTENT_BYTES: Final = 16 * 1024
# Clocks of signer and server differ a little, and certificates start a little early.
LEEWAY: Final = timedelta(minutes=1)
BACKDATE: Final = timedelta(hours=1)

_WHAT: Final = "certificate body"
_REQUEST: Final = "request body"
_BOOLEAN, _UTC_TIME, _GENERALIZED_TIME = 0x01, 0x17, 0x18
_VERSION, _EXTENSIONS, _ATTRIBUTES = 0xA0, 0xA3, 0xA0
_DNS_NAME, _URI, _KEY_ID = 0x82, 0x86, 0x80
_VERSION_3: Final = der.integer(2)
_VERSION_1: Final = der.integer(0)
_TRUE: Final = b"\xff"
_NEGATIVE: Final = 0x80
_MAX_SERIAL_BYTES: Final = 20
_GENERALIZED_FROM: Final = 2050
_TIME_DIGITS: Final = 14

# OIDs are compared as they are encoded.
_ARC: Final = b"\x55\x1d"  # 2.5.29
_SKI, _KU, _SAN = _ARC + b"\x0e", _ARC + b"\x0f", _ARC + b"\x11"
_BC, _AKI, _EKU = _ARC + b"\x13", _ARC + b"\x23", _ARC + b"\x25"
_KNOWN: Final = frozenset({_SKI, _KU, _SAN, _BC, _AKI, _EKU})
_REQUESTABLE: Final = frozenset({_SKI, _KU, _SAN, _BC})
_EXTENSION_REQUEST: Final = der.oid("1.2.840.113549.1.9.14")[2:]
_TLS_USES: Final = frozenset({der.oid("1.3.6.1.5.5.7.3.1")[2:], der.oid("1.3.6.1.5.5.7.3.2")[2:]})
# Bits of a KeyUsage's first byte, from the left: digitalSignature 0, keyCertSign 5, cRLSign 6.
_DIGITAL_SIGNATURE, _KEY_CERT_SIGN, _CRL_SIGN = 0x80, 0x04, 0x02

_EC_TYPES: Final = frozenset({KeyType.EC_P256, KeyType.EC_P384})
_POINTS: Final = tuple(head + b"\x04" for head in EC_SPKI_HEADS.values())
_COMMON_NAME: Final = "2.5.4.3"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """The key that signs.

    Attributes:
        key_type: its type.
        spki: DER SubjectPublicKeyInfo.
        key_ids: what certificates may call it: the SHA-1 of its bits, and the first 160 bits of
            their SHA-256 (RFC 5280 section 4.2.1.2, RFC 7093 section 2).
    """

    key_type: KeyType
    spki: bytes
    key_ids: frozenset[bytes]

    @classmethod
    def of(cls, key_type: KeyType, spki: bytes) -> SigningKey:
        """Build from a public key."""
        bits = der.public_key_bits(spki)
        sha1 = hashlib.sha1(bits, usedforsecurity=False).digest()
        return cls(key_type, spki, frozenset({sha1, hashlib.sha256(bits).digest()[:20]}))


@dataclass(frozen=True, slots=True)
class _Extension:
    critical: bool
    value: bytes


@dataclass(frozen=True, slots=True)
class _Body:
    algorithm: bytes
    issuer: bytes
    not_before: datetime
    not_after: datetime
    subject: bytes
    spki: bytes
    extensions: dict[bytes, _Extension]


def check_certificate(
    body: bytes,
    options: SignOptions,
    *,
    key: SigningKey,
    trust_domain: TrustDomain,
    rule: X509Rule,
    now: datetime,
) -> bool:
    """Check that a certificate may be signed.

    Args:
        body: DER TBSCertificate.
        options: hash and padding that were asked for.
        key: the key that will sign.
        trust_domain: the client's.
        rule: what the client's keys may sign.
        now: the time, aware.

    Returns:
        Whether it is that of a CA.

    Raises:
        EncodingError: not a TBSCertificate in strict DER.
        VerificationError: it is against the rule; the message says which.
        InvalidInputError: a name or key in it is none.
    """
    found = _read_body(body)
    if found.algorithm != _algorithm(key, options):
        raise VerificationError("signature algorithm is not the one that was asked for")
    if not now - BACKDATE <= found.not_before < found.not_after:
        raise VerificationError("validity is empty, or starts too long ago")
    unknown = found.extensions.keys() - _KNOWN
    for oid in unknown:
        if der.dotted(oid) not in rule.extensions or found.extensions[oid].critical:
            raise VerificationError(f"extension {der.dotted(oid)} is not allowed")
    own = found.spki == key.spki
    _check_authority_key(found, key, self_signed=own and found.issuer == found.subject)
    is_ca, path_length = _constraints(found.extensions.get(_BC))
    usage = _usage(found.extensions.get(_KU))
    uris, dns_names = _names(found.extensions.get(_SAN))
    if len(uris) != 1:
        raise VerificationError("there has to be exactly one URI name")
    if is_ca:
        _check_ca(found, usage, uris[0], path_length, own=own, trust_domain=trust_domain, rule=rule)
        _check_end(found.not_after, now, rule.max_ca_ttl)
    else:
        if own:
            raise VerificationError("certificate of the signing key itself is not that of a CA")
        _check_leaf(found, usage, uris[0], trust_domain)
        _check_hosts(found.subject, dns_names, rule)
        _check_end(found.not_after, now, rule.max_svid_ttl)
    if is_ca and dns_names:
        raise VerificationError("CA certificate has DNS names")
    return is_ca


def check_request(body: bytes, *, key: SigningKey, trust_domain: TrustDomain) -> None:
    """Check that a certificate request may be signed: for the signing key, for its trust domain.

    Args:
        body: DER CertificationRequestInfo.
        key: the key that will sign.
        trust_domain: the client's.

    Raises:
        EncodingError: not a CertificationRequestInfo in strict DER.
        VerificationError: it is for another key or asks for another name.
    """
    outer = der.Reader(bounded(body), _REQUEST)
    inside = outer.enter(der.SEQUENCE)
    outer.finish()
    if inside.element(der.INTEGER) != _VERSION_1:
        raise VerificationError("request has an unknown version")
    _name(inside)
    if inside.element(der.SEQUENCE) != key.spki:
        raise VerificationError("request is for another key than the one that signs it")
    attributes = inside.enter(_ATTRIBUTES)
    inside.finish()
    extensions: dict[bytes, _Extension] = {}
    while attributes.more():
        attribute = attributes.enter(der.SEQUENCE)
        oid = attribute.content(der.OBJECT_IDENTIFIER)
        if oid != _EXTENSION_REQUEST or extensions:
            raise VerificationError(f"attribute {der.dotted(oid)} of the request is not allowed")
        values = attribute.enter(der.SET)
        attribute.finish()
        extensions = _read_extensions(values)
        values.finish()
    for oid in extensions.keys() - _REQUESTABLE:
        raise VerificationError(f"extension {der.dotted(oid)} of the request is not allowed")
    uris, dns_names = _names(extensions.get(_SAN))
    if uris != [trust_domain.id.text] or dns_names:
        raise VerificationError(f"request is not for the name {trust_domain.id.text} alone")


def bounded(content: bytes) -> bytes:
    """Return what is to be signed.

    Raises:
        VerificationError: it is too long to be looked at.
    """
    if len(content) > MAX_CONTENT_BYTES:
        raise VerificationError(f"it is longer than {MAX_CONTENT_BYTES} bytes")
    return content


def _algorithm(key: SigningKey, options: SignOptions) -> bytes:
    if options.pss:
        raise VerificationError("certificates are not signed with RSA-PSS")
    return algorithm_identifier(options.hash, ecdsa=key.key_type in _EC_TYPES)


def _read_body(body: bytes) -> _Body:
    outer = der.Reader(bounded(body), _WHAT)
    inside = outer.enter(der.SEQUENCE)
    outer.finish()
    if inside.next_tag() != _VERSION or inside.content(_VERSION) != _VERSION_3:
        raise VerificationError("certificate is not of version 3")
    serial = inside.content(der.INTEGER)
    padded = len(serial) > 1 and serial[0] == 0 and serial[1] < _NEGATIVE
    if not any(serial) or serial[0] >= _NEGATIVE or padded or len(serial) > _MAX_SERIAL_BYTES:
        raise VerificationError("serial number is not positive, or too long")
    algorithm = inside.element(der.SEQUENCE)
    issuer = _name(inside)
    validity = inside.enter(der.SEQUENCE)
    not_before, not_after = _time(validity), _time(validity)
    validity.finish()
    subject = _name(inside)
    spki = inside.element(der.SEQUENCE)
    _check_key(spki)
    wrapped = inside.enter(_EXTENSIONS)
    inside.finish()
    extensions = _read_extensions(wrapped)
    wrapped.finish()
    return _Body(algorithm, issuer, not_before, not_after, subject, spki, extensions)


def _read_extensions(wrapped: der.Reader) -> dict[bytes, _Extension]:
    level = wrapped.enter(der.SEQUENCE)
    found: dict[bytes, _Extension] = {}
    while level.more():
        one = level.enter(der.SEQUENCE)
        oid = one.content(der.OBJECT_IDENTIFIER)
        critical = one.next_tag() == _BOOLEAN
        if critical and one.content(_BOOLEAN) != _TRUE:
            raise VerificationError("extension has a flag that is not DER")
        value = one.content(der.OCTET_STRING)
        one.finish()
        if oid in found:
            raise VerificationError(f"extension {der.dotted(oid)} is there twice")
        found[oid] = _Extension(critical, value)
    return found


def _check_key(spki: bytes) -> None:
    """Refuse a key that is not written as usual: written in two ways, one would seem two."""
    key = parse_spki(spki)
    if not spki.startswith(_POINTS) and spki_der(key) != spki:
        raise VerificationError("public key is not in its one usual form")


def _name(level: der.Reader) -> bytes:
    name = level.element(der.SEQUENCE)
    _check_name(name)
    return name


@lru_cache(maxsize=256)
def _check_name(name: bytes) -> None:
    check_name(name)
    decode_name(name)


def _time(validity: der.Reader) -> datetime:
    tag = validity.next_tag()
    text = validity.content(_GENERALIZED_TIME if tag == _GENERALIZED_TIME else _UTC_TIME)
    digits = text[:-1]
    if tag == _UTC_TIME:
        digits = (b"20" if digits[:2] < b"50" else b"19") + digits
    if len(digits) != _TIME_DIGITS or not digits.isdigit() or text[-1:] != b"Z":
        raise VerificationError("a time is not written as certificates have it")
    try:
        # Four digits of the year, two of each other part; strptime takes five times as long.
        parts = [int(digits[at : at + 2]) for at in range(4, _TIME_DIGITS, 2)]
        month, day, hour, minute, second = parts
        moment = datetime(int(digits[:4]), month, day, hour, minute, second, tzinfo=UTC)
    except ValueError as e:
        raise VerificationError("a time does not exist") from e
    if tag == _GENERALIZED_TIME and moment.year < _GENERALIZED_FROM:
        raise VerificationError("a time before 2050 is not written as UTCTime")
    return moment


def _check_end(not_after: datetime, now: datetime, most: timedelta) -> None:
    if not_after > now + most + LEEWAY:
        raise VerificationError(f"it ends more than {most} from now")


def _check_authority_key(found: _Body, key: SigningKey, *, self_signed: bool) -> None:
    extension = found.extensions.get(_AKI)
    if extension is None:
        if self_signed:
            return
        raise VerificationError("authority key identifier is missing")
    level = _only(extension)
    identifier = level.content(_KEY_ID)
    level.finish()
    if identifier not in key.key_ids:
        raise VerificationError("authority key identifier is not that of the signing key")


def _constraints(extension: _Extension | None) -> tuple[bool, int | None]:
    if extension is None:
        return False, None
    level = _only(extension)
    is_ca = level.next_tag() == _BOOLEAN
    if is_ca and level.content(_BOOLEAN) != _TRUE:
        raise VerificationError("basic constraints are not DER")
    path_length = None
    if level.next_tag() == der.INTEGER:
        raw = level.content(der.INTEGER)
        if len(raw) != 1 or raw[0] >= _NEGATIVE or not is_ca:
            raise VerificationError("path length is out of range")
        path_length = raw[0]
    level.finish()
    if is_ca and not extension.critical:
        raise VerificationError("basic constraints of a CA are not critical")
    return is_ca, path_length


def _usage(extension: _Extension | None) -> int:
    """Return the first eight bits of the key usage."""
    if extension is None:
        raise VerificationError("key usage is missing")
    outer = der.Reader(extension.value, _WHAT)
    bits = outer.content(der.BIT_STRING)
    outer.finish()
    if len(bits) != 2 or bits[0] > 7 or bits[1] & ((1 << bits[0]) - 1):  # noqa: PLR2004 - a count of unused bits, a byte
        raise VerificationError("key usage is not one of the first eight bits")
    return bits[1]


def _names(extension: _Extension | None) -> tuple[list[str], list[str]]:
    uris: list[str] = []
    dns_names: list[str] = []
    if extension is None:
        return uris, dns_names
    level = _only(extension)
    while level.more():
        tag = level.next_tag()
        if tag not in {_URI, _DNS_NAME}:
            raise VerificationError("a name is neither a URI nor a DNS name")
        content = level.content(tag)
        if not content.isascii():
            raise VerificationError("a name is not ASCII")
        text = content.decode("ascii")
        if tag == _URI:
            uris.append(text)
        else:
            dns_names.append(check_dns_name(text))
    return uris, dns_names


def _only(extension: _Extension) -> der.Reader:
    outer = der.Reader(extension.value, _WHAT)
    level = outer.enter(der.SEQUENCE)
    outer.finish()
    return level


def _check_ca(
    found: _Body,
    usage: int,
    uri: str,
    path_length: int | None,
    *,
    own: bool,
    trust_domain: TrustDomain,
    rule: X509Rule,
) -> None:
    if uri != trust_domain.id.text:
        raise VerificationError(f"CA certificate is not of trust domain {trust_domain.name}")
    if not usage & _KEY_CERT_SIGN or usage & ~(_KEY_CERT_SIGN | _CRL_SIGN | _DIGITAL_SIGNATURE):
        raise VerificationError("key usage of the CA is more or less than signing")
    if _EKU in found.extensions:
        raise VerificationError("CA certificate has an extended key usage")
    if own:
        if found.issuer != found.subject:
            raise VerificationError("self-signed certificate has another issuer than subject")
        return
    if not rule.downstream:
        raise VerificationError("CA certificates for other keys are not signed for this client")
    most = rule.max_path_length
    if most is not None and (path_length is None or path_length > most):
        raise VerificationError(f"CA certificate has no path length up to {most}")


def _check_hosts(subject: bytes, dns_names: list[str], rule: X509Rule) -> None:
    if rule.dns_names and not rule.dns_suffixes:
        return
    # OpenSSL takes a common name for the host's where there is no DNS name.
    common = [text for kind, text in decode_name(subject) if kind == _COMMON_NAME]
    for name in (*dns_names, *(text for text in common if not any(c.isspace() for c in text))):
        if not rule.dns_names:
            raise VerificationError(f"DNS names are not allowed, nor a common name as one: {name}")
        if not any(f".{name.lower()}".endswith(f".{suffix}") for suffix in rule.dns_suffixes):
            raise VerificationError(f"DNS name {name} is below none of dns_suffixes")


def _check_leaf(found: _Body, usage: int, uri: str, trust_domain: TrustDomain) -> None:
    if usage & (_KEY_CERT_SIGN | _CRL_SIGN) or not usage & _DIGITAL_SIGNATURE:
        raise VerificationError("key usage is not that of an SVID")
    spiffe_id = SpiffeId.parse(uri)
    if spiffe_id.trust_domain != trust_domain or not spiffe_id.path:
        raise VerificationError(f"SPIFFE ID is not a member of trust domain {trust_domain.name}")
    extension = found.extensions.get(_EKU)
    level = None if extension is None else _only(extension)
    if level is None or not level.more():
        # It would be good for anything: code, mail.
        raise VerificationError("SVID does not say what it is for (extended key usage)")
    while level.more():
        oid = level.content(der.OBJECT_IDENTIFIER)
        if oid not in _TLS_USES:
            name = der.dotted(oid)
            raise VerificationError(f"extended key usage {name} is not that of an SVID")


def explain(error: InvalidInputError | VerificationError) -> str:
    """Return what is wrong with something that was to be signed, short enough for an answer."""
    return error.message[:300]
