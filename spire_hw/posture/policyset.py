"""Policies that are in force together: which one is for a node, and whether that is clear."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from spire_hw.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from spire_hw.posture.policy import NodeGroup, Policy


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
        given = tuple(sorted(policies, key=lambda policy: policy.name))
        if faults := list(_conflicts(given)):
            raise InvalidInputError("; ".join(faults))
        return cls(given)

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
        best: Policy | None = None
        best_rank: tuple[bool, int] = (False, -1)
        for policy in self.policies:
            ranks = [group.rank for group in policy.nodes if group.has(selectors)]
            rank = max(ranks, default=None) if policy.nodes else (False, 0)
            if rank is not None and rank > best_rank:
                best, best_rank = policy, rank
        return best


def _conflicts(policies: tuple[Policy, ...]) -> Iterator[str]:
    for one, other in combinations(policies, 2):
        if one.name == other.name:
            yield f'policy "{one.name}" is there twice'
        elif not one.nodes and not other.nodes:
            yield (
                f'policies "{one.name}" and "{other.name}" are both for every node:'
                " give one of them nodes { }"
            )
        elif any(_same_nodes(a, b) for a in one.nodes for b in other.nodes):
            yield f'policies "{one.name}" and "{other.name}" are for the same nodes'


def _same_nodes(one: NodeGroup, other: NodeGroup) -> bool:
    """Tell whether two groups have a node in common for certain, and rank alike."""
    if one.selectors != other.selectors or one.rank != other.rank:
        return False
    return not one.ek_hashes or not one.ek_hashes.isdisjoint(other.ek_hashes)
