"""What the configuration says of operators and of the audit log's witnesses, and the files it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from spire_hw.errors import InvalidInputError
from spire_hw.files import parse_file
from spire_hw_signer.orders import Operators

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from spire_hw.syslog import SyslogSettings

MAX_KEY_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class WitnessSettings:
    """Where checkpoints of the audit log go besides.

    Attributes:
        file: on another mount; None for none.
        syslog: None for none.
    """

    file: Path | None = None
    syslog: SyslogSettings | None = None


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """Who has to agree to what is done by hand.

    Attributes:
        files: public keys of operators, PEM, by their names.
        required: how many have to sign an order; 0 when none have to.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    required: int = 0


def load_operators(settings: OperatorSettings) -> Operators:
    """Read the operators' public keys.

    Raises:
        NotReadyError: a file cannot be read.
        InvalidInputError: one holds no Ed25519 public key, or two hold the same.
    """
    keys = {
        name: parse_file(file, MAX_KEY_BYTES, _parse_public, f"key of operator {name}")
        for name, file in settings.files.items()
    }
    raw = {key.public_bytes_raw() for key in keys.values()}
    if len(raw) != len(keys):
        raise InvalidInputError("two operators have the same key")
    return Operators(keys, settings.required)


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read an operator's private key, PEM without a passphrase.

    Raises:
        NotReadyError: it cannot be read.
        InvalidInputError: it is no such key.
    """
    return parse_file(path, MAX_KEY_BYTES, _parse_private, "operator's key", pipes=True)


def _parse_public(content: bytes) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as e:
        raise InvalidInputError("holds no PEM public key") from e
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidInputError("holds a key that is not Ed25519; `order keygen` makes one")
    return key


def _parse_private(content: bytes) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise InvalidInputError("holds no PEM private key without a passphrase") from e
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidInputError("holds a key that is not Ed25519; `order keygen` makes one")
    return key
