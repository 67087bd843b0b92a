"""Signatures at the end of files, as kernel modules have them: what in a PKCS#7 message is to be verified.

Taken is what the kernel itself takes for a module: SignedData without the content and without
signed attributes, so that each signature is one over the digest of the content. Certificates that
came along are not looked at: whose keys count is the policy's matter.

Spec: RFC 5652, section 5; Linux kernel, crypto/asymmetric_keys/pkcs7_verify.c.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from spire_hw.errors import EncodingError
from spire_hw.x509.der import (
    INTEGER,
    OBJECT_IDENTIFIER,
    OCTET_STRING,
    SEQUENCE,
    SET,
    Reader,
    dotted,
)

MAX_SIGNERS: Final = 4
_WHAT: Final = "appended signature"
_SIGNED_DATA: Final = "1.2.840.113549.1.7.2"
_DATA: Final = "1.2.840.113549.1.7.1"
_HASHES: Final = {
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
    "2.16.840.1.101.3.4.2.3": "sha512",
}
_CERTIFICATES, _LISTS, _KEY_ID, _ATTRIBUTES = 0xA0, 0xA1, 0x80, 0xA0


class SignedDigest(NamedTuple):
    """One signature over the digest of the content.

    Attributes:
        algorithm: of the digest, such as `sha256`.
        signature: PKCS#1 v1.5, or DER ECDSA-Sig-Value.
    """

    algorithm: str
    signature: bytes


def parse_appended(message: bytes) -> list[SignedDigest]:
    """Return the signatures of a message.

    Raises:
        EncodingError: it is not DER, not of this kind, or has more than `MAX_SIGNERS`.
    """
    outer = Reader(message, _WHAT)
    wrapped = outer.enter(SEQUENCE)
    outer.finish()
    _expect(wrapped, _SIGNED_DATA)
    explicit = wrapped.enter(0xA0)
    wrapped.finish()
    data = explicit.enter(SEQUENCE)
    explicit.finish()
    data.element(INTEGER)
    data.element(SET)
    content = data.enter(SEQUENCE)
    _expect(content, _DATA)
    content.finish()
    for tag in (_CERTIFICATES, _LISTS):
        if data.next_tag() == tag:
            data.element(tag)
    signers = data.enter(SET)
    data.finish()
    found: list[SignedDigest] = []
    while signers.more():
        if len(found) == MAX_SIGNERS:
            raise EncodingError(_WHAT, f"has more than {MAX_SIGNERS} signers", signers.at)
        found.append(_signer(signers.enter(SEQUENCE)))
    return found


def _signer(signer: Reader) -> SignedDigest:
    signer.element(INTEGER)
    signer.element(_KEY_ID if signer.next_tag() == _KEY_ID else SEQUENCE)
    digest = signer.enter(SEQUENCE)
    name = _HASHES.get(dotted(digest.content(OBJECT_IDENTIFIER)))
    if name is None:
        raise EncodingError(_WHAT, "digest algorithm is not accepted", signer.at)
    if signer.next_tag() == _ATTRIBUTES:
        raise EncodingError(_WHAT, "has signed attributes", signer.at)
    signer.element(SEQUENCE)
    signature = signer.content(OCTET_STRING)
    signer.finish()
    return SignedDigest(name, signature)


def _expect(reader: Reader, oid: str) -> None:
    at = reader.at
    if dotted(reader.content(OBJECT_IDENTIFIER)) != oid:
        raise EncodingError(_WHAT, f"is not of type {oid}", at)
