"""Make a credential in software: seal a secret that one TPM alone can open, for one object alone.

The verifier's half of activation; needs no TPM and no native TPM library. The secret comes back
only from a TPM that holds the endorsement key's private half and has an object with the given
Name loaded.

Spec: TPM 2.0 Library, Part 1 "Credential Protection", Annex B.10 (RSA), C.6 (ECC).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from spire_hw.errors import InvalidInputError
from spire_hw.tpm import wire
from spire_hw.tpm.public import DECRYPT, RESTRICTED, Symmetric, TpmPublic, parse_public
from spire_hw.tpm.wire import sized

_LABEL: Final = b"IDENTITY\x00"
_HASHES: Final[dict[int, hashes.HashAlgorithm]] = {
    wire.ALG_SHA256: hashes.SHA256(),
    wire.ALG_SHA384: hashes.SHA384(),
    wire.ALG_SHA512: hashes.SHA512(),
}


@dataclass(frozen=True, slots=True)
class Challenge:
    """What TPM2_ActivateCredential takes, each with its 2-byte size prefix.

    Attributes:
        id_object: TPM2B_ID_OBJECT.
        encrypted_secret: TPM2B_ENCRYPTED_SECRET.
    """

    id_object: bytes
    encrypted_secret: bytes


def make_credential(ek_public: bytes | TpmPublic, name: bytes, secret: bytes) -> Challenge:
    """Seal a secret so that only the TPM holding both keys can open it.

    Args:
        ek_public: TPMT_PUBLIC bytes of the endorsement key, or the same parsed; RSA or ECC.
        name: object Name of the key under test, nameAlg (2 bytes, big-endian) followed by the
            digest.
        secret: 1 byte up to the digest size of the endorsement key's name algorithm.

    Returns:
        The TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET bytes, each with its 2-byte length prefix.

    Raises:
        EncodingError: ek_public does not parse.
        InvalidInputError: ek_public is not a restricted decryption key over AES-CFB, or the
            secret's length does not fit.

    Spec: TPM 2.0 Library, Part 1 "Credential Protection".
    """
    ek = ek_public if isinstance(ek_public, TpmPublic) else parse_public(ek_public)
    cipher = ek.symmetric
    if not ek.has(RESTRICTED | DECRYPT) or cipher is None or ek.name_alg not in _HASHES:
        raise InvalidInputError("endorsement key is not a restricted decryption key")
    if cipher not in (Symmetric(wire.ALG_AES, bits, wire.ALG_CFB) for bits in (128, 256)):
        raise InvalidInputError("endorsement key uses a cipher other than AES-128 or AES-256 CFB")
    if not 1 <= len(secret) <= _HASHES[ek.name_alg].digest_size:
        raise InvalidInputError(f"secret of {len(secret)} bytes does not fit the endorsement key")
    seed, encrypted = _share_seed(ek, _HASHES[ek.name_alg])
    blob = seal(ek.name_alg, cipher.bits, seed, name, secret)
    return Challenge(id_object=sized(blob), encrypted_secret=sized(encrypted))


def _share_seed(ek: TpmPublic, algorithm: hashes.HashAlgorithm) -> tuple[bytes, bytes]:
    key = ek.key
    if isinstance(key, ec.EllipticCurvePublicKey):
        return _share_seed_ecc(key, ek.spki, algorithm)
    seed = secrets.token_bytes(algorithm.digest_size)
    oaep = padding.OAEP(padding.MGF1(algorithm), algorithm, _LABEL)
    return seed, key.encrypt(seed, oaep)


def _share_seed_ecc(
    key: ec.EllipticCurvePublicKey, spki: bytes, algorithm: hashes.HashAlgorithm
) -> tuple[bytes, bytes]:
    size = (key.curve.key_size + 7) // 8
    ephemeral = ec.generate_private_key(key.curve)
    # Uncompressed points: a byte 04, x and y; a SubjectPublicKeyInfo ends with one.
    ours = ephemeral.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    our_x, our_y, their_x = ours[1 : size + 1], ours[size + 1 :], spki[-2 * size : -size]
    z = ephemeral.exchange(ec.ECDH(), key)
    seed = kdfe(algorithm.name, z, "IDENTITY", our_x, their_x, bits=algorithm.digest_size * 8)
    return seed, sized(our_x) + sized(our_y)


def seal(name_alg: int, cipher_bits: int, seed: bytes, name: bytes, secret: bytes) -> bytes:
    """Return the integrity-protected, encrypted secret (TPMS_ID_OBJECT) for a given seed.

    Args:
        name_alg: hash of the endorsement key, as the TPM numbers it.
        cipher_bits: AES key size of the endorsement key.
        seed: what both sides share.
        name: the Name the secret is bound to.
        secret: what is sealed.

    Returns:
        2-byte size and HMAC, then the encrypted identity.
    """
    digest_name, size = wire.HASHES[name_alg]
    storage = kdfa(digest_name, seed, "STORAGE", name, b"", bits=cipher_bits)
    # A zero IV is what the specification prescribes: every seed, and so every key, is used once.
    encryptor = Cipher(algorithms.AES(storage), CFB(bytes(16))).encryptor()
    identity = encryptor.update(sized(secret)) + encryptor.finalize()
    integrity = kdfa(digest_name, seed, "INTEGRITY", b"", b"", bits=size * 8)
    mac = hmac.digest(integrity, identity + name, digest_name)
    return sized(mac) + identity


def kdfa(
    hash_name: str, key: bytes, label: str, party_u: bytes, party_v: bytes, *, bits: int
) -> bytes:
    """Derive `bits` bits by counter-mode HMAC.

    Spec: TPM 2.0 Library, Part 1 "KDFa()"; NIST SP 800-108.
    """
    tail = label.encode() + b"\x00" + party_u + party_v + bits.to_bytes(4, "big")
    out, counter = b"", 1
    while len(out) * 8 < bits:
        out += hmac.digest(key, counter.to_bytes(4, "big") + tail, hash_name)
        counter += 1
    return out[: bits // 8]


def kdfe(
    hash_name: str, z: bytes, label: str, party_u: bytes, party_v: bytes, *, bits: int
) -> bytes:
    """Derive `bits` bits from an ECDH result.

    Spec: TPM 2.0 Library, Part 1 "KDFe for ECDH"; NIST SP 800-56A.
    """
    tail = z + label.encode() + b"\x00" + party_u + party_v
    out, counter = b"", 1
    while len(out) * 8 < bits:
        out += hashlib.new(hash_name, counter.to_bytes(4, "big") + tail).digest()
        counter += 1
    return out[: bits // 8]
