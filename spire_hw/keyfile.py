"""Keys in PEM files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from spire_hw.errors import InvalidInputError
from spire_hw.files import parse_file
from spire_hw.key import PrivateKey, PublicKey, check_public_key

if TYPE_CHECKING:
    from pathlib import Path

_MAX_BYTES: Final = 1 << 20


def load_private_key(path: Path, *, pipes: bool = False) -> PrivateKey:
    """Return the RSA or EC private key of a PEM file, PKCS#8 or the older forms.

    Args:
        path: the file.
        pipes: as in `read_bounded`.

    Raises:
        NotReadyError: the file cannot be read.
        InvalidInputError: it holds none, one that is encrypted, or one that `check_public_key`
            refuses.
    """
    return parse_file(path, _MAX_BYTES, _parse_private, pipes=pipes)


def load_public_key(path: Path, what: str = "") -> PublicKey:
    """Return the RSA or EC public key of a PEM file (SubjectPublicKeyInfo).

    Args:
        path: the file.
        what: as in `read_bounded`.

    Raises:
        NotReadyError: the file cannot be read.
        InvalidInputError: it holds none, or one that `check_public_key` refuses.
    """
    return parse_file(path, _MAX_BYTES, _parse_public, what)


def _parse_private(content: bytes) -> PrivateKey:
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError as e:
        raise InvalidInputError("the private key is encrypted; decrypt it") from e
    except (ValueError, UnsupportedAlgorithm) as e:
        raise InvalidInputError("holds no private key in PEM (PKCS#8 or PKCS#1)") from e
    check_public_key(key.public_key())
    return key  # type: ignore[return-value]  # check_public_key let EC and RSA alone through


def _parse_public(content: bytes) -> PublicKey:
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as e:
        raise InvalidInputError("holds no public key in PEM") from e
    return check_public_key(key)
