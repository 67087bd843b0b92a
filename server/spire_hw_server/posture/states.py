"""The states of a node and what leads from one to another: pure rules.

attested -> drifted      good evidence with deviations that are accepted
drifted -> attested      an attestation without any
attested, drifted -> stale      no good evidence for too long; good evidence leads back
any -> quarantined       by evidence, by silence or by an operator; see `HEALS`
any -> banned            by evidence or by an operator; only evicting the node ends it
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from spire_hw.posture.verdict import Action, NodeState
from spire_hw_server.datastore.records import BY_OPERATOR, LIFTED_BY_HAND

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from spire_hw.posture.verdict import Check

STALE: Final = "stale"


class Heal(Enum):
    """What ends a quarantine."""

    EVIDENCE = "evidence"  # good evidence
    BOOT = "boot"  # good evidence of a later boot
    OPERATOR = "operator"  # an operator alone


# By the decisive reason; good evidence ends all others.
HEALS: Final = {
    "tpm_reset_without_reboot": Heal.BOOT,
    **dict.fromkeys(LIFTED_BY_HAND, Heal.OPERATOR),
}


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a node stands.

    Attributes:
        state: one of the words operators know.
        reasons: codes, the decisive one first; empty when all is well.
        message: the same for people.
        since: when it got there.
    """

    state: NodeState
    reasons: tuple[str, ...]
    message: str
    since: datetime

    @property
    def reason(self) -> str:
        """Return the decisive reason, "" when all is well."""
        return self.reasons[0] if self.reasons else ""

    @property
    def heals(self) -> Heal:
        """Return what ends it, when it is a quarantine."""
        return HEALS.get(self.reason, Heal.EVIDENCE)

    @property
    def is_cut_off(self) -> bool:
        """Tell whether the node may have no identity."""
        return self.state in {NodeState.QUARANTINED, NodeState.BANNED}


def new(now: datetime) -> Standing:
    """Return the standing of a node that never showed evidence."""
    return Standing(NodeState.NEW, (), "", now)


def after_evidence(
    standing: Standing, checks: Iterable[Check], now: datetime, *, anew: bool = False
) -> Standing:
    """Return where evidence leads.

    Args:
        standing: before it.
        checks: all of its verdict.
        now: server's time.
        anew: the node attested, which makes what it shows the new measure.
    """
    failed = sorted((c for c in checks if not c.holds), key=lambda c: -c.action.weight)
    action = failed[0].action if failed else Action.ACCEPT
    if standing.state is NodeState.BANNED:
        return standing
    if action is Action.ACCEPT:
        return _after_good(standing, failed, now, anew=anew)
    if action is Action.REFUSE:
        return standing
    state = NodeState.BANNED if action is Action.BAN else NodeState.QUARANTINED
    if state is NodeState.QUARANTINED and _stays(standing):
        return standing
    return _moved(standing, state, failed, now)


def _after_good(
    standing: Standing, accepted: list[Check], now: datetime, *, anew: bool
) -> Standing:
    if _stays(standing) or (standing.state is NodeState.DRIFTED and not (accepted or anew)):
        return standing
    return _moved(standing, NodeState.DRIFTED if accepted else NodeState.ATTESTED, accepted, now)


def _stays(standing: Standing) -> bool:
    """Tell whether no evidence changes a standing: what an operator has to look at first."""
    return standing.state is NodeState.QUARANTINED and standing.heals is Heal.OPERATOR


def _moved(standing: Standing, state: NodeState, why: list[Check], now: datetime) -> Standing:
    reasons = tuple(dict.fromkeys(check.code for check in why))
    message = why[0].message if why else ""
    same = standing.state is state and standing.reasons == reasons
    return Standing(state, reasons, message, standing.since if same else now)


def after_silence(
    standing: Standing, last_good_at: datetime, action: Action, now: datetime
) -> Standing:
    """Return where a node is led by showing nothing good for too long.

    Args:
        standing: before.
        last_good_at: when it last did.
        action: QUARANTINE takes its identity, all else raises an alarm.
        now: server's time.
    """
    if standing.state not in {NodeState.ATTESTED, NodeState.DRIFTED, NodeState.STALE}:
        return standing
    message = f"node: no good evidence since {last_good_at:%Y-%m-%d %H:%M:%S} UTC"
    if action is Action.QUARANTINE:
        return Standing(NodeState.QUARANTINED, (STALE,), message, now)
    if standing.state is NodeState.STALE:
        return standing
    return Standing(NodeState.STALE, (STALE, *standing.reasons), message, now)


def quarantined_by_operator(standing: Standing, comment: str, now: datetime) -> Standing:
    """Return where an operator puts a node until an operator releases it."""
    if standing.state is NodeState.BANNED:
        return standing
    message = f"node: quarantined by an operator: {comment}" if comment else "node: quarantined"
    return Standing(NodeState.QUARANTINED, (BY_OPERATOR,), message, now)


def released(now: datetime) -> Standing:
    """Return where an operator's release leads."""
    return Standing(NodeState.ATTESTED, (), "", now)
