"""What a judgement leaves in the store: the posture, a line of the history, the IMA list."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from spire_hw.posture.document import encode_evidence
from spire_hw.posture.evidence import Tier
from spire_hw.posture.memory import encode_memory
from spire_hw_server.datastore.records import EvidenceRecord, ImaPart, Posture, PostureUpdate
from spire_hw_server.posture import imalist
from spire_hw_server.posture.deflated import deflate
from spire_hw_server.posture.outcome import failed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.posture.evidence import Evidence
    from spire_hw.posture.memory import Memory
    from spire_hw.posture.verdict import Check
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.posture.ledger import Known
    from spire_hw_server.posture.outcome import Outcome
    from spire_hw_server.posture.states import Standing

# Deflated; a larger one is not kept with the history, its digest is.
_MAX_DOCUMENT_BYTES: Final = 256 * 1024
_MAX_FINDINGS: Final = 64
_MAX_REASONS: Final = 16
_MAX_TEXT: Final = 1024


def update(agent_id: SpiffeId, outcome: Outcome, occasion: str) -> PostureUpdate:
    """Return what an outcome changes in the store.

    What shows nothing new has no record: the history would be full of it within a day.

    Args:
        agent_id: whose.
        outcome: what became of its evidence.
        occasion: for the history.
    """
    if outcome.is_routine and outcome.memory is not None:
        return _routine(agent_id, outcome, outcome.memory)
    evidence, verdict = outcome.evidence, outcome.verdict
    document = encode_evidence(evidence)
    packed = deflate(document)
    posture = posture_of(agent_id, outcome.standing, outcome.before)
    posture = replace(
        posture,
        policy=verdict.policy,
        policy_version=verdict.version,
        last_seen_at=evidence.made_at,
        memory="" if outcome.memory is None else encode_memory(outcome.memory),
    )
    if outcome.accepted and outcome.memory is not None:
        last = outcome.memory.last
        whole = packed if last == evidence else deflate(encode_evidence(last))
        # Who only proved which TPM it is has shown nothing of its machine.
        good_at = evidence.made_at if evidence.tier is Tier.QUOTE else None
        posture = replace(posture, last_good_at=good_at, evidence=whole)
    record = EvidenceRecord(
        made_at=evidence.made_at,
        occasion=occasion,
        verdict=verdict.action.value,
        state=outcome.standing.state.value,
        findings=encode_findings(failed(verdict.checks)),
        policy=verdict.policy,
        policy_version=verdict.version,
        policy_sha256=verdict.policy_sha256,
        evidence_sha256=hashlib.sha256(document).hexdigest(),
        summary=_summary(evidence),
        document=packed if len(packed) <= _MAX_DOCUMENT_BYTES else None,
    )
    return PostureUpdate(posture, record, _ima_part(outcome))


def _routine(agent_id: SpiffeId, outcome: Outcome, memory: Memory) -> PostureUpdate:
    at = outcome.evidence.made_at
    posture = replace(
        posture_of(agent_id, outcome.standing, outcome.before),
        last_good_at=at if outcome.evidence.tier is Tier.QUOTE else None,
        last_seen_at=at,
        memory=encode_memory(memory),
    )
    return PostureUpdate(posture, None, _ima_part(outcome))


def posture_of(agent_id: SpiffeId, standing: Standing, before: Known | None) -> Posture:
    """Return a posture in a state; all else is as it was before."""
    if before is None:
        posture = Posture(agent_id, standing.state.value, (), "", standing.since)
    else:
        posture = before.posture
    return replace(
        posture,
        state=standing.state.value,
        reasons=standing.reasons[:_MAX_REASONS],
        message=standing.message[:_MAX_TEXT],
        since=standing.since,
        evidence=None,
    )


def encode_findings(checks: Sequence[Check]) -> str:
    """Return checks as ASCII JSON: lists of rule, code, message, action."""
    rows = [[c.rule, c.code, c.message, c.action.value] for c in checks[:_MAX_FINDINGS]]
    return json.dumps(rows, separators=(",", ":")) if rows else ""


def decode_findings(text: str) -> list[list[str]]:
    """Return what `encode_findings` was given."""
    rows: list[list[str]] = json.loads(text) if text else []
    return rows


def _ima_part(outcome: Outcome) -> ImaPart | None:
    """Return what is to be added to the stored list; what waited to be stored goes with it."""
    waiting = [] if outcome.before is None else outcome.before.entries
    first = 0 if outcome.before is None else outcome.before.first
    shown = outcome.evidence.ima
    if not outcome.accepted or shown is None:
        return ImaPart(first, imalist.pack(waiting)) if waiting else None
    if shown.start and waiting:
        return ImaPart(first, imalist.pack((*waiting, *shown.entries)))
    if shown.entries or not shown.start:
        return ImaPart(shown.start, imalist.pack(shown.entries))
    return None


def _summary(evidence: Evidence) -> str:
    parts = [evidence.tier.value, f"{len(evidence.pcrs)} PCRs"]
    if evidence.counters is not None:
        counters = evidence.counters
        parts.append(f"reset {counters.reset_count}.{counters.restart_count}")
        parts.append(f"clock {counters.clock_ms} ms")
    if evidence.boot is not None:
        parts.append(f"boot log {evidence.boot.log_sha256[:12]}")
    if evidence.ima is not None:
        parts.append(f"IMA {evidence.ima.start} to {evidence.ima.state.count}")
    return ", ".join(parts)[:_MAX_TEXT]
