"""What operators do to nodes by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.posture.memory import encode_memory
from spire_hw.posture.verdict import NodeState
from spire_hw_server.datastore.records import BY_OPERATOR, EvidenceRecord, Posture, PostureUpdate
from spire_hw_server.posture import states
from spire_hw_server.posture.history import posture_of
from spire_hw_server.posture.outcome import StateChange

if TYPE_CHECKING:
    from spire_hw.clock import Clock
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.posture.judge import NodeJudge
    from spire_hw_server.posture.ledger import Known, Ledger
    from spire_hw_server.posture.reevaluate import Reevaluation
    from spire_hw_server.posture.revocation import Revocation
    from spire_hw_server.posture.states import Standing

MAX_COMMENT = 1024
_OCCASION = "operator"


class Operators:
    """Quarantine and its end by hand."""

    def __init__(
        self,
        store: Datastore,
        ledger: Ledger,
        judge: NodeJudge,
        reevaluation: Reevaluation,
        revocation: Revocation,
        *,
        clock: Clock,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._judge = judge
        self._reevaluation = reevaluation
        self._revocation = revocation
        self._clock = clock

    async def quarantine(self, agent_id: SpiffeId, comment: str) -> Posture:
        """Take a node's identity away until an operator releases it.

        Raises:
            NotFoundError: no such node.
            NotReadyError: it is banned.
            InvalidInputError: the comment is too long or cannot be shown.
        """
        _check_comment(comment)
        known = await self._known(agent_id)
        now = self._clock.now()
        before = states.new(now) if known is None else known.standing
        after = states.quarantined_by_operator(before, comment, now)
        posture = posture_of(agent_id, after, known)
        return await self._store_it(posture, known, after, comment, "quarantine")

    async def release(self, agent_id: SpiffeId, comment: str) -> Posture:
        """Lift a quarantine after what is stored of the node was judged again.

        The machine is then taken as it shows itself next: whoever releases it has looked at it.

        Raises:
            NotFoundError: no such node.
            NotReadyError: it is in no quarantine, its policy does not allow what it showed, or
                its certificates are revoked.
            InvalidInputError: the comment is too long or cannot be shown.
        """
        _check_comment(comment)
        known = await self._known(agent_id)
        if known is None or known.standing.state is not NodeState.QUARANTINED:
            raise NotReadyError(f'agent "{agent_id}" is in no quarantine')
        verdict = await self._reevaluation.verdict(agent_id, known)
        if verdict is not None and not verdict.holds:
            findings = "; ".join(f"{c.message} [{c.code}]" for c in verdict.checks if not c.holds)
            raise NotReadyError(f"what is stored of the node does not hold: {findings}")
        revoked = await self._revocation.findings(agent_id)
        if revoked:
            findings = "; ".join(f"{f.message} [{f.code}]" for f in revoked)
            raise NotReadyError(f"what the node was let in with does not hold: {findings}")
        now = self._clock.now()
        after = states.released(now)
        posture = posture_of(agent_id, after, known)
        if known.memory is not None:
            memory = replace(known.memory, lenient=True, held_reset=None)
            posture = replace(posture, memory=encode_memory(memory), last_good_at=now)
        return await self._store_it(posture, known, after, comment, "accept")

    @staticmethod
    def is_by_operator(posture: Posture | None) -> bool:
        """Tell whether an operator put a node where it is."""
        return posture is not None and BY_OPERATOR in posture.reasons

    async def _known(self, agent_id: SpiffeId) -> Known | None:
        node = await self._store.get_node(agent_id)
        if node.banned:
            raise NotReadyError(f'agent "{agent_id}" is banned; evicting it lifts the ban')
        return await self._ledger.get(agent_id, fresh=True)

    async def _store_it(
        self, posture: Posture, known: Known | None, after: Standing, comment: str, verdict: str
    ) -> Posture:
        record = EvidenceRecord(
            made_at=self._clock.now(),
            occasion=_OCCASION,
            verdict=verdict,
            state=posture.state,
            policy=posture.policy,
            policy_version=posture.policy_version,
            summary=comment,
        )
        before = None if known is None else known.standing
        await self._judge.move(
            PostureUpdate(posture, record, by_operator=True),
            StateChange(posture.agent_id, before, after, _OCCASION),
        )
        return posture


def _check_comment(comment: str) -> None:
    if len(comment) > MAX_COMMENT:
        raise InvalidInputError(f"comment is longer than {MAX_COMMENT} characters")
    if comment and not comment.isprintable():
        raise InvalidInputError("comment has characters that cannot be shown")
