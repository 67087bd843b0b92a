"""What a key is here: its type, its public half and something that signs with the private half.

A `Signer` gets digests and never shows its private key: the same protocol fits a TPM, a PKCS#11 token,
a remote signer and a software key. One that judges what it signs can ask for the whole (`Purpose`).
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from spire_hw import roca
from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError, WeakKeyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

_MIN_RSA_BITS, _MAX_RSA_BITS = 2048, 4096
_MIN_RSA_EXPONENT = 65537
_EC_CURVES: Final[dict[str, ec.EllipticCurve]] = {
    "secp256r1": ec.SECP256R1(),
    "secp384r1": ec.SECP384R1(),
    "secp521r1": ec.SECP521R1(),
}
# What stands before the point in a SubjectPublicKeyInfo, and how long the whole is.
EC_SPKI_HEADS: Final = {
    "secp256r1": bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200"),
    "secp384r1": bytes.fromhex("3076301006072a8648ce3d020106052b81040022036200"),
    "secp521r1": bytes.fromhex("30819b301006072a8648ce3d020106052b8104002303818600"),
}
_EC_BY_SIZE: Final = {91: "secp256r1", 120: "secp384r1", 158: "secp521r1"}


class KeyType(Enum):
    """Key types of the KeyManager contract; the value is upstream's enum number."""

    EC_P256 = 1
    EC_P384 = 2
    RSA_2048 = 3
    RSA_4096 = 4

    __hash__ = object.__hash__  # as HashAlgorithm's

    @property
    def config_name(self) -> str:
        """Return the name used in configuration files, such as `ec-p256`."""
        return self.name.lower().replace("_", "-")

    @classmethod
    def parse(cls, name: str) -> KeyType:
        """Return the type for a configuration name.

        Raises:
            InvalidInputError: no such type; the message lists those there are.
        """
        for member in cls:
            if member.config_name == name:
                return member
        known = ", ".join(m.config_name for m in cls)
        raise InvalidInputError(f"key type {name!r} is unknown; use one of {known}")


class HashAlgorithm(Enum):
    """Hashes a signature may be over; the value is Go's `crypto.Hash` number, as on the wire."""

    SHA256 = 5
    SHA384 = 6
    SHA512 = 7

    # Members are looked up by for each signature: Enum's own way takes a call for that.
    __hash__ = object.__hash__

    @property
    def digest_size(self) -> int:
        """Return the digest length in bytes."""
        return _HASHES[self].digest_size

    @property
    def instance(self) -> hashes.HashAlgorithm:
        """Return the matching object of `cryptography`."""
        return _HASHES[self]

    def digest(self, data: bytes) -> bytes:
        """Return the digest of data."""
        return _DIGESTS[self](data).digest()


_HASHES: dict[HashAlgorithm, hashes.HashAlgorithm] = {
    HashAlgorithm.SHA256: hashes.SHA256(),
    HashAlgorithm.SHA384: hashes.SHA384(),
    HashAlgorithm.SHA512: hashes.SHA512(),
}
_DIGESTS = {
    HashAlgorithm.SHA256: hashlib.sha256,
    HashAlgorithm.SHA384: hashlib.sha384,
    HashAlgorithm.SHA512: hashlib.sha512,
}
# Made once: building these objects costs a tenth of an ECDSA signature.
_PREHASHED = {algorithm: utils.Prehashed(instance) for algorithm, instance in _HASHES.items()}
_ECDSA = {algorithm: ec.ECDSA(prehashed) for algorithm, prehashed in _PREHASHED.items()}


@dataclass(frozen=True, slots=True)
class SignOptions:
    """How a digest is to be signed.

    Attributes:
        hash: the hash the digest was made with.
        pss: RSA-PSS instead of PKCS#1 v1.5; refused for EC keys.
        salt_length: PSS salt in bytes; -1 and 0 mean the length of the hash, as Go's markers do.
        urgent: a CA's certificate or a handshake waits for it: a busy device serves it first.
    """

    hash: HashAlgorithm
    pss: bool = False
    salt_length: int = -1
    urgent: bool = field(default=False, compare=False)

    @property
    def salt_bytes(self) -> int:
        """Return the PSS salt length with Go's markers resolved."""
        return self.salt_length if self.salt_length > 0 else self.hash.digest_size


class Purpose(Enum):
    """What a signature is for, and with it what is signed."""

    X509 = "x509"  # DER TBSCertificate
    CSR = "csr"  # DER CertificationRequestInfo
    JWT = "jwt"  # header.payload of a compact JWS


class Signer(Protocol):
    """A private key that signs digests."""

    @property
    def public_key(self) -> PublicKey:
        """Return the public half."""
        ...

    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        """Sign a digest.

        Args:
            digest: exactly `options.hash.digest_size` bytes.
            options: hash and padding.

        Returns:
            DER ECDSA-Sig-Value, or the RSA signature at modulus length.

        Raises:
            InvalidInputError: digest length or options do not fit the key.
            DeviceError: the device that holds the key failed.
        """
        ...


def sign_content(
    signer: Signer, purpose: Purpose, content: bytes, digest: bytes, options: SignOptions
) -> Awaitable[bytes]:
    """Sign content whose digest is known.

    A signer that wants to judge what it signs has a method `sign_content` with the arguments of
    this function after the first; every other gets the digest.

    Raises:
        SpireHwError: as `Signer.sign`, and DeniedError by the policy of such a signer.
    """
    judging = getattr(signer, "sign_content", None)
    if judging is None:
        return signer.sign(digest, options)
    signed: Awaitable[bytes] = judging(purpose, content, digest, options)
    return signed


def needs_check(signer: Signer) -> bool:
    """Tell whether a signer's signatures have yet to be verified before they are used.

    A Signer says that they need not by an attribute: `in_process`, its key lives in this process;
    or `verifies`, they were verified before they came, by something that is not the device.
    """
    return not (getattr(signer, "in_process", False) or getattr(signer, "verifies", False))


class SoftwareSigner:
    """A Signer over a private key in this process."""

    in_process = True

    def __init__(self, private_key: PrivateKey) -> None:
        self._private_key = private_key
        self._public_key = private_key.public_key()

    @property
    def public_key(self) -> PublicKey:
        """Return the public half."""
        return self._public_key

    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        """Sign a digest; see `Signer.sign`."""
        return sign_digest(self._private_key, digest, options)


def sign_digest(private_key: PrivateKey, digest: bytes, options: SignOptions) -> bytes:
    """Sign a digest with a software key; arguments and result as in `Signer.sign`."""
    check_digest(digest, options)
    if isinstance(private_key, ec.EllipticCurvePrivateKey):
        if options.pss:
            raise InvalidInputError("PSS options do not fit an EC key")
        return private_key.sign(digest, _ECDSA[options.hash])
    return private_key.sign(digest, _rsa_padding(options), _PREHASHED[options.hash])


def check_digest(digest: bytes, options: SignOptions) -> None:
    """Refuse a digest whose length is not that of its hash.

    Raises:
        InvalidInputError: wrong length.
    """
    if len(digest) != options.hash.digest_size:
        raise InvalidInputError(
            f"digest is {len(digest)} bytes, {options.hash.name} needs {options.hash.digest_size}"
        )


def verify_digest(
    public_key: PublicKey, digest: bytes, signature: bytes, options: SignOptions
) -> None:
    """Check a signature over a digest.

    Raises:
        SpireHwError: the signature does not hold (kind INTERNAL: our own key made it).
    """
    verify_digests(public_key, (digest,), (signature,), options)


def verify_digests(
    public_key: PublicKey,
    digests: Sequence[bytes],
    signatures: Sequence[bytes],
    options: SignOptions,
) -> None:
    """Check signatures that one key made in one way, each over the digest in its place.

    Raises:
        SpireHwError: one does not hold (kind INTERNAL: our own key made it); which is not told.
        ValueError: there are not as many signatures as digests.
    """
    pairs = zip(signatures, digests, strict=True)
    try:
        # Nothing else is done in between: a verification leaves little of it in the caches.
        if isinstance(public_key, ec.EllipticCurvePublicKey):
            verify_ec, ecdsa = public_key.verify, _ECDSA[options.hash]
            for signature, digest in pairs:
                verify_ec(signature, digest, ecdsa)
        else:
            verify_rsa, prehashed = public_key.verify, _PREHASHED[options.hash]
            rsa_padding = _rsa_padding(options)
            for signature, digest in pairs:
                verify_rsa(signature, digest, rsa_padding, prehashed)
    except InvalidSignature as e:
        raise SpireHwError(
            "signature does not verify with the key's own public key", kind=ErrorKind.INTERNAL
        ) from e


def _rsa_padding(options: SignOptions) -> padding.AsymmetricPadding:
    if options.pss:
        return padding.PSS(padding.MGF1(options.hash.instance), options.salt_bytes)
    return padding.PKCS1v15()


def generate_private_key(key_type: KeyType) -> PrivateKey:
    """Make a software key of the given type."""
    match key_type:
        case KeyType.EC_P256:
            return ec.generate_private_key(ec.SECP256R1())
        case KeyType.EC_P384:
            return ec.generate_private_key(ec.SECP384R1())
        case KeyType.RSA_2048:
            return rsa.generate_private_key(_MIN_RSA_EXPONENT, 2048)
        case KeyType.RSA_4096:
            return rsa.generate_private_key(_MIN_RSA_EXPONENT, 4096)


def key_type_of(public_key: PublicKey) -> KeyType:
    """Return the KeyType of a public key.

    Raises:
        InvalidInputError: a curve or size the KeyManager contract has no name for.
    """
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        by_curve = {"secp256r1": KeyType.EC_P256, "secp384r1": KeyType.EC_P384}
        found = by_curve.get(public_key.curve.name)
        name = public_key.curve.name
    else:
        found = {2048: KeyType.RSA_2048, 4096: KeyType.RSA_4096}.get(public_key.key_size)
        name = f"RSA-{public_key.key_size}"
    if found is None:
        raise InvalidInputError(f"{name} is not a supported key type")
    return found


def default_hash(public_key: PublicKey) -> HashAlgorithm:
    """Return the hash used with this key: SHA-384 for P-384, SHA-512 for P-521, else SHA-256."""
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        if public_key.curve.name == "secp384r1":
            return HashAlgorithm.SHA384
        if public_key.curve.name == "secp521r1":
            return HashAlgorithm.SHA512
    return HashAlgorithm.SHA256


def spki_der(public_key: PublicKey) -> bytes:
    """Return the DER SubjectPublicKeyInfo."""
    return public_key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def fingerprint(spki: bytes) -> str:
    """Return upstream's key fingerprint: lower-case hex SHA-256 of the SubjectPublicKeyInfo."""
    return hashlib.sha256(spki).hexdigest()


@lru_cache(maxsize=64)
def load_point(curve: str, point: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key of an encoded point; one exchange shows the same one in several places.

    Raises:
        ValueError: the point is malformed or not on the curve.
    """
    return ec.EllipticCurvePublicKey.from_encoded_point(_EC_CURVES[curve], point)


def parse_spki(der: bytes) -> PublicKey:
    """Read a DER SubjectPublicKeyInfo and check that the key is strong enough.

    Raises:
        InvalidInputError: does not parse, or `check_public_key` refuses it.
    """
    curve = _EC_BY_SIZE.get(len(der), "")
    if curve and der.startswith(EC_SPKI_HEADS[curve]):
        with contextlib.suppress(ValueError):  # what is wrong is told below
            return load_point(curve, der[len(EC_SPKI_HEADS[curve]) :])
    try:
        key = serialization.load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm) as e:
        raise InvalidInputError("public key does not parse as a SubjectPublicKeyInfo") from e
    return check_public_key(key)


def check_public_key(key: object) -> PublicKey:
    """Return key when it is RSA-2048 to RSA-4096 with e >= 65537, or on P-256, P-384 or P-521.

    Raises:
        InvalidInputError: any other key; the message says why.
        WeakKeyError: an RSA key of the faulty generator of CVE-2017-15361.
    """
    if isinstance(key, ec.EllipticCurvePublicKey):
        if key.curve.name in {"secp256r1", "secp384r1", "secp521r1"}:
            return key
        raise InvalidInputError(f"curve {key.curve.name} is not accepted")
    if isinstance(key, rsa.RSAPublicKey):
        if not _MIN_RSA_BITS <= key.key_size <= _MAX_RSA_BITS:
            raise InvalidInputError(
                f"RSA key has {key.key_size} bits; {_MIN_RSA_BITS} to {_MAX_RSA_BITS} are accepted"
            )
        if key.public_numbers().e < _MIN_RSA_EXPONENT:
            raise InvalidInputError("RSA exponent below 65537 is not accepted")
        if roca.is_marked(key.public_numbers().n):
            raise WeakKeyError("RSA key was made by a faulty generator (CVE-2017-15361)")
        return key
    raise InvalidInputError(f"{type(key).__name__} is not an RSA or EC key")
