r"""Checkpoints of a signer's audit log: how far it had come, signed by its log key.

What is signed is `"spire-hw audit checkpoint v1\n"` followed by canonical JSON of `at`, `clock`, `head`,
`log` and `taken`, hashed with the hash that goes with the key.

This module is pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import EncodingError, SpireHwError, VerificationError
from spire_hw.jose.text import encode_json, parse_json_object
from spire_hw.key import SignOptions, default_hash, fingerprint, spki_der, verify_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw.key import PublicKey

_DOMAIN: Final = b"spire-hw audit checkpoint v1\n"
_STATEMENT: Final = ("at", "clock", "head", "log", "taken")  # in the order of canonical JSON
_TEXTS: Final = ("clock", "head", "key", "log", "signature", "taken")
_MAX_BYTES: Final = 4096
_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far a log had come.

    Attributes:
        at: number of a record.
        head: its chain value.
    """

    at: int
    head: bytes


def statement_of(body: Mapping[str, Any]) -> bytes:
    """Return what is signed of a checkpoint record's members."""
    return _DOMAIN + encode_json({name: body[name] for name in _STATEMENT})


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


def read_checkpoint(line: bytes, key: PublicKey) -> Checkpoint:
    """Read a checkpoint as it stands in the log.

    Args:
        line: the record.
        key: the log key.

    Raises:
        EncodingError: it is none.
        VerificationError: as `verify_checkpoint`.
    """
    if len(line) > _MAX_BYTES:
        raise EncodingError("checkpoint", f"is longer than {_MAX_BYTES} bytes")
    body = parse_json_object(line, "checkpoint")
    at = body.get("at")
    if type(at) is not int or at < 1 or any(type(body.get(name)) is not str for name in _TEXTS):
        raise EncodingError("checkpoint", "lacks members, or has them of other types")
    if _HASH.fullmatch(body["head"]) is None or _HEX.fullmatch(body["signature"]) is None:
        raise EncodingError("checkpoint", "head and signature are not lower-case hexadecimal")
    verify_checkpoint(body, key)
    return Checkpoint(at, bytes.fromhex(body["head"]))
