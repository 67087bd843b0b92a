"""Signatures on certificates and revocation lists of TPM vendors: one link, over the original bytes.

Spec: RFC 5280, section 4.1.1.2; RFC 4055 (PSS identifiers).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding

from spire_hw.errors import AttestationError, ErrorKind, Finding, InvalidInputError
from spire_hw.tpm import der

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.key import PublicKey

MGF1: Final = "1.2.840.113549.1.1.8"
_RSASSA_PSS: Final = "1.2.840.113549.1.1.10"
HASH_OIDS: Final[dict[str, hashes.HashAlgorithm]] = {
    "1.3.14.3.2.26": hashes.SHA1(),  # noqa: S303 - only for pinned certificates and OAEP
    "2.16.840.1.101.3.4.2.1": hashes.SHA256(),
    "2.16.840.1.101.3.4.2.2": hashes.SHA384(),
    "2.16.840.1.101.3.4.2.3": hashes.SHA512(),
}
# Signature algorithm: hash, and whether it is for RSA.
_SIGNATURES: Final[dict[str, tuple[hashes.HashAlgorithm, bool]]] = {
    "1.2.840.113549.1.1.5": (hashes.SHA1(), True),  # noqa: S303 - only for pinned certificates
    "1.2.840.113549.1.1.11": (hashes.SHA256(), True),
    "1.2.840.113549.1.1.12": (hashes.SHA384(), True),
    "1.2.840.113549.1.1.13": (hashes.SHA512(), True),
    "1.2.840.10045.4.1": (hashes.SHA1(), False),  # noqa: S303 - only for pinned certificates
    "1.2.840.10045.4.3.2": (hashes.SHA256(), False),
    "1.2.840.10045.4.3.3": (hashes.SHA384(), False),
    "1.2.840.10045.4.3.4": (hashes.SHA512(), False),
}
_CONTEXT: Final = (0xA0, 0xA1, 0xA2, 0xA3)


class Signed(Protocol):
    """A certificate or revocation list, as far as its signature goes; see `Certificate`."""

    @property
    def tbs(self) -> bytes:
        """Return the signed part, as it came."""
        ...

    @property
    def signature_algorithm(self) -> bytes:
        """Return the raw AlgorithmIdentifier."""
        ...

    @property
    def signature(self) -> bytes:
        """Return the signature."""
        ...


def verify_signature(subject: Signed, key: PublicKey, *, allow_sha1: bool = False) -> None:
    """Check that a key signed something, over the original bytes.

    Raises:
        InvalidInputError: the algorithm is not accepted.
        AttestationError: `ek_untrusted`, the signature does not verify.
    """
    algorithm, pss = _read_algorithm(subject.signature_algorithm)
    if isinstance(algorithm, hashes.SHA1) and not allow_sha1:
        raise InvalidInputError("ek: signature algorithm sha1 is not accepted")
    if not _is_signed(subject, key, algorithm, pss):
        text = "ek: signature does not verify"
        raise AttestationError([Finding("ek_untrusted", text, ErrorKind.PERMISSION_DENIED)])


def is_sha1(subject: Signed) -> bool:
    """Tell whether a signature is over SHA-1.

    Raises:
        InvalidInputError: its algorithm is none we know.
    """
    return isinstance(_read_algorithm(subject.signature_algorithm)[0], hashes.SHA1)


def _is_signed(
    subject: Signed,
    key: PublicKey,
    algorithm: hashes.HashAlgorithm,
    pad: padding.AsymmetricPadding | None,
) -> bool:
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            if pad is not None:
                return False
            key.verify(subject.signature, subject.tbs, ec.ECDSA(algorithm))
        elif pad is None:
            return False
        else:
            key.verify(subject.signature, subject.tbs, pad, algorithm)
    except (InvalidSignature, ValueError):
        return False
    return True


@lru_cache(maxsize=64)
def _read_algorithm(
    raw: bytes,
) -> tuple[hashes.HashAlgorithm, padding.AsymmetricPadding | None]:
    """Return hash and RSA padding, None as padding for ECDSA."""
    parts = der.read_all(raw, "ek: signature algorithm", der.SEQUENCE).members()
    kind = der.oid(parts[0]) if parts else ""
    if kind == _RSASSA_PSS and len(parts) == 2:  # noqa: PLR2004 - with parameters
        return _read_pss(parts[1])
    if kind not in _SIGNATURES:
        raise InvalidInputError(f"ek: signature algorithm {kind or 'none'} is not accepted")
    algorithm, is_rsa = _SIGNATURES[kind]
    # NULL has no place after an ECDSA identifier, but one manufacturer's root has it there.
    if [one.raw for one in parts[1:]] not in ([], [b"\x05\x00"]):
        raise InvalidInputError("ek: signature algorithm has unexpected parameters")
    return algorithm, padding.PKCS1v15() if is_rsa else None


def _read_pss(parameters: der.Value) -> tuple[hashes.HashAlgorithm, padding.AsymmetricPadding]:
    refused = InvalidInputError("ek: RSASSA-PSS parameters are not supported")
    algorithm: hashes.HashAlgorithm = hashes.SHA1()  # noqa: S303 - the default, refused later
    mask: hashes.HashAlgorithm | None = algorithm
    salt = 20
    for part in parameters.expect(der.SEQUENCE).members():
        inner = der.read(part.content, "ek: signature algorithm")
        if part.tag == _CONTEXT[0]:
            members = inner.expect(der.SEQUENCE).members()
            found = HASH_OIDS.get(der.oid(members[0])) if members else None
            if found is None:
                raise refused
            algorithm = found
        elif part.tag == _CONTEXT[1]:
            mask = mgf_hash(inner.expect(der.SEQUENCE).members())
        elif part.tag == _CONTEXT[2]:
            salt = der.integer(inner)
        elif part.tag != _CONTEXT[3] or der.integer(inner) != 1:
            raise refused
    if mask is None or mask.name != algorithm.name or salt != algorithm.digest_size:
        raise refused
    return algorithm, padding.PSS(padding.MGF1(algorithm), salt)


def mgf_hash(mgf: Sequence[der.Value]) -> hashes.HashAlgorithm | None:
    """Return the hash of a mask generation function's identifier, None for another kind."""
    if len(mgf) != 2:  # noqa: PLR2004 - function, hash
        return None
    parts = mgf[1].expect(der.SEQUENCE).members()
    return HASH_OIDS.get(der.oid(parts[0])) if parts else None
