"""A changed policy is held at once against what is stored of every node, without asking them.

What a node's past says is not looked at: that was done when the evidence came.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from spire_hw.errors import AttestationError, DeniedError, NotFoundError, SpireHwError
from spire_hw.posture.memory import encode_memory
from spire_hw.posture.verdict import Check, NodeState, Verdict
from spire_hw_server.datastore.records import EvidenceRecord, Page, PostureUpdate
from spire_hw_server.posture import states
from spire_hw_server.posture.ahead import verify_ahead
from spire_hw_server.posture.history import encode_findings, posture_of
from spire_hw_server.posture.outcome import StateChange, failed

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.posture.evidence import Evidence
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.posture.judge import NodeJudge
    from spire_hw_server.posture.ledger import Known, Ledger
    from spire_hw_server.posture.policies import Policies

_OCCASION: Final = "policy_update"
_PAGE: Final = 500


class Reevaluation:
    """Judges stored evidence again.

    Args:
        store: where nodes are.
        ledger: what is known of them.
        judge: makes verdicts and tells of changes.
        policies: the set in force.
        on_done: called after all nodes were judged.
        clock: time.
        log: where the result is told.
    """

    def __init__(
        self,
        store: Datastore,
        ledger: Ledger,
        judge: NodeJudge,
        policies: Policies,
        *,
        on_done: Callable[[], None],
        clock: Clock,
        log: Logger,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._judge = judge
        self._policies = policies
        self._on_done = on_done
        self._clock = clock
        self._log = log

    async def run(self) -> None:
        """Judge all nodes now and whenever the policies changed; ends only when cancelled."""
        watch = self._policies.watch
        while True:
            seen = watch.version
            try:
                await self.judge_all()
            except SpireHwError as e:
                self._log.error("Stored evidence could not be judged again", error=e.message)
            await watch.wait(seen)

    async def judge_all(self) -> None:
        """Judge all nodes once.

        Raises:
            UnavailableError: the store is away.
        """
        token, nodes, changed = "", 0, 0
        while True:
            postures, token = await self._store.list_postures(Page(_PAGE, token))
            for posture in postures:
                nodes += 1
                changed += await self._judge_one(posture.agent_id)
                await asyncio.sleep(0)
            if not token:
                break
        if changed:
            self._log.info(
                "Nodes were judged by changed policies", nodes=nodes, nodes_changed=changed
            )
        self._on_done()

    async def verdict(self, agent_id: SpiffeId, known: Known) -> Verdict | None:
        """Return what the policy in force says to what is stored; None without any policy.

        Raises:
            EncodingError: what is stored cannot be read.
        """
        if known.memory is None:
            return None
        try:
            policy = self._judge.policy_for(known.memory.last.ek)
        except AttestationError as e:
            finding = e.findings[0]
            action = self._judge.action_of(finding.code)
            check = Check("policy", False, finding.message, finding.code, action)
            return Verdict("", 0, "", (check,))
        if policy is None:
            return None
        evidence = await self.whole(agent_id, known)
        await verify_ahead(policy, evidence)
        return self._judge.by_policy(policy, evidence)

    async def whole(self, agent_id: SpiffeId, known: Known | None) -> Evidence:
        """Return all that a node showed in its present boot.

        Raises:
            NotFoundError: it never showed anything.
            EncodingError: what is stored cannot be read.
        """
        if known is None or known.memory is None:
            raise NotFoundError(f'there is no evidence of "{agent_id}"')
        last = known.memory.last
        if last.ima is None:
            return last
        entries = tuple(await self._ledger.ima_entries(agent_id))
        return replace(last, ima=replace(last.ima, start=0, entries=entries))

    async def _judge_one(self, agent_id: SpiffeId) -> bool:
        """Judge one node; tell whether its state changed."""
        try:
            known = await self._ledger.get(agent_id)
            if known is None or known.standing.state is NodeState.BANNED:
                return False
            if self._is_judged(known):
                return False
            verdict = await self.verdict(agent_id, known)
            if verdict is None:
                return False
            return await self._store_it(agent_id, known, verdict)
        except (NotFoundError, DeniedError):
            return False  # gone or changed meanwhile
        except SpireHwError as e:
            self._log.error(
                "Stored evidence of a node cannot be judged",
                agent_id=str(agent_id),
                error=e.message,
            )
            return False

    def _is_judged(self, known: Known) -> bool:
        """Tell whether a node was accepted by the policy that is in force for it."""
        if known.memory is None:
            return True
        try:
            policy = self._judge.policy_for(known.memory.last.ek)
        except AttestationError:
            return False
        return policy is not None and policy.sha256 == known.memory.policy_sha256

    async def _store_it(self, agent_id: SpiffeId, known: Known, verdict: Verdict) -> bool:
        now = self._clock.now()
        before = known.standing
        # What was wrong with evidence that is not stored is still wrong: it does not heal here.
        after = before if verdict.holds else states.after_evidence(before, verdict.checks, now)
        if known.memory is None or (after == before if not verdict.holds else before.is_cut_off):
            return False
        memory = known.memory
        if verdict.holds:
            memory = replace(memory, policy_sha256=verdict.policy_sha256)
        posture = replace(
            posture_of(agent_id, after, known),
            policy=verdict.policy,
            policy_version=verdict.version,
            memory=encode_memory(memory),
        )
        record = EvidenceRecord(
            made_at=now,
            occasion=_OCCASION,
            verdict=verdict.action.value,
            state=after.state.value,
            findings=encode_findings(failed(verdict.checks)),
            policy=verdict.policy,
            policy_version=verdict.version,
            policy_sha256=verdict.policy_sha256,
        )
        await self._judge.move(
            PostureUpdate(posture, record), StateChange(agent_id, before, after, _OCCASION)
        )
        return after != before
