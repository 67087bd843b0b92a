"""Keys in PEM files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from spire_hw.errors import InvalidInputError
from spire_hw.files import read_bounded
from spire_hw.key import PrivateKey, PublicKey, check_public_key

if TYPE_CHECKING:
    from pathlib import Path

_MAX_BYTES: Final = 1 << 20


def load_private_key(path: Path, *, pipes: bool = False) -> PrivateKey:
    """Return the RSA or EC private key of a PEM file, PKCS#8 or the older forms.

    Args:
        path: the file; other blocks may stand behind the key.
        pipes: as in `read_bounded`.

    Raises:
        NotReadyError: the file cannot be read.
        InvalidInputError: it holds none, one that is encrypted, or one that `check_public_key`
            refuses.
    """
    content = read_bounded(path, _MAX_BYTES, pipes=pipes)
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError as e:
        raise InvalidInputError(f"{path}: the private key is encrypted; decrypt it") from e
    except (ValueError, UnsupportedAlgorithm) as e:
        raise InvalidInputError(f"{path}: holds no private key in PEM (PKCS#8 or PKCS#1)") from e
    try:
        check_public_key(key.public_key())
    except InvalidInputError as e:
        raise InvalidInputError(f"{path}: {e.message}") from e
    return key  # type: ignore[return-value]  # check_public_key let EC and RSA alone through


def load_public_key(path: Path) -> PublicKey:
    """Return the RSA or EC public key of a PEM file (SubjectPublicKeyInfo).

    Raises:
        NotReadyError: the file cannot be read.
        InvalidInputError: it holds none, or one that `check_public_key` refuses.
    """
    content = read_bounded(path, _MAX_BYTES)
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as e:
        raise InvalidInputError(f"{path}: holds no public key in PEM") from e
    try:
        return check_public_key(key)
    except InvalidInputError as e:
        raise InvalidInputError(f"{path}: {e.message}") from e
