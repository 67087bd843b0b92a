"""Signatures on files as IMA lists them: does a key of ours vouch for a digest?

A key id alone proves nothing, it can be copied onto any file; so the signature is verified.

Version 2 signs the digest of the content. Version 3 signs what kind of digest it is as well, and
is the only one for fs-verity's: such a digest is that of a descriptor, which a file could hold as
its content. A signature at the end of the file is over the content in front of it.

Source: struct signature_v2_hdr and struct ima_file_id of the kernel's security/integrity/integrity.h;
key ids as evmctl and the kernel make them, the last 4 bytes of the subject key identifier.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.posture.appended import parse_appended
from spire_hw.posture.evidence import VERITY

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

    from spire_hw.posture.evidence import AppendedSignature, ImaEntry

_HEADER: Final = struct.Struct(">BBB4sH")
_DIGSIG: Final = 3
_VERITY_DIGSIG: Final = 6
_OF_DIGEST, _OF_FILE_ID = 2, 3
_KEY_ID_BYTES: Final = 4
_MIN_RSA_BITS: Final = 2048
_MAX_SIGNATURE: Final = 1024
_PEM: Final = b"-----BEGIN "
# The kernel's numbers (include/uapi/linux/hash_info.h).
_HASHES: Final[dict[int, tuple[str, hashes.HashAlgorithm]]] = {
    4: ("sha256", hashes.SHA256()),
    5: ("sha384", hashes.SHA384()),
    6: ("sha512", hashes.SHA512()),
}
_NUMBERS: Final = {name: number for number, (name, _) in _HASHES.items()}


@dataclass(frozen=True, slots=True)
class FileKey:
    """A key that signs files.

    Attributes:
        key_id: 4 bytes by which signatures name it.
        spki: DER SubjectPublicKeyInfo; RSA of 2048 bits or more, or EC.
    """

    key_id: bytes
    spki: bytes

    def check(self, algorithm: hashes.HashAlgorithm, digest: bytes, signature: bytes) -> bool:
        """Tell whether this key signed a digest."""
        key = _public_key(self.spki)
        prehashed = utils.Prehashed(algorithm)
        try:
            if isinstance(key, rsa.RSAPublicKey):
                key.verify(signature, digest, padding.PKCS1v15(), prehashed)
            elif isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(signature, digest, ec.ECDSA(prehashed))
            else:
                return False
        except InvalidSignature:
            return False
        return True


def load_keys(pem: bytes) -> list[FileKey]:
    """Return the keys of PEM certificates and public keys.

    Raises:
        InvalidInputError: nothing usable is in it, or something else.
    """
    found = []
    for block in _blocks(pem):
        try:
            if b"CERTIFICATE" in block.splitlines()[0]:
                found.append(_of_certificate(x509.load_pem_x509_certificate(block)))
            else:
                key = serialization.load_pem_public_key(block)
                found.append(FileKey(_key_id(key), _spki(key)))
        except InvalidInputError:
            raise
        except (ValueError, UnsupportedAlgorithm) as e:
            raise InvalidInputError("holds something that is no certificate or public key") from e
    if not found:
        raise InvalidInputError("holds no PEM certificate or public key")
    return found


def is_signed(entry: ImaEntry, keyring: Iterable[FileKey], algorithms: Collection[str]) -> bool:
    """Tell whether a key of the keyring signed an entry's file.

    Args:
        entry: with its signatures.
        keyring: whose count.
        algorithms: kinds of digests that count.
    """
    if entry.algorithm in algorithms and _has_signature(entry, keyring):
        return True
    appended = entry.appended
    return (
        appended is not None
        and appended.algorithm in algorithms
        and _has_appended(appended, keyring)
    )


def _has_signature(entry: ImaEntry, keyring: Iterable[FileKey]) -> bool:
    raw = entry.signature
    if len(raw) <= _HEADER.size:
        return False
    kind, version, number, key_id, size = _HEADER.unpack_from(raw)
    name, algorithm = _HASHES.get(number, ("", None))
    signature = raw[_HEADER.size :]
    if algorithm is None or size != len(signature) or size > _MAX_SIGNATURE:
        return False
    is_verity = entry.algorithm.startswith(VERITY)
    if name != entry.algorithm.removeprefix(VERITY) or len(entry.digest) != algorithm.digest_size:
        return False
    digest = entry.digest
    if (kind, version) == (_VERITY_DIGSIG if is_verity else _DIGSIG, _OF_FILE_ID):
        digest = hashlib.new(name, bytes((kind, number)) + digest).digest()
    elif is_verity or (kind, version) != (_DIGSIG, _OF_DIGEST):
        return False
    return any(
        key.key_id == key_id and _is_signed(key, number, digest, signature) for key in keyring
    )


def _has_appended(appended: AppendedSignature, keyring: Iterable[FileKey]) -> bool:
    """Tell whether a key signed the content; such signatures name keys in too many ways."""
    number = _NUMBERS.get(appended.algorithm)
    if number is None or len(appended.digest) != _HASHES[number][1].digest_size:
        return False
    try:
        signers = parse_appended(appended.signature)
    except EncodingError:
        return False
    return any(
        signer.algorithm == appended.algorithm
        and len(signer.signature) <= _MAX_SIGNATURE
        and any(_is_signed(key, number, appended.digest, signer.signature) for key in keyring)
        for signer in signers
    )


# Machines of a fleet show the same files again and again.
@lru_cache(maxsize=16384)
def _is_signed(key: FileKey, number: int, digest: bytes, signature: bytes) -> bool:
    return key.check(_HASHES[number][1], digest, signature)


@lru_cache(maxsize=64)
def _public_key(spki: bytes) -> PublicKeyTypes:
    return serialization.load_der_public_key(spki)


def _blocks(pem: bytes) -> list[bytes]:
    return [_PEM + part for part in pem.split(_PEM)[1:]]


def _of_certificate(certificate: x509.Certificate) -> FileKey:
    key = certificate.public_key()
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        return FileKey(_key_id(key), _spki(key))
    return FileKey(extension.value.digest[-_KEY_ID_BYTES:], _spki(key))


def _key_id(key: PublicKeyTypes) -> bytes:
    """Return the id of a key without certificate: from the SHA-1 of its bits."""
    if isinstance(key, rsa.RSAPublicKey):
        bits = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.PKCS1)
    elif isinstance(key, ec.EllipticCurvePublicKey):
        form = serialization.PublicFormat.UncompressedPoint
        bits = key.public_bytes(serialization.Encoding.X962, form)
    else:
        raise InvalidInputError("holds a key that is neither RSA nor EC")
    return hashlib.sha1(bits, usedforsecurity=False).digest()[-_KEY_ID_BYTES:]


def _spki(key: PublicKeyTypes) -> bytes:
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < _MIN_RSA_BITS:
            raise InvalidInputError(
                f"holds an RSA key of {key.key_size} bits, needs {_MIN_RSA_BITS}"
            )
    elif not isinstance(key, ec.EllipticCurvePublicKey):
        raise InvalidInputError("holds a key that is neither RSA nor EC")
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
