"""Signatures on files are verified beside the event loop: after a boot there may be thousands."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from spire_hw.posture.evaluate import evaluate

if TYPE_CHECKING:
    from spire_hw.posture.evidence import Evidence
    from spire_hw.posture.policy import Policy

# Fewer take less time than a change of threads is worth.
_FEW: Final = 32


async def verify_ahead(policy: Policy | None, evidence: Evidence) -> None:
    """Do what takes long in judging evidence; what came of each signature is remembered.

    Args:
        policy: by which it is judged next.
        evidence: with its IMA list.
    """
    if policy is None or policy.ima is None or not policy.ima.keyring or evidence.ima is None:
        return
    if len(evidence.ima.entries) > _FEW:
        await asyncio.to_thread(evaluate, policy, evidence)
