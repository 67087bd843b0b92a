"""Between our key types and PKCS#11's: mechanisms, paddings, signature and public key formats.

Numbers are those of PKCS #11 v2.40, so that the host process needs no PKCS#11 library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils

from spire_hw.errors import InvalidInputError, SpireHwError
from spire_hw.key import (
    HashAlgorithm,
    KeyType,
    PublicKey,
    SignOptions,
    check_digest,
    check_public_key,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

CKM_RSA_PKCS_KEY_PAIR_GEN: Final = 0x0
CKM_RSA_PKCS: Final = 0x1
CKM_RSA_PKCS_PSS: Final = 0xD
CKM_EC_KEY_PAIR_GEN: Final = 0x1040
CKM_ECDSA: Final = 0x1041
CKK_RSA: Final = 0x0
CKK_EC: Final = 0x3

MECHANISM_NAMES: Final = {
    CKM_RSA_PKCS_KEY_PAIR_GEN: "CKM_RSA_PKCS_KEY_PAIR_GEN",
    CKM_RSA_PKCS: "CKM_RSA_PKCS",
    CKM_RSA_PKCS_PSS: "CKM_RSA_PKCS_PSS",
    CKM_EC_KEY_PAIR_GEN: "CKM_EC_KEY_PAIR_GEN",
    CKM_ECDSA: "CKM_ECDSA",
}

# DigestInfo up to the digest (RFC 8017 section 9.2, note 1).
_DIGEST_INFO: Final = {
    HashAlgorithm.SHA256: bytes.fromhex("3031300d060960864801650304020105000420"),
    HashAlgorithm.SHA384: bytes.fromhex("3041300d060960864801650304020205000430"),
    HashAlgorithm.SHA512: bytes.fromhex("3051300d060960864801650304020305000440"),
}
# (hash mechanism, mask generation function) of CK_RSA_PKCS_PSS_PARAMS.
_PSS: Final = {
    HashAlgorithm.SHA256: (0x250, 2),
    HashAlgorithm.SHA384: (0x260, 3),
    HashAlgorithm.SHA512: (0x270, 4),
}
_HALF_BYTES: Final = {KeyType.EC_P256: 32, KeyType.EC_P384: 48}
_CURVES: Final[dict[KeyType, ec.EllipticCurve]] = {
    KeyType.EC_P256: ec.SECP256R1(),
    KeyType.EC_P384: ec.SECP384R1(),
}
EC_PARAMS: Final = {
    KeyType.EC_P256: bytes.fromhex("06082a8648ce3d030107"),
    KeyType.EC_P384: bytes.fromhex("06052b81040022"),
}
_MODULUS_BITS: Final = {KeyType.RSA_2048: 2048, KeyType.RSA_4096: 4096}


class OtherKeyTypeError(InvalidInputError):
    """A key is of a type that is none of ours."""


@dataclass(frozen=True, slots=True)
class SignScheme:
    """How a token is asked for signatures of one kind.

    Attributes:
        mechanism: CKM number.
        pss: hash mechanism, mask generation function, salt bytes; None but for PSS.
        prefix: what comes before the digest.
        length: bytes of the digest that count.
    """

    mechanism: int
    pss: tuple[int, int, int] | None
    prefix: bytes
    length: int

    def data(self, digest: bytes) -> bytes:
        """Return what goes into C_Sign."""
        return self.prefix + digest[: self.length]


@dataclass(frozen=True, slots=True)
class PublicMaterial:
    """A public key as attributes; empty bytes where the token gave none.

    Attributes:
        key_type: CKK number.
        ec_params: CKA_EC_PARAMS.
        ec_point: CKA_EC_POINT.
        modulus: CKA_MODULUS, big-endian.
        exponent: CKA_PUBLIC_EXPONENT, big-endian.
    """

    key_type: int
    ec_params: bytes = b""
    ec_point: bytes = b""
    modulus: bytes = b""
    exponent: bytes = b""


def is_ec(key_type: KeyType) -> bool:
    """Tell whether a key type is elliptic-curve."""
    return key_type in _HALF_BYTES


def modulus_bits(key_type: KeyType) -> int:
    """Return the RSA modulus size of a key type."""
    return _MODULUS_BITS[key_type]


def key_bits(key_type: KeyType) -> int:
    """Return the size of a key type: of the RSA modulus, or of the curve."""
    return modulus_bits(key_type) if not is_ec(key_type) else 8 * _HALF_BYTES[key_type]


def mechanisms_for(key_type: KeyType) -> tuple[int, int]:
    """Return the mechanisms a token must have: key pair generation and signing."""
    if is_ec(key_type):
        return CKM_EC_KEY_PAIR_GEN, CKM_ECDSA
    return CKM_RSA_PKCS_KEY_PAIR_GEN, CKM_RSA_PKCS


def sign_scheme(key_type: KeyType, options: SignOptions) -> SignScheme:
    """Return how a token is asked for what `check_request` lets through.

    ECDSA takes the leftmost bits of a long digest; that is done here because many tokens refuse
    the long form. Only the mechanisms that do not hash are used.
    """
    size = options.hash.digest_size
    half = _HALF_BYTES.get(key_type)
    if half is not None:
        return SignScheme(CKM_ECDSA, None, b"", half)
    if not options.pss:
        return SignScheme(CKM_RSA_PKCS, None, _DIGEST_INFO[options.hash], size)
    return SignScheme(CKM_RSA_PKCS_PSS, (*_PSS[options.hash], options.salt_bytes), b"", size)


def check_request(key_type: KeyType, digest: bytes, options: SignOptions) -> None:
    """Refuse what no token is to be asked for.

    Raises:
        InvalidInputError: digest length, PSS on an EC key, or a salt that does not fit.
    """
    check_digest(digest, options)
    if not options.pss:
        return
    if is_ec(key_type):
        raise InvalidInputError("PSS options do not fit an EC key")
    longest = modulus_bits(key_type) // 8 - options.hash.digest_size - 2
    if options.salt_length < -1 or options.salt_bytes > longest:
        raise InvalidInputError(
            f"PSS salt length {options.salt_length} is out of range, at most {longest} fit"
        )


def signature_of(key_type: KeyType, raw: bytes) -> bytes:
    """Return a token's output as the contract wants it: DER for ECDSA, RSA as it is.

    Raises:
        SpireHwError: INTERNAL, the output cannot be a signature of such a key.
    """
    return signatures_of(key_type, (raw,))[0]


def signatures_of(key_type: KeyType, raws: Iterable[bytes]) -> list[bytes]:
    """Return outputs that one key made as the contract wants them; see `signature_of`.

    Raises:
        SpireHwError: INTERNAL, one cannot be a signature of such a key.
    """
    half = _HALF_BYTES.get(key_type)
    if half is None:
        size = modulus_bits(key_type) // 8
        return [_rsa_signature(size, raw) for raw in raws]
    return [_ecdsa_signature(half, raw) for raw in raws]


def _rsa_signature(size: int, raw: bytes) -> bytes:
    if len(raw) != size:
        raise SpireHwError(f"token returned an RSA signature of {len(raw)} bytes")
    return raw


def _ecdsa_signature(half: int, raw: bytes) -> bytes:
    if len(raw) != 2 * half:
        raise SpireHwError(f"token returned an ECDSA signature of {len(raw)} bytes")
    r, s = int.from_bytes(raw[:half]), int.from_bytes(raw[half:])
    if r == 0 or s == 0:
        raise SpireHwError("token returned an ECDSA signature with a zero half")
    return utils.encode_dss_signature(r, s)


def public_key_of(material: PublicMaterial) -> PublicKey:
    """Build the public key from a token's attributes.

    CKA_EC_POINT is a DER OCTET STRING around the point, yet raw points exist in the field and both
    start with 0x04: the exact length decides.

    Raises:
        InvalidInputError: `undecodable EC point`, or `spire_hw.key.check_public_key` refuses it;
            OtherKeyTypeError when it is none of ours.
    """
    if material.key_type == CKK_EC:
        return _ec_key_of(material)
    if material.key_type != CKK_RSA:
        raise OtherKeyTypeError(f"CKK 0x{material.key_type:x} is neither RSA nor EC")
    exponent = int.from_bytes(material.exponent)
    modulus = int.from_bytes(material.modulus)
    if modulus.bit_length() not in _MODULUS_BITS.values():
        raise OtherKeyTypeError(f"RSA-{modulus.bit_length()} is not a supported key type")
    try:
        public_key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError as e:
        raise InvalidInputError("undecodable RSA key") from e
    return check_public_key(public_key)


def _ec_key_of(material: PublicMaterial) -> PublicKey:
    key_type = next((t for t, p in EC_PARAMS.items() if p == material.ec_params), None)
    if key_type is None:
        raise OtherKeyTypeError("EC parameters are not those of P-256 or P-384")
    point = material.ec_point
    raw_length = 2 * _HALF_BYTES[key_type] + 1
    if len(point) == raw_length + 2 and point[:2] == bytes((0x04, raw_length)):
        point = point[2:]
    if len(point) != raw_length or point[0] != 0x04:  # noqa: PLR2004 - uncompressed point
        raise InvalidInputError("undecodable EC point")
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(_CURVES[key_type], point)
    except ValueError as e:
        raise InvalidInputError("undecodable EC point: not on the curve") from e
