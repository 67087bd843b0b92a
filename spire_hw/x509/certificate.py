"""Reading what is already there: certificates in DER and PEM, their key identifiers.

Everything of `cryptography` that can fail on foreign bytes is called here once, so that its
exceptions stay in this room.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from spire_hw.errors import EncodingError
from spire_hw.key import PublicKey, check_public_key, spki_der
from spire_hw.x509 import der

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_CERTIFICATE_BYTES: Final = 64 * 1024
_WHAT: Final = "certificate"
_VERSION: Final = 0xA0
_NEGATIVE: Final = 0x80
_MAX_PEM_BYTES: Final = 4 * 1024 * 1024

# Names in a stranger's certificate may be longer than X.520 has them; the library would tell that
# on standard error.
warnings.filterwarnings("ignore", "Attribute's length must be", UserWarning)


def load_certificate(data: bytes) -> x509.Certificate:
    """Parse one certificate.

    Args:
        data: the DER certificate and nothing after it, at most 64 KiB.

    Raises:
        EncodingError: not a certificate, or one whose extensions do not parse.
    """
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise EncodingError(_WHAT, f"is longer than {MAX_CERTIFICATE_BYTES} bytes")
    _check_serial(data)
    try:
        certificate = x509.load_der_x509_certificate(data)
        _read_all(certificate)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension) as e:
        raise EncodingError(_WHAT, "does not parse as X.509 DER") from e
    except (x509.InvalidVersion, x509.UnsupportedGeneralNameType) as e:
        raise EncodingError(_WHAT, "has an unknown version or name form") from e
    return certificate


def _check_serial(data: bytes) -> None:
    body = der.Reader(data, _WHAT).enter(der.SEQUENCE).enter(der.SEQUENCE)
    if body.next_tag() == _VERSION:
        body.enter(_VERSION)
    serial = body.content(der.INTEGER)
    if not any(serial) or serial[0] >= _NEGATIVE:
        raise EncodingError(_WHAT, "serial number is not positive")


def _read_all(certificate: x509.Certificate) -> None:
    """Touch what the library parses only when asked, so that nothing fails later."""
    _ = certificate.version, certificate.serial_number
    _ = certificate.subject, certificate.issuer
    _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    _ = certificate.extensions


def load_chain(chain: bytes) -> list[x509.Certificate]:
    """Parse concatenated DER certificates, as the Workload API carries chains.

    Raises:
        EncodingError: anything but one certificate after the other.
    """
    return [load_certificate(part) for part in der.split(chain, "certificate chain")]


def load_pem(text: bytes) -> list[x509.Certificate]:
    """Parse the certificates of a PEM file; errors as in `parse_pem` and `load_certificate`."""
    return [load_certificate(data) for data in parse_pem(text)]


def public_key_of(certificate: x509.Certificate) -> PublicKey:
    """Return the certificate's key when it is strong enough.

    Raises:
        EncodingError: the key does not parse.
        InvalidInputError: `spire_hw.key.check_public_key` refuses it.
    """
    try:
        key = certificate.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise EncodingError(_WHAT, "has a public key that does not parse") from e
    return check_public_key(key)


def key_identifier(spki: bytes) -> bytes:
    """Return the SHA-1 key identifier of a DER SubjectPublicKeyInfo.

    Raises:
        EncodingError: not a SubjectPublicKeyInfo.

    Spec: RFC 5280 section 4.2.1.2, method 1.
    """
    return hashlib.sha1(der.public_key_bits(spki), usedforsecurity=False).digest()


def subject_key_id(certificate: x509.Certificate) -> bytes:
    """Return the subject key identifier: the extension's, or the SHA-1 one of the key without it."""
    try:
        return certificate.extensions.get_extension_for_class(
            x509.SubjectKeyIdentifier
        ).value.digest
    except x509.ExtensionNotFound:
        return key_identifier(spki_der(public_key_of(certificate)))


def issuing_authority_id(chain: Sequence[x509.Certificate]) -> str:
    """Return the lower-case hex key identifier of the root a chain leads to, "" when it is not said.

    Args:
        chain: leaf first, root left out.

    Spec: RFC 5280 section 4.2.1.1.
    """
    try:
        extension = chain[-1].extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    except x509.ExtensionNotFound:
        return ""
    return (extension.value.key_identifier or b"").hex()


def encode_der(certificate: x509.Certificate) -> bytes:
    """Return the DER bytes of a certificate."""
    return certificate.public_bytes(serialization.Encoding.DER)


def sha1_fingerprint(certificate: x509.Certificate) -> str:
    """Return upstream's name of a certificate: lower-case hex SHA-1 of the DER."""
    return hashlib.sha1(encode_der(certificate), usedforsecurity=False).hexdigest()


def encode_pem(certificates: Iterable[bytes]) -> bytes:
    """Return DER certificates as PEM blocks, one after the other."""
    return b"".join(
        load_certificate(data).public_bytes(serialization.Encoding.PEM) for data in certificates
    )


def parse_pem(text: bytes) -> list[bytes]:
    """Return the DER bytes of all certificates in a PEM file; other blocks are passed over.

    Raises:
        EncodingError: no certificate in it, or one that does not parse.
    """
    if len(text) > _MAX_PEM_BYTES:
        raise EncodingError("PEM", f"is longer than {_MAX_PEM_BYTES} bytes")
    try:
        found = x509.load_pem_x509_certificates(text)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as e:
        raise EncodingError("PEM", "holds no certificate, or one that does not parse") from e
    encoded = [encode_der(certificate) for certificate in found]
    for data in encoded:
        load_certificate(data)
    return encoded
