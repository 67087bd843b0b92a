r"""What the log key signs in a checkpoint.

It is `"spire-hw audit checkpoint v1\n"` followed by canonical JSON of `at`, `clock`, `head`, `log` and
`taken`, hashed with the hash that goes with the key.

This module is pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import SpireHwError, VerificationError
from spire_hw.key import SignOptions, default_hash, fingerprint, spki_der, verify_digest
from spire_hw_signer.audit.record import canonical

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw.key import PublicKey

_DOMAIN: Final = b"spire-hw audit checkpoint v1\n"
_STATEMENT: Final = ("at", "clock", "head", "log", "taken")


def statement_of(body: Mapping[str, Any]) -> bytes:
    """Return what is signed of a checkpoint record's members."""
    return _DOMAIN + canonical({name: body[name] for name in _STATEMENT})


def verify_checkpoint(body: Mapping[str, Any], key: PublicKey) -> None:
    """Check the signature of a checkpoint.

    Args:
        body: members of the record.
        key: the log key.

    Raises:
        VerificationError: another key signed it, or its content is not what was signed.
    """
    if body["key"] != fingerprint(spki_der(key)):
        raise VerificationError(f"is signed by another key, {body['key']}")
    algorithm = default_hash(key)
    digest = algorithm.digest(statement_of(body))
    try:
        verify_digest(key, digest, bytes.fromhex(body["signature"]), SignOptions(algorithm))
    except SpireHwError as e:
        raise VerificationError("has a signature that does not hold") from e
