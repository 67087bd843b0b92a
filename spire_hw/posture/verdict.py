"""What became of evidence: line by line, and as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Action(Enum):
    """What a finding does to a node; later ones outweigh earlier ones."""

    ACCEPT = "accept"
    REFUSE = "refuse"  # this exchange only; the node's state stays
    QUARANTINE = "quarantine"
    BAN = "ban"

    @property
    def weight(self) -> int:
        """Return a number to take the heaviest by."""
        return list(Action).index(self)


class NodeState(Enum):
    """States of a node; the words are used in the CLI, logs, metrics and APIs."""

    NEW = "new"
    ATTESTED = "attested"
    STALE = "stale"
    DRIFTED = "drifted"
    QUARANTINED = "quarantined"
    BANNED = "banned"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Check:
    """One rule and what evidence says to it.

    Attributes:
        rule: the rule as the policy names it, such as `pcr sha256:4` or `secure_boot`.
        holds: whether evidence satisfies it.
        message: for an operator; names PCRs, digests of the node and files, no list contents.
        code: reason code when it does not hold, "" otherwise.
        action: what then happens to the node.
    """

    rule: str
    holds: bool
    message: str
    code: str = ""
    action: Action = Action.ACCEPT


@dataclass(frozen=True, slots=True)
class Verdict:
    """All checks over one evidence.

    Attributes:
        policy: name, "" when no policy applies.
        version: of the policy, from 1.
        policy_sha256: lower-case hex digest of its text.
        checks: in the order of the policy.
        selectors: values a node gets when the verdict holds, without the type.
    """

    policy: str
    version: int
    policy_sha256: str
    checks: tuple[Check, ...]
    selectors: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Tell whether every check holds."""
        return all(check.holds for check in self.checks)

    @property
    def action(self) -> Action:
        """Return the heaviest action of the checks that do not hold."""
        failed = [check.action for check in self.checks if not check.holds]
        return max(failed, key=lambda action: action.weight, default=Action.ACCEPT)
