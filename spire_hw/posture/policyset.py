"""Policies that are in force together: which one is for a node, and whether that is clear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from spire_hw.posture.policy import Policy


@dataclass(frozen=True, slots=True)
class PolicySet:
    """Policies by name; made by `of`, which checks them against each other."""

    policies: tuple[Policy, ...] = ()

    @classmethod
    def of(cls, policies: Iterable[Policy]) -> PolicySet:
        """Return a set in the order of names.

        Raises:
            InvalidInputError: a name occurs twice, or two policies are for the same nodes.
        """
        raise NotImplementedError

    def __bool__(self) -> bool:
        """Tell whether there is any policy: without one, nodes are judged by nothing."""
        return bool(self.policies)

    def __iter__(self) -> Iterator[Policy]:
        """Iterate over the policies by name."""
        return iter(self.policies)

    def get(self, name: str) -> Policy | None:
        """Return a policy by its name."""
        return next((policy for policy in self.policies if policy.name == name), None)

    def policy_for(self, selectors: Collection[str]) -> Policy | None:
        """Return the policy for a node, None when none applies and it is to be denied.

        The one whose group names the node most closely (by key before by selectors, by more
        selectors before fewer), then the first by name; the one without groups comes last.

        Args:
            selectors: `policy.ek_selectors` of its endorsement key.
        """
        raise NotImplementedError
