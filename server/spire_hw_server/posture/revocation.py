"""Nodes whose certificates were revoked while they are attested lose their identity.

An attestor looks at revocation lists when a node attests, which may be hours ago. What a node was
let in with is therefore kept, and held against the lists again when these have changed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from spire_hw.errors import (
    AttestationError,
    DeniedError,
    EncodingError,
    InvalidInputError,
    NotFoundError,
    SpireHwError,
)
from spire_hw.plugin.nodeattestor import Rechecks
from spire_hw.posture.reasons import action_of
from spire_hw.posture.verdict import Action, Check
from spire_hw_server.datastore.records import EvidenceRecord, Page, PostureUpdate
from spire_hw_server.posture import states
from spire_hw_server.posture.history import encode_findings, posture_of
from spire_hw_server.posture.outcome import StateChange

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw.clock import Clock
    from spire_hw.errors import Finding
    from spire_hw.log import Logger
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.records import Certificates, NodeCertificates
    from spire_hw_server.posture.judge import NodeJudge
    from spire_hw_server.posture.ledger import Known, Ledger
    from spire_hw_server.postureconfig import PostureSettings

# Attestors look at their files once a minute.
LOOK_S: Final = 30.0
# More than the longest attestation takes, with the storing of the node.
_UNDER_WAY_S: Final = 180.0
_OCCASION: Final = "revocation"
_RULE: Final = "certificates"
_PAGE: Final = 200


class Revocation:
    """Holds the certificates of attested nodes against lists that have changed.

    Args:
        store: where nodes are.
        ledger: what is known of them.
        judge: knows policies, and tells of changes.
        settings: the operator's.
        clock: time.
        log: where trouble is reported.
    """

    def __init__(
        self,
        store: Datastore,
        ledger: Ledger,
        judge: NodeJudge,
        settings: PostureSettings,
        *,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._judge = judge
        self._settings = settings
        self._clock = clock
        self._log = log
        self._attestors: dict[str, Rechecks] = {}
        # By attestor; a server that starts has not looked at any.
        self._seen: dict[str, int | None] = {}
        # When to look again: what was under way at a change was judged by the lists before it.
        self._again_at: dict[str, float] = {}

    def use(self, attestors: Mapping[str, object]) -> None:
        """Take the attestors that can look at certificates again."""
        self._attestors.update({n: a for n, a in attestors.items() if isinstance(a, Rechecks)})

    async def run(self) -> None:
        """Look now and on a schedule; ends only when cancelled."""
        while True:
            try:
                await self.look()
            except SpireHwError as e:
                self._log.error("Could not look for revoked certificates", error=e.message)
            await self._clock.sleep(LOOK_S)

    async def look(self) -> None:
        """Look at the nodes of all attestors whose lists have changed since the last look.

        Once more when the attestations have ended that were under way then.

        Raises:
            SpireHwError: the store is away; the next look starts again.
        """
        versions = {name: await a.lists_version() for name, a in self._attestors.items()}
        now = self._clock.monotonic()
        changed = {
            name
            for name, number in versions.items()
            if number is not None and self._seen.get(name) != number
        }
        self._again_at |= {n: now + _UNDER_WAY_S for n in changed if n in self._seen}
        due = changed | {name for name, at in self._again_at.items() if at <= now}
        failed = await self._look_at_all(due) if due else set()
        self._seen |= {n: number for n, number in versions.items() if n not in failed}
        self._again_at = {n: at for n, at in self._again_at.items() if at > now or n in failed}

    async def findings(self, agent_id: SpiffeId) -> list[Finding]:
        """Return why a node's certificates are revoked, empty when they are not.

        Raises:
            NotFoundError: no such node.
            InvalidInputError: what is stored cannot be read.
        """
        node = await self._store.get_node(agent_id)
        certificates = await self._store.get_certificates(agent_id)
        if node.attestation_type not in self._attestors or not certificates:
            return []
        return await self._recheck(node.attestation_type, certificates)

    async def _recheck(self, name: str, certificates: Certificates) -> list[Finding]:
        """Ask an attestor; what one node sent may not end the looking at all others."""
        try:
            return await self._attestors[name].recheck(certificates)
        except SpireHwError:
            raise
        except Exception as e:
            self._log.exception("Node attestor failed unexpectedly", node_attestor_type=name)
            raise InvalidInputError(f"nodeattestor({name}): failed unexpectedly") from e

    async def _look_at_all(self, names: set[str]) -> set[str]:
        """Look at the nodes of some attestors; return those of which a node is still to be done."""
        failed: set[str] = set()
        token = ""
        while True:
            page, token = await self._store.list_certificates(Page(_PAGE, token))
            for shown in page:
                if shown.attestation_type in names:
                    if not await self._look_at(shown):
                        failed.add(shown.attestation_type)
                    await asyncio.sleep(0)
            if not token:
                return failed

    async def _look_at(self, shown: NodeCertificates) -> bool:
        """Look at one node; tell whether no further look is needed."""
        try:
            if shown.certificates is None:
                raise EncodingError("certificates of a node", "cannot be read")
            if not await self._recheck(shown.attestation_type, shown.certificates):
                return True
            # It may have been evicted since, and let in with others.
            found = await self.findings(shown.agent_id)
            if found:
                await self._cut_off(shown.agent_id, found)
        except (NotFoundError, DeniedError):
            return True  # gone, banned or an operator's meanwhile
        except SpireHwError as e:
            self._log.error(
                "Certificates of a node cannot be looked at again",
                agent_id=str(shown.agent_id),
                error=e.message,
            )
            return isinstance(e, InvalidInputError)
        return True

    async def _cut_off(self, agent_id: SpiffeId, found: list[Finding]) -> None:
        known = await self._ledger.get(agent_id, fresh=True)
        actions = self._actions(known)
        checks = [Check(_RULE, False, f.message, f.code, action_of(f.code, actions)) for f in found]
        now = self._clock.now()
        before = states.new(now) if known is None else known.standing
        after = states.after_evidence(before, checks, now)
        if after == before:
            return
        posture = posture_of(agent_id, after, known)
        record = EvidenceRecord(
            made_at=now,
            occasion=_OCCASION,
            verdict=max((c.action for c in checks), key=lambda action: action.weight).value,
            state=after.state.value,
            findings=encode_findings(checks),
            policy=posture.policy,
            policy_version=posture.policy_version,
            summary=after.message,
        )
        told = StateChange(agent_id, None if known is None else before, after, _OCCASION)
        await self._judge.move(PostureUpdate(posture, record), told)

    def _actions(self, known: Known | None) -> Mapping[str, Action]:
        """Return what the node's policy and the operator's configuration say of reasons."""
        actions = dict(self._settings.drift)
        if known is not None and known.memory is not None:
            try:
                policy = self._judge.policy_for(known.memory.last.ek)
            except AttestationError:
                return actions  # none applies to it any more
            if policy is not None:
                actions |= policy.drift
        return actions
