"""What policy, and a node's past, make of proved evidence; and what that does to the node.

One judge serves attestations (as the `Judge` an attestor asks) and heartbeats. Nothing is stored
when a node is refused without a state: anybody may try, and only an audit record remains.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from spire_hw.errors import (
    AttestationError,
    DeniedError,
    ErrorKind,
    Finding,
    NotFoundError,
)
from spire_hw.posture.drift import DriftRules, compare
from spire_hw.posture.evaluate import evaluate
from spire_hw.posture.evidence import Occasion, Tier
from spire_hw.posture.judge import EvidenceRequest
from spire_hw.posture.memory import advance, complete, has_same_facts
from spire_hw.posture.policy import ek_selectors
from spire_hw.posture.reasons import action_of
from spire_hw.posture.verdict import Action, NodeState, Verdict
from spire_hw_server.datastore.records import NO_KEYS
from spire_hw_server.posture import history, states
from spire_hw_server.posture.ahead import verify_ahead
from spire_hw_server.posture.outcome import IMA_PCR, Outcome, StateChange, refusal
from spire_hw_server.posture.states import Heal

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.posture.evidence import EkFacts, Evidence
    from spire_hw.posture.policy import Policy
    from spire_hw.posture.verdict import Check
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.records import PostureUpdate
    from spire_hw_server.posture.ledger import Known, Ledger
    from spire_hw_server.posture.policies import Policies
    from spire_hw_server.postureconfig import PostureSettings

_MAX_JUDGED: Final = 1024
_QUOTED: Final = f"tier:{Tier.QUOTE.value}"
_NO_POLICY: Final = Verdict("", 0, "", ())
# What a heartbeat quotes of a machine of which nothing was quoted before.
_BOOT_PCRS: Final = (("sha256", tuple(range(8))),)


class NodeJudge:
    """Judges nodes; also the `Judge` of attestors.

    Args:
        store: where nodes are kept.
        ledger: what is known of them.
        policies: which are in force.
        settings: the operator's.
        clock: time.
        log: takes the audit records.
        on_change: hears of every change this server makes.
    """

    def __init__(
        self,
        store: Datastore,
        ledger: Ledger,
        policies: Policies,
        settings: PostureSettings,
        *,
        clock: Clock,
        log: Logger,
        on_change: Callable[[StateChange], None],
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._policies = policies
        self._settings = settings
        self._clock = clock
        self._log = log
        self._on_change = on_change
        # Attestations that were accepted and are not stored yet.
        self._judged: OrderedDict[SpiffeId, tuple[Evidence, Policy | None, Outcome]] = OrderedDict()

    @property
    def is_active(self) -> bool:
        """Tell whether postures are kept at all."""
        return self._settings.given or bool(self._policies.current)

    async def request(self, agent_id: SpiffeId, ek: EkFacts) -> EvidenceRequest:
        """Return what to ask of a node; see `spire_hw.posture.judge.Judge`."""
        policy = self.policy_for(ek)
        if not self.is_active:
            return EvidenceRequest()
        known = await self._ledger.get(agent_id, fresh=True)
        if known is not None:
            _refuse_cut_off(known)
        return self.wanted(policy, known)

    async def judge(self, agent_id: SpiffeId, evidence: Evidence) -> Verdict:
        """Return what becomes of an attestation; see `spire_hw.posture.judge.Judge`."""
        policy = self.policy_for(evidence.ek)
        if not self.is_active:
            if evidence.findings:
                raise AttestationError(list(evidence.findings))
            await self._refuse_fallback(agent_id, evidence)
            return _NO_POLICY
        await verify_ahead(policy, evidence)
        known = await self._ledger.get(agent_id)
        if known is not None:
            _refuse_cut_off(known)
        if known is None or known.memory is None:
            await self._refuse_fallback(agent_id, evidence)
        outcome = self.assess(known, evidence, policy)
        if not outcome.accepted:
            await self.record(agent_id, outcome, evidence.occasion.value)
            raise refusal(outcome)
        self._judged[agent_id] = (evidence, policy, outcome)
        if len(self._judged) > _MAX_JUDGED:
            self._judged.popitem(last=False)
        return outcome.verdict

    async def _refuse_fallback(self, agent_id: SpiffeId, evidence: Evidence) -> None:
        """Refuse less than what a node of which no evidence is kept was let in with.

        Raises:
            AttestationError: `downgrade`; evicting the node lifts it.
        """
        if evidence.tier is Tier.QUOTE:
            return
        node = await self._store.find_node(agent_id, NO_KEYS)
        if node is not None and any(s.value == _QUOTED for s in node.selectors):
            text = "policy: node attested with quotes before and may not fall back"
            raise AttestationError([Finding("downgrade", text, ErrorKind.PERMISSION_DENIED)])

    def policy_for(self, ek: EkFacts) -> Policy | None:
        """Return the policy of a node, None where there is none at all.

        Raises:
            AttestationError: `no_policy`, there are some, or have to be, and none is for this node.
        """
        policies = self._policies.current
        policy = policies.policy_for(ek_selectors(ek))
        if policy is None and (policies or self._settings.require_policy):
            text = "policy: no policy applies to this node (default is deny)"
            raise AttestationError([Finding("no_policy", text, ErrorKind.FAILED_PRECONDITION)])
        return policy

    def wanted(
        self, policy: Policy | None, known: Known | None, *, anew: bool = False
    ) -> EvidenceRequest:
        """Return what an attestation has to show.

        The part of the IMA list that is new, unless what is known of the list was not judged by
        this policy, or did not hold.

        Args:
            policy: of the node.
            known: the node, None for one that never showed evidence.
            anew: the IMA list is wanted from its start.
        """
        memory = None if known is None else known.memory
        if policy is None:
            return EvidenceRequest()
        if memory is None or known is None:
            return policy.request()
        if anew or known.standing.is_cut_off or memory.policy_sha256 != policy.sha256:
            request = policy.request()
            if request.ima is None or memory.ima is None or not memory.ima.count:
                return request
            return replace(request, known_ima=memory.ima, reset_count=memory.reset_count)
        return policy.request(memory.ima, memory.reset_count)

    def wanted_by_heartbeat(
        self, policy: Policy | None, known: Known, *, whole: bool, anew: bool = False
    ) -> EvidenceRequest:
        """Return what a heartbeat has to show.

        Args:
            policy: of the node.
            known: the node; it has shown evidence before.
            whole: the boot log is wanted although the facts of the same boot are known.
            anew: the IMA list is wanted from its start.
        """
        request = self.wanted(policy, known, anew=anew)
        memory = known.memory
        if request.boot_log and not whole and memory is not None and memory.last.boot is not None:
            request = replace(request, boot_log=False)
        if request.pcrs:
            return request
        places = sorted(() if memory is None else memory.last.pcrs)
        banks = dict.fromkeys(bank for bank, _ in places)
        pcrs = tuple((bank, tuple(n for b, n in places if b == bank)) for bank in banks)
        return replace(request, pcrs=pcrs or _BOOT_PCRS)

    def assess(self, known: Known | None, evidence: Evidence, policy: Policy | None) -> Outcome:
        """Return what evidence comes to; nothing is stored."""
        memory = None if known is None else known.memory
        whole = complete(memory, evidence)
        actions = dict(self._settings.drift)
        if policy is not None:
            actions |= policy.drift
        rules = DriftRules(
            min_boot_time=self._settings.min_boot_time,
            actions=actions,
            firmware_by_policy=policy is not None and bool(policy.tpm.firmware_floors),
        )
        drift = compare(memory, whole, rules)
        by_policy = None if policy is None else self._by_policy(policy, known, whole)
        found = by_policy or _NO_POLICY
        verdict = replace(found, checks=(*drift, *found.checks))
        return self._outcome(known, whole, verdict, by_policy)

    def _outcome(
        self,
        known: Known | None,
        evidence: Evidence,
        verdict: Verdict,
        by_policy: Verdict | None,
    ) -> Outcome:
        now = self._clock.now()
        before = states.new(now) if known is None else known.standing
        anew = evidence.occasion is Occasion.ATTESTATION
        standing = states.after_evidence(before, verdict.checks, now, anew=anew)
        memory = None if known is None else known.memory
        if verdict.action is Action.ACCEPT and not standing.is_cut_off:
            memory = advance(memory, evidence, verdict.policy_sha256)
        elif memory is not None and standing != before and standing.heals is Heal.BOOT:
            held = None if evidence.counters is None else evidence.counters.reset_count
            memory = replace(memory, held_reset=held)
        return Outcome(verdict, by_policy, evidence, known, standing, memory)

    def _by_policy(self, policy: Policy, known: Known | None, evidence: Evidence) -> Verdict:
        """Return the policy's verdict, the one before when nothing it looks at changed."""
        if known is not None and known.memory is not None and known.verdict is not None:
            last = known.memory.last
            quiet = evidence.ima is None or not (evidence.ima.entries or evidence.ima.violations)
            if (
                quiet
                and known.verdict.policy_sha256 == policy.sha256
                and has_same_facts(
                    replace(last, ima=None, pcrs=_plain(last, evidence)),
                    replace(evidence, ima=None, findings=(), pcrs=_plain(evidence, evidence)),
                )
            ):
                return known.verdict
        return self.by_policy(policy, replace(evidence, findings=()))

    def by_policy(self, policy: Policy, evidence: Evidence) -> Verdict:
        """Return what a policy says, with the actions the server's configuration has."""
        found = evaluate(policy, evidence)
        return replace(found, checks=tuple(self._by_operator(c, policy) for c in found.checks))

    def action_of(self, code: str) -> Action:
        """Return what a reason does where no policy says otherwise."""
        return action_of(code, self._settings.drift)

    def _by_operator(self, check: Check, policy: Policy) -> Check:
        """Return a check with the action the server's configuration has for it."""
        code = check.code
        if check.holds or code in policy.drift or code not in self._settings.drift:
            return check
        return replace(check, action=self.action_of(code))

    async def admitted(
        self, agent_id: SpiffeId, evidence: Evidence
    ) -> tuple[PostureUpdate, Outcome] | None:
        """Return what is to be stored with an attested node, None when postures are not kept.

        Raises:
            AttestationError: it does not hold any more: policy or node changed meanwhile.
        """
        if not self.is_active:
            return None
        policy = self.policy_for(evidence.ek)
        known = await self._ledger.get(agent_id)
        if known is not None:
            _refuse_cut_off(known)
        outcome = self._judged_before(agent_id, evidence, policy, known)
        if outcome is None:
            outcome = self.assess(known, evidence, policy)
        if not outcome.accepted:
            raise refusal(outcome)
        return history.update(agent_id, outcome, Occasion.ATTESTATION.value), outcome

    def _judged_before(
        self, agent_id: SpiffeId, evidence: Evidence, policy: Policy | None, known: Known | None
    ) -> Outcome | None:
        """Return what `judge` came to, if all it looked at is still the same."""
        judged = self._judged.pop(agent_id, None)
        if judged is None:
            return None
        shown, by, outcome = judged
        same = shown is evidence and by is policy and outcome.before is known
        return outcome if same else None

    async def record(self, agent_id: SpiffeId, outcome: Outcome, occasion: str) -> None:
        """Store what an outcome does to a node; a node that is not stored has no state."""
        before = outcome.before
        if outcome.verdict.action is Action.REFUSE:
            return
        if before is not None and not outcome.accepted and before.standing == outcome.standing:
            return
        try:
            await self.move(
                history.update(agent_id, outcome, occasion), outcome.change(agent_id, occasion)
            )
        except NotFoundError:
            return
        except DeniedError as e:
            self._log.warning("Node was changed meanwhile", agent_id=str(agent_id), error=e.message)
            self._ledger.forget(agent_id)

    async def move(self, update: PostureUpdate, change: StateChange) -> None:
        """Store a change of a node and tell about it.

        Raises:
            NotFoundError: the node is gone.
            DeniedError: it was banned, or put into a quarantine, meanwhile.
            UnavailableError: the store is away.
        """
        await self._store.set_posture(update)
        self._ledger.forget(change.agent_id)
        self.tell(change)

    def tell(self, change: StateChange) -> None:
        """Write the audit record of a change and let others hear of it."""
        before, after = change.before, change.after
        if before is not None and (before.state, before.reasons) == (after.state, after.reasons):
            return
        write = self._log.warning if after.reasons else self._log.info
        write(
            "Node state changed",
            type="audit",
            agent_id=str(change.agent_id),
            state=after.state.value,
            state_before=(before.state if before is not None else NodeState.NEW).value,
            reasons=list(after.reasons),
            message=after.message,
            occasion=change.occasion,
        )
        self._on_change(change)


def _plain(of: Evidence, like: Evidence) -> dict[tuple[str, int], bytes]:
    """Return the values of the PCRs that other evidence has, without that of the IMA list."""
    return {
        place: of.pcrs[place] for place in like.pcrs if place[1] != IMA_PCR and place in of.pcrs
    }


def _refuse_cut_off(known: Known) -> None:
    """Refuse what no evidence brings back.

    Raises:
        DeniedError: the node is banned, or in a quarantine an operator has to lift.
    """
    standing = known.standing
    if standing.state is NodeState.BANNED:
        raise DeniedError("node: banned")
    if standing.state is NodeState.QUARANTINED and standing.heals is Heal.OPERATOR:
        raise DeniedError(f"node: quarantined: {standing.reason}")
