"""What became of evidence, and what others are told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import AttestationError, ErrorKind, Finding
from spire_hw.posture.memory import has_rebooted
from spire_hw.posture.verdict import Action, NodeState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw.posture.evidence import Evidence
    from spire_hw.posture.memory import Memory
    from spire_hw.posture.verdict import Check, Verdict
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.posture.ledger import Known
    from spire_hw_server.posture.states import Standing

IMA_PCR: Final = 10


@dataclass(frozen=True, slots=True)
class StateChange:
    """A node got into another state, or into the same for another reason."""

    agent_id: SpiffeId
    before: Standing | None
    after: Standing
    occasion: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of evidence.

    Attributes:
        verdict: all checks, those of the policy and those against the node's past.
        by_policy: those of the policy alone, None when none applies.
        evidence: completed with what the same boot showed before.
        before: the node as it was known.
        standing: where it stands now.
        memory: what is remembered of it now.
    """

    verdict: Verdict
    by_policy: Verdict | None
    evidence: Evidence
    before: Known | None
    standing: Standing
    memory: Memory | None

    def change(self, agent_id: SpiffeId, occasion: str) -> StateChange:
        """Return what others are to be told."""
        before = None if self.before is None else self.before.standing
        return StateChange(agent_id, before, self.standing, occasion)

    @property
    def accepted(self) -> bool:
        """Tell whether the evidence is good."""
        return self.verdict.action is Action.ACCEPT

    @property
    def is_routine(self) -> bool:
        """Tell whether nothing changed but times and counters."""
        before = self.before
        if before is None or before.memory is None or not self.accepted:
            return False
        if before.standing != self.standing or not self._shows_the_same(before.memory):
            return False
        if has_rebooted(before.memory, self.evidence):
            return False
        return before.memory.policy_sha256 == self.verdict.policy_sha256

    def _shows_the_same(self, memory: Memory) -> bool:
        last, now = memory.last, self.evidence
        if _who(last) != _who(now):
            return False
        return last.boot == now.boot and all(
            last.pcrs.get(place) == value
            for place, value in now.pcrs.items()
            if place[1] != IMA_PCR
        )


def _who(evidence: Evidence) -> tuple[object, ...]:
    """Return what says which TPM it is, and how much was proved of it."""
    firmware = None if evidence.counters is None else evidence.counters.firmware_version
    ak = (evidence.ak_public, evidence.ak_hierarchy, evidence.ak_qualified_name)
    return (evidence.ek, ak, evidence.tier, evidence.key_in_tpm, firmware)


def failed(checks: Iterable[Check]) -> list[Check]:
    """Return the checks that do not hold, the heaviest first."""
    return sorted((c for c in checks if not c.holds), key=lambda c: -c.action.weight)


def refusal(outcome: Outcome) -> AttestationError:
    """Return the error for evidence that is not accepted."""
    denied = ErrorKind.PERMISSION_DENIED
    found = [Finding(c.code, c.message, denied) for c in failed(outcome.verdict.checks)]
    before = outcome.before
    if before is not None and before.standing.state is NodeState.QUARANTINED:
        reason = before.standing.reason
        found.insert(0, Finding(reason, f"node: quarantined: {reason}", denied))
    return AttestationError(found)
