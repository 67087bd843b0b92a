"""Server's side of a heartbeat: what a node shows between two attestations.

Its attestation key was activated when it attested, so a quote of that key, bound to this nonce and
to the key of the SVID on the stream, says all. What speaks against the machine by itself is in the
evidence once that quote holds: the host's judge changes the node's state by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.errors import AttestationError, Finding
from spire_hw.posture.evidence import Evidence, Occasion, Tier
from spire_hw.tpm.verify import Statement, find_unused_banks, qualifier
from spire_hw_plugins.nodeattestor.tpm import replay
from spire_hw_plugins.nodeattestor.tpm.statements import (
    Claim,
    check_quotes,
    counters_of,
    known_signer,
    refusal,
    selections,
)

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.posture.evidence import Counters
    from spire_hw.posture.heartbeat import HeartbeatAnswer, HeartbeatChallenge, KnownNode
    from spire_hw.posture.judge import EvidenceRequest
    from spire_hw_plugins.nodeattestor.tpm.statements import Quoted


async def check_heartbeat(
    node: KnownNode, challenge: HeartbeatChallenge, answer: HeartbeatAnswer, now: datetime
) -> Evidence:
    """Return what a heartbeat proved; see `spire_hw.posture.heartbeat.HeartbeatVerifier`.

    Raises:
        InvalidInputError: an answer that does not parse.
        LimitError: a log or list larger than allowed.
        AttestationError: a statement that does not hold.
    """
    signer = known_signer(node.ak_public, node.ak_hierarchy, node.ak_qualified_name)
    wanted, asked = challenge.wanted, selections(challenge.wanted.pcrs)
    expected = qualifier("heartbeat", challenge.nonce, node.svid_spki_sha256, b"", signer.ak.name)
    findings: list[Finding] = []
    claims = [Claim(Statement(q.attest, q.signature), q.pcrs) for q in answer.quotes]
    quoted = check_quotes(signer, expected, asked, claims, findings)
    if quoted is None or findings:
        raise AttestationError(findings)
    counters = _counters(node, quoted)
    unused = find_unused_banks(quoted.pcrs)
    shown = replay.Replayed(findings=tuple(unused))
    if not unused:  # no log belongs to a bank that firmware left alone
        proved = replay.Proved(quoted.pcrs, None if counters is None else counters.reset_count)
        shown = await replay.replay_logs(wanted, asked, _unpack(wanted, answer), proved)
    return Evidence(
        made_at=now,
        occasion=Occasion.HEARTBEAT,
        tier=Tier.QUOTE,
        ek=node.ek,
        ak_public=node.ak_public,
        ak_hierarchy=node.ak_hierarchy,
        ak_qualified_name=node.ak_qualified_name,
        ak_scramble=node.ak_scramble,
        key_in_tpm=node.key_in_tpm,
        counters=counters,
        pcrs=quoted.pcrs,
        boot=shown.boot,
        ima=shown.ima,
        boot_id=answer.boot_id,
        findings=shown.findings,
    )


def _counters(node: KnownNode, quoted: Quoted) -> Counters | None:
    """Return the true counters: of a key that scrambles them, by what was proved at attestation."""
    said = counters_of(quoted.clock, quoted.first.firmware_version)
    if node.ak_hierarchy == "endorsement":
        return said
    return None if node.ak_scramble is None else node.ak_scramble.undo(said)


def _unpack(wanted: EvidenceRequest, answer: HeartbeatAnswer) -> replay.Logs:
    is_asked = wanted.boot_log, wanted.ima is not None
    if any(
        part is not None and not asked
        for part, asked in zip((answer.boot_log, answer.ima), is_asked, strict=True)
    ):
        raise refusal("evidence_unasked", "envelope: evidence that was not asked for")
    return replay.Logs(
        boot=replay.unpack_log(answer.boot_log) if wanted.boot_log else None,
        ima=_unpack_list(answer.ima) if wanted.ima is not None else None,
        ima_from=answer.ima_from or 0,
    )


def _unpack_list(sent: tuple[bytes, ...] | None) -> tuple[bytes, ...]:
    size, parts = 0, []
    for part in sent or (None,):
        parts.append(replay.unpack_ima(part, size))
        size += len(parts[-1])
    return tuple(parts)
