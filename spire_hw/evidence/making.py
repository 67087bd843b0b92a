"""Makes evidence: what is known of a key, what its device signs about it, and a witness's signature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spire_hw.errors import InvalidInputError
from spire_hw.evidence import yubihsm
from spire_hw.evidence.document import (
    MAX_NONCE_BYTES,
    MIN_NONCE_BYTES,
    Document,
    challenge,
    sign,
)
from spire_hw.plugin.custody import Custody, DeviceStatement

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from spire_hw.evidence.document import KeyReport
    from spire_hw.key import Signer
    from spire_hw.plugin.keymanager import Keys


@dataclass(frozen=True, slots=True)
class Witness:
    """Who signs evidence: a key, and what is known of that."""

    signer: Signer
    report: KeyReport


def check_nonce(nonce: bytes) -> None:
    """Refuse a nonce that is too short or too long.

    Raises:
        InvalidInputError: it is.
    """
    if not MIN_NONCE_BYTES <= len(nonce) <= MAX_NONCE_BYTES:
        raise InvalidInputError(
            f"a nonce has {MIN_NONCE_BYTES} to {MAX_NONCE_BYTES} bytes, not {len(nonce)}"
        )


async def make_evidence(
    keys: Keys,
    report: KeyReport,
    witness: Witness,
    *,
    nonce: bytes,
    attestation: Sequence[bytes],
    trust_domain: str,
    now: datetime,
) -> str:
    """Return signed evidence about a key.

    Args:
        keys: whose key it is.
        report: what is known of it.
        witness: who signs.
        nonce: the requester's.
        attestation: certificates the device gave out another way, that of the key first.
        trust_domain: what the key signs for.
        now: time.

    Raises:
        InvalidInputError: the nonce is too short or too long.
        AttestationError: the certificates are not about this key.
        PluginError: the KeyManager failed.
        SpireHwError: the witness could not sign.
    """
    check_nonce(nonce)
    statement: DeviceStatement | None
    if attestation:
        yubihsm.verify_attestation(attestation, report.spki, ())
        parts = {f"certificate_{n}": der for n, der in enumerate(attestation)}
        statement = DeviceStatement(yubihsm.KIND, parts)
        report = replace(report, evidence=replace(report.evidence, custody=Custody.HSM_ATTESTED))
    else:
        wanted = challenge(nonce, trust_domain, report.spki)
        statement = await keys.statement(report.key_id, wanted)
    document = Document(trust_domain, report, witness.report, nonce, now, statement)
    return await sign(document, witness.signer)
