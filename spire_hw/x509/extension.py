"""The certificate extensions we write, in DER.

Spec: RFC 5280 section 4.2; SPIFFE X509-SVID section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.x509 import der

if TYPE_CHECKING:
    from collections.abc import Sequence

_TRUE: Final = b"\x01\x01\xff"
_URI, _DNS_NAME, _KEY_ID = 0x86, 0x82, 0x80
_EXTENSIONS: Final = 0xA3


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension in words.

    Attributes:
        oid: dotted OID.
        value: DER of the extension's own type.
        critical: whether who does not know it must refuse.
    """

    oid: str
    value: bytes
    critical: bool = False

    def encode(self) -> bytes:
        """Return the DER Extension.

        Raises:
            EncodingError: the OID is not of the form 1.2.3.
        """
        return _extension(der.oid(self.oid), self.value, critical=self.critical)


def _extension(oid: bytes, value: bytes, *, critical: bool = False) -> bytes:
    return der.sequence(oid, _TRUE if critical else b"", der.encode(der.OCTET_STRING, value))


def _named_bits(first: int, unused: int) -> bytes:
    return der.encode(der.BIT_STRING, bytes((unused, first)))


# What we write into every certificate ourselves: nobody adds it a second time.
WRITTEN: Final = frozenset(
    {"2.5.29.14", "2.5.29.15", "2.5.29.17", "2.5.29.19", "2.5.29.35", "2.5.29.37"}
)
_KEY_USAGE: Final = der.oid("2.5.29.15")
_EXTENDED_KEY_USAGE: Final = der.oid("2.5.29.37")
_BASIC_CONSTRAINTS: Final = der.oid("2.5.29.19")
_SUBJECT_KEY_ID: Final = der.oid("2.5.29.14")
_AUTHORITY_KEY_ID: Final = der.oid("2.5.29.35")
_SUBJECT_ALTERNATIVE_NAME: Final = der.oid("2.5.29.17")
_SERVER_AUTH, _CLIENT_AUTH = der.oid("1.3.6.1.5.5.7.3.1"), der.oid("1.3.6.1.5.5.7.3.2")

# digitalSignature, keyEncipherment and keyAgreement are bits 0, 2 and 4; keyCertSign, cRLSign 5, 6.
SVID_KEY_USAGE: Final = _extension(_KEY_USAGE, _named_bits(0b1010_1000, 3), critical=True)
CA_KEY_USAGE: Final = _extension(_KEY_USAGE, _named_bits(0b0000_0110, 1), critical=True)
SVID_EXTENDED_KEY_USAGE: Final = _extension(
    _EXTENDED_KEY_USAGE, der.sequence(_SERVER_AUTH, _CLIENT_AUTH)
)
NOT_CA: Final = _extension(_BASIC_CONSTRAINTS, der.sequence(), critical=True)
CA: Final = _extension(_BASIC_CONSTRAINTS, der.sequence(_TRUE), critical=True)

_SKI_HEAD: Final = _extension(_SUBJECT_KEY_ID, der.encode(der.OCTET_STRING, bytes(20)))[:-20]
_SHA1_BYTES: Final = 20


def ca_with(path_length: int | None) -> bytes:
    """Return the basic constraints of a CA, with a limit to the CA certificates below it."""
    if path_length is None:
        return CA
    constraints = der.sequence(_TRUE, der.integer(path_length))
    return _extension(_BASIC_CONSTRAINTS, constraints, critical=True)


def subject_key_id(identifier: bytes) -> bytes:
    """Return the subject key identifier extension; 20 bytes as from SHA-1."""
    if len(identifier) == _SHA1_BYTES:
        return _SKI_HEAD + identifier
    return _extension(_SUBJECT_KEY_ID, der.encode(der.OCTET_STRING, identifier))


def authority_key_id(identifier: bytes) -> bytes:
    """Return the authority key identifier extension."""
    return _extension(_AUTHORITY_KEY_ID, der.sequence(der.encode(_KEY_ID, identifier)))


def subject_alternative_name(
    uris: Sequence[str], dns_names: Sequence[str] = (), *, critical: bool = False
) -> bytes:
    """Return the subject alternative name extension: URIs, then DNS names, all of them ASCII.

    Args:
        uris: checked URIs.
        dns_names: checked DNS names.
        critical: has to be set when the subject is empty.
    """
    names = [der.encode(_URI, uri.encode("ascii")) for uri in uris]
    names += [der.encode(_DNS_NAME, name.encode("ascii")) for name in dns_names]
    return _extension(_SUBJECT_ALTERNATIVE_NAME, der.sequence(*names), critical=critical)


# All of an extension with one URI but the URI: nearly every SVID is looked up here by its length.
_URI_HEADS: Final = tuple(
    (whole := subject_alternative_name(("x" * size,)))[: len(whole) - size] for size in range(256)
)


def uri_name(uri: str) -> bytes:
    """Return the subject alternative name extension of one checked URI, not critical."""
    if len(uri) < len(_URI_HEADS):
        return _URI_HEADS[len(uri)] + uri.encode("ascii")
    return subject_alternative_name((uri,))


def extensions(*encoded: bytes) -> bytes:
    """Return the [3] element of a certificate body."""
    return der.encode(_EXTENSIONS, der.sequence(*encoded))
