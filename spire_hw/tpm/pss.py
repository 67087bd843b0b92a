"""How long a salt an RSA-PSS signature was made with (no I/O).

A TPM takes no salt length: most use that of the hash, old ones as much as fits.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import rsa

    from spire_hw.key import HashAlgorithm

_TRAILER: Final = 0xBC


def pss_salt_bytes(key: rsa.RSAPublicKey, signature: bytes, algorithm: HashAlgorithm) -> int | None:
    """Return the length of the salt in a PSS signature, None when it has no such shape.

    Spec: RFC 8017, section 9.1.2.
    """
    numbers = key.public_numbers()
    size, digest_size = (key.key_size + 6) // 8, algorithm.digest_size
    opened = pow(int.from_bytes(signature, "big"), numbers.e, numbers.n)
    if opened.bit_length() > 8 * size:
        return None
    encoded = opened.to_bytes(size, "big")
    masked, digest = encoded[: -digest_size - 1], encoded[-digest_size - 1 : -1]
    mask = _mgf1(digest, len(masked), algorithm)
    block = bytes(a ^ b for a, b in zip(masked, mask, strict=True))
    block = bytes([block[0] & (0xFF >> (8 * size - key.key_size + 1))]) + block[1:]
    padding, _, salt = block.partition(b"\x01")
    if encoded[-1] != _TRAILER or any(padding) or padding == block:
        return None
    return len(salt)


def _mgf1(seed: bytes, size: int, algorithm: HashAlgorithm) -> bytes:
    name = algorithm.instance.name
    blocks = range(size // algorithm.digest_size + 1)
    made = (hashlib.new(name, seed + n.to_bytes(4, "big")).digest() for n in blocks)
    return b"".join(made)[:size]
