"""Certificate signing requests: building ours, reading everybody's.

An ordinary request (EC P-256 or P-384, signed with ECDSA) is walked by hand; whatever is out of the
ordinary is read by `cryptography`. Either way only strict DER passes, and nothing of a request is
believed before its own signature held.

Spec: RFC 2986 (PKCS #10); RFC 2985 section 5.4.2 (extensionRequest).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.errors import EncodingError, InvalidInputError, VerificationError
from spire_hw.key import (
    EC_SPKI_HEADS,
    HashAlgorithm,
    PublicKey,
    Purpose,
    Signer,
    check_public_key,
    load_point,
    spki_der,
)
from spire_hw.x509 import der
from spire_hw.x509.dnsname import check_dns_names
from spire_hw.x509.extension import subject_alternative_name
from spire_hw.x509.name import SVID_SUBJECT, check_name
from spire_hw.x509.scheme import algorithm_identifier, scheme_of, seal

if TYPE_CHECKING:
    from spire_hw.spiffeid import SpiffeId

MAX_CSR_BYTES: Final = 16 * 1024
_WHAT: Final = "CSR"

_VERSION: Final = der.integer(0)
_ATTRIBUTES: Final = 0xA0
_URI, _DNS_NAME = 0x86, 0x82
_TRUE: Final = b"\x01\x01\xff"
_EXTENSION_REQUEST: Final = der.oid("1.2.840.113549.1.9.14")
_SUBJECT_ALTERNATIVE_NAME: Final = der.oid("2.5.29.17")
_NO_ATTRIBUTES: Final = der.encode(_ATTRIBUTES, b"")

# By length of the SubjectPublicKeyInfo: what stands before the point, and the curve.
_CURVES: Final = {
    91: (EC_SPKI_HEADS["secp256r1"], "secp256r1"),
    120: (EC_SPKI_HEADS["secp384r1"], "secp384r1"),
}
_UNCOMPRESSED: Final = 4
_ECDSA: Final[dict[bytes, ec.EllipticCurveSignatureAlgorithm]] = {
    algorithm_identifier(h, ecdsa=True): ec.ECDSA(h.instance) for h in HashAlgorithm
}
_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


@dataclass(frozen=True, slots=True)
class Csr:
    """What a request asks for.

    Attributes:
        public_key: the key, strong enough.
        spki: the same as DER SubjectPublicKeyInfo, as it stands in the request.
        uris: URI SANs in order, unchecked.
        dns_names: DNS SANs in order, unchecked.
        subject: DER Name, well-formed but otherwise unchecked.
        bare: has no attribute that could ask for names or other extensions.
    """

    public_key: PublicKey
    spki: bytes
    uris: tuple[str, ...]
    dns_names: tuple[str, ...]
    subject: bytes
    bare: bool


async def build_csr(
    signer: Signer,
    *,
    spiffe_id: SpiffeId | None = None,
    dns_names: tuple[str, ...] = (),
    subject: bytes = SVID_SUBJECT,
) -> bytes:
    """Build and sign a request.

    Args:
        signer: the key a certificate is asked for.
        spiffe_id: URI SAN; upstream's agents ask without one, the server decides.
        dns_names: DNS SANs.
        subject: DER Name.

    Returns:
        DER CertificationRequest, its signature verified unless the key is in this process.

    Raises:
        InvalidInputError: a DNS name or the subject is not allowed.
        SpireHwError: what the signer raises, or its signature does not hold.
    """
    attributes = _NO_ATTRIBUTES
    if spiffe_id is not None or dns_names:
        names = subject_alternative_name(
            () if spiffe_id is None else (str(spiffe_id),), check_dns_names(dns_names)
        )
        request = der.encode(der.SET, der.sequence(names))
        attributes = der.encode(_ATTRIBUTES, der.sequence(_EXTENSION_REQUEST, request))
    body = der.sequence(_VERSION, check_name(subject), spki_der(signer.public_key), attributes)
    return await seal(body, signer, scheme_of(signer.public_key), purpose=Purpose.CSR, urgent=True)


def parse_csr(data: bytes, *, check_signature: bool = True) -> Csr:
    """Read a request.

    Args:
        data: DER CertificationRequest, at most 16 KiB.
        check_signature: verify that whoever asks holds the key; leave it out only where the key
            is proved in another way.

    Raises:
        EncodingError: does not parse.
        InvalidInputError: the key is weak or of an unknown kind.
        VerificationError: the signature does not hold, or is over a hash we don't accept.
    """
    if len(data) > MAX_CSR_BYTES:
        raise EncodingError(_WHAT, f"is longer than {MAX_CSR_BYTES} bytes")
    body, algorithm, signature = _frame(data)
    ordinary = _walk(body)
    scheme = _ECDSA.get(algorithm)
    if ordinary is None or scheme is None:
        csr = _parse_unusual(data, check_signature=check_signature)
        if _key_as_written(body) != csr.spki:
            raise EncodingError(_WHAT, "key is not in its one usual form")
        return csr
    csr, key = ordinary
    if check_signature:
        try:
            key.verify(signature, body, scheme)
        except InvalidSignature as e:
            raise VerificationError("signature of the CSR does not hold") from e
    return csr


def _frame(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Return body, algorithm identifier and signature."""
    at, end = der.step(data, 0, len(data), der.SEQUENCE, _WHAT)
    _, body_end = der.step(data, at, end, der.SEQUENCE, _WHAT)
    _, algorithm_end = der.step(data, body_end, end, der.SEQUENCE, _WHAT)
    start, stop = der.step(data, algorithm_end, end, der.BIT_STRING, _WHAT)
    if stop != end or end != len(data):
        raise EncodingError(_WHAT, "has something after its end", stop)
    if start == stop or data[start]:
        raise EncodingError(_WHAT, "signature is not a whole number of bytes", start)
    return data[at:body_end], data[body_end:algorithm_end], data[start + 1 : stop]


def _key_as_written(body: bytes) -> bytes:
    """Return the SubjectPublicKeyInfo of a request; written in two ways a key would seem two."""
    at, end = der.step(body, 0, len(body), der.SEQUENCE, _WHAT)
    _, at = der.step(body, at, end, der.INTEGER, _WHAT)
    _, at = der.step(body, at, end, der.SEQUENCE, _WHAT)
    _, stop = der.step(body, at, end, der.SEQUENCE, _WHAT)
    return body[at:stop]


_Ordinary = tuple[Csr, ec.EllipticCurvePublicKey]


def _walk(body: bytes) -> _Ordinary | None:
    """Read the body of an ordinary request; None when it is not ordinary."""
    try:
        return _walk_strictly(body)
    except EncodingError:
        return None


def _walk_strictly(body: bytes) -> _Ordinary | None:
    at, end = der.step(body, 0, len(body), der.SEQUENCE, _WHAT)
    if not body.startswith(_VERSION, at):
        return None
    subject_at = at + len(_VERSION)
    _, spki_at = der.step(body, subject_at, end, der.SEQUENCE, _WHAT)
    _, attributes_at = der.step(body, spki_at, end, der.SEQUENCE, _WHAT)
    start, stop = der.step(body, attributes_at, end, _ATTRIBUTES, _WHAT)
    subject, spki = body[subject_at:spki_at], body[spki_at:attributes_at]
    key = _ordinary_key(spki)
    if key is None or stop != end:
        return None
    _check_subject(subject)
    bare = start == stop
    names = ((), ()) if bare else _requested_names(body, start, stop)
    if names is None:
        return None
    return Csr(key, spki, names[0], names[1], subject, bare), key


@lru_cache(maxsize=64)
def _check_subject(subject: bytes) -> None:
    check_name(subject)


def _ordinary_key(spki: bytes) -> ec.EllipticCurvePublicKey | None:
    found = _CURVES.get(len(spki))
    if found is None:
        return None
    head, curve = found
    if not spki.startswith(head) or spki[len(head)] != _UNCOMPRESSED:
        return None
    try:
        return load_point(curve, spki[len(head) :])
    except ValueError:
        return None


_Names = tuple[tuple[str, ...], tuple[str, ...]]


def _requested_names(body: bytes, at: int, end: int) -> _Names | None:
    """Return the SANs when the only attribute is an extension request with ordinary names."""
    at, stop = der.step(body, at, end, der.SEQUENCE, _WHAT)
    if stop != end or not body.startswith(_EXTENSION_REQUEST, at):
        return None
    at, stop = der.step(body, at + len(_EXTENSION_REQUEST), end, der.SET, _WHAT)
    if stop != end:
        return None
    at, stop = der.step(body, at, end, der.SEQUENCE, _WHAT)
    if stop != end:
        return None
    seen: set[bytes] = set()
    names: _Names | None = ((), ())
    while at < end:
        kind_at, stop = der.step(body, at, end, der.SEQUENCE, _WHAT)
        _, at = der.step(body, kind_at, stop, der.OBJECT_IDENTIFIER, _WHAT)
        kind = body[kind_at:at]
        if body.startswith(_TRUE, at):
            at += len(_TRUE)
        value, value_end = der.step(body, at, stop, der.OCTET_STRING, _WHAT)
        if value_end != stop or kind in seen:
            return None
        seen.add(kind)
        if kind == _SUBJECT_ALTERNATIVE_NAME:
            names = _general_names(body, value, stop)
        at = stop
    return names


def _general_names(body: bytes, at: int, end: int) -> _Names | None:
    at, stop = der.step(body, at, end, der.SEQUENCE, _WHAT)
    if stop != end:
        return None
    uris: list[str] = []
    dns_names: list[str] = []
    while at < end:
        tag = body[at]
        if tag not in {_URI, _DNS_NAME}:
            return None
        start, at = der.step(body, at, end, tag, _WHAT)
        content = body[start:at]
        if not content.isascii():
            return None
        (uris if tag == _URI else dns_names).append(content.decode("ascii"))
    return tuple(uris), tuple(dns_names)


def _parse_unusual(data: bytes, *, check_signature: bool) -> Csr:
    try:
        request = x509.load_der_x509_csr(data)
        key = check_public_key(request.public_key())
        uris, dns_names = _names_of(request)
        bare = not request.extensions
        subject = request.subject.public_bytes()
        if check_signature:
            _check_signature(request)
        spki = key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    except InvalidInputError:
        raise
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        x509.InvalidVersion,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ) as e:
        raise EncodingError(_WHAT, "does not parse as a PKCS #10 request") from e
    return Csr(key, spki, uris, dns_names, subject, bare)


def _names_of(request: x509.CertificateSigningRequest) -> _Names:
    try:
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return (), ()
    return (
        tuple(names.get_values_for_type(x509.UniformResourceIdentifier)),
        tuple(names.get_values_for_type(x509.DNSName)),
    )


def _check_signature(request: x509.CertificateSigningRequest) -> None:
    if not isinstance(request.signature_hash_algorithm, _HASHES):
        raise VerificationError("signature of the CSR is not over SHA-256, SHA-384 or SHA-512")
    if not request.is_signature_valid:
        raise VerificationError("signature of the CSR does not hold")
