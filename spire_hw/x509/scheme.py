"""How we sign: the hash and algorithm identifier that go with a key, and the signing itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.key import (
    HashAlgorithm,
    PublicKey,
    Purpose,
    Signer,
    SignOptions,
    default_hash,
    needs_check,
    sign_content,
    verify_digest,
)
from spire_hw.x509 import der

_NULL: Final = b"\x05\x00"
_ECDSA: Final = {
    HashAlgorithm.SHA256: der.sequence(der.oid("1.2.840.10045.4.3.2")),
    HashAlgorithm.SHA384: der.sequence(der.oid("1.2.840.10045.4.3.3")),
    HashAlgorithm.SHA512: der.sequence(der.oid("1.2.840.10045.4.3.4")),
}
_RSA: Final = {
    HashAlgorithm.SHA256: der.sequence(der.oid("1.2.840.113549.1.1.11"), _NULL),
    HashAlgorithm.SHA384: der.sequence(der.oid("1.2.840.113549.1.1.12"), _NULL),
    HashAlgorithm.SHA512: der.sequence(der.oid("1.2.840.113549.1.1.13"), _NULL),
}


def algorithm_identifier(hash_algorithm: HashAlgorithm, *, ecdsa: bool) -> bytes:
    """Return the DER AlgorithmIdentifier of ECDSA, or RSA PKCS#1 v1.5, over a hash.

    Spec: RFC 5758 section 3.2; RFC 4055 section 5.
    """
    return (_ECDSA if ecdsa else _RSA)[hash_algorithm]


@dataclass(frozen=True, slots=True)
class SignatureScheme:
    """What a key signs certificates with.

    Attributes:
        options: hash and padding for the Signer.
        algorithm: DER AlgorithmIdentifier.
    """

    options: SignOptions
    algorithm: bytes


def scheme_of(public_key: PublicKey) -> SignatureScheme:
    """Return the scheme of a key: ECDSA with the curve's hash, RSA PKCS#1 v1.5 with SHA-256."""
    chosen = default_hash(public_key)
    is_ec = isinstance(public_key, ec.EllipticCurvePublicKey)
    return SignatureScheme(SignOptions(chosen), algorithm_identifier(chosen, ecdsa=is_ec))


async def seal(
    to_be_signed: bytes,
    signer: Signer,
    scheme: SignatureScheme,
    *,
    purpose: Purpose = Purpose.X509,
    check: bool | None = None,
    urgent: bool = False,
) -> bytes:
    """Sign a certificate or request body and return the whole.

    Args:
        to_be_signed: DER body.
        signer: whose signature it gets.
        scheme: the scheme of the signer's key.
        purpose: what the body is, told to signers that judge what they sign.
        check: verify the signature before it leaves; None checks when `needs_check` says so (a
            device, process or host may answer with anything).
        urgent: a busy device serves it before others, see `SignOptions`.

    Raises:
        SpireHwError: the signature does not verify (INTERNAL), or what the signer raises.
    """
    options = replace(scheme.options, urgent=True) if urgent else scheme.options
    digest = options.hash.digest(to_be_signed)
    signature = await sign_content(signer, purpose, to_be_signed, digest, options)
    if check or (check is None and needs_check(signer)):
        verify_digest(signer.public_key, digest, signature, options)
    return der.sequence(to_be_signed, scheme.algorithm, der.bit_string(signature))
