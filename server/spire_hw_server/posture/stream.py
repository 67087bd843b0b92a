"""What goes over the stream of one agent, as values."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spire_hw.errors import AttestationError
from spire_hw.posture.heartbeat import HeartbeatAnswer, HeartbeatChallenge
from spire_hw.posture.verdict import NodeState
from spire_hw_server.posture.outcome import failed

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.errors import SpireHwError
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.posture.outcome import Outcome
    from spire_hw_server.posture.states import Standing


@dataclass(frozen=True, slots=True)
class Stream:
    """Who holds a stream.

    Attributes:
        agent_id: whom the certificate of the connection was issued to.
        attestation_type: name of the attestor that let it in.
        serial_number: decimal, of that certificate.
        not_after: when it ends.
        spki_sha256: digest of its key.
        can_answer: whether the agent answers challenges.
        boot_id: of its kernel, as it says; None when it does not.
    """

    agent_id: SpiffeId
    attestation_type: str
    serial_number: str
    not_after: datetime
    spki_sha256: bytes
    can_answer: bool
    boot_id: str | None


@dataclass(frozen=True, slots=True)
class StateMessage:
    """What an agent is told.

    Attributes:
        next_s: until the next challenge may come; None when none comes.
        reattest: it should attest anew.
    """

    state: NodeState
    reasons: tuple[str, ...] = ()
    message: str = ""
    next_s: float | None = None
    reattest: bool = False


@dataclass(frozen=True, slots=True)
class CannotAnswer:
    """An agent's excuse."""

    reason: str


Answer = HeartbeatAnswer | CannotAnswer
Send = Callable[[HeartbeatChallenge | StateMessage], Awaitable[None]]


def state_message(
    standing: Standing | None,
    *,
    next_s: float | None,
    reattest: bool,
    outcome: Outcome | None = None,
    refused: SpireHwError | None = None,
) -> StateMessage:
    """Return what an agent is told of its state, and why its last evidence was not good.

    Args:
        standing: where its node stands, None when nothing is known of its machine.
        next_s: until the next challenge may come.
        reattest: it should attest anew.
        outcome: of its last evidence.
        refused: why there was no outcome.
    """
    state, message = NodeState.ATTESTED, ""
    reasons: tuple[str, ...] = ()
    if standing is not None:
        state, reasons, message = standing.state, standing.reasons, standing.message
    if outcome is not None and not outcome.accepted and not reasons:
        checks = failed(outcome.verdict.checks)
        reasons = tuple(dict.fromkeys(check.code for check in checks))
        message = checks[0].message
    elif refused is not None and not reasons:
        if isinstance(refused, AttestationError):
            reasons = tuple(f.code for f in refused.findings)
        message = refused.message
    return StateMessage(state, reasons, message, next_s, reattest)
