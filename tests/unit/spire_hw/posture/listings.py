"""Policies with a list of files, what they say to further entries, and keys that sign files."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spire_hw.posture.evaluate import evaluate
from tests.unit.spire_hw.posture.samples import FILES, IMA, good, policy

if TYPE_CHECKING:
    from spire_hw.posture.evidence import ImaEntry
    from spire_hw.posture.policy import Policy

LIST = b"".join(entry.digest.hex().encode() + b"  " + entry.path + b"\n" for entry in FILES)


def listing(more: str = "", files: dict[str, bytes] | None = None) -> Policy:
    return policy(f'ima {{ allow = ["@list"]\n{more} }}', files={"list": LIST, **(files or {})})


def failed(made: Policy, *more: ImaEntry, **changes: object) -> list[tuple[str, str]]:
    ima = replace(IMA, entries=(*FILES, *more), **changes)  # type: ignore[arg-type]
    verdict = evaluate(made, good(ima=ima))
    return [(check.code, check.message) for check in verdict.checks if not check.holds]


Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
KEYS: dict[str, Key] = {
    "rsa": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ec": ec.generate_private_key(ec.SECP256R1()),
}


def pem(key: Key) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
