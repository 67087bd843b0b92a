"""Evidence held against a policy: every rule becomes a line that says what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spire_hw.posture.evidence import Evidence
    from spire_hw.posture.policy import Policy
    from spire_hw.posture.verdict import Verdict


def evaluate(policy: Policy, evidence: Evidence) -> Verdict:
    """Return what a policy says to evidence.

    Everything the policy asks for must be in the evidence: who judges a heartbeat that brought no
    boot log puts the facts of the same boot in first. Of an IMA list, the part at hand is judged.

    Args:
        policy: the one for this node.
        evidence: verified facts.

    Returns:
        One check per rule in the order TPM, PCRs, boot log, IMA; failing rules carry the reason
        code and the action of the policy. Selectors are there only when all checks hold.
    """
    raise NotImplementedError
