"""What is different between two policies, and whom it concerns."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from spire_hw.posture.evaluate import differences, evaluate
from spire_hw.posture.patterns import Patterns
from spire_hw.posture.sheet import shown
from spire_hw.posture.signature import FileKey
from spire_hw.posture.verdict import Action

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from spire_hw.posture.evidence import Evidence
    from spire_hw.posture.policy import NodeGroup, Policy
    from spire_hw.posture.verdict import Verdict

# What tells versions apart without changing what is allowed.
_NAMES = frozenset({"name", "version", "sha256"})


@dataclass(frozen=True, slots=True)
class Difference:
    """One rule that is not the same.

    Attributes:
        rule: path of the rule, such as `boot.images` or `pcrs.sha256:4`.
        removed: what only the first policy has.
        added: what only the second one has.
    """

    rule: str
    removed: tuple[str, ...]
    added: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerdictChange:
    """What two policies say to the same evidence."""

    before: Verdict
    after: Verdict

    @property
    def changes(self) -> bool:
        """Tell whether the node is treated differently."""
        return (self.before.holds, self.before.action) != (self.after.holds, self.after.action)


def compare(before: Policy, after: Policy) -> list[Difference]:
    """Return the rules that differ, in the order of a policy; names and versions left out."""
    one, other = dict(_rules(before)), dict(_rules(after))
    found = []
    for rule in dict.fromkeys([*one, *other]):
        left, right = one.get(rule, frozenset()), other.get(rule, frozenset())
        if left != right:
            found.append(Difference(rule, tuple(sorted(left - right)), tuple(sorted(right - left))))
    return found


def judge_both(before: Policy, after: Policy, evidence: Evidence) -> VerdictChange:
    """Return what both say to some evidence."""
    return VerdictChange(evaluate(before, evidence), evaluate(after, evidence))


def _rules(policy: Policy) -> Iterator[tuple[str, frozenset[str]]]:
    for field in fields(policy):
        if field.name not in _NAMES:
            yield from _flatten(field.name, getattr(policy, field.name))


def _flatten(rule: str, value: Any) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield rules with their values as texts, nested ones by their path."""
    if is_dataclass(value) and not isinstance(value, Patterns):
        for field in fields(value):
            yield from _flatten(f"{rule}.{field.name}", getattr(value, field.name))
    elif isinstance(value, dict) and rule != "ima.files":
        for key in sorted(value):
            yield from _flatten(f"{rule}.{_text(key)}", value[key])
    elif rule == "pcr_sets":
        for one in value:
            yield from _flatten(f"{rule}.{one.name}", one.values)
    elif value is not None:
        yield rule, frozenset(_values(rule, value))


def _values(rule: str, value: Any) -> Iterator[str]:
    if rule == "ima.files":
        for path, digests in value.items():
            yield from (f"{shown(path)} {digest.hex()}" for digest in digests)
    elif rule == "nodes":
        yield from (_group(group) for group in value)
    elif isinstance(value, Patterns):
        yield from (shown(text) for text in value.texts)
    elif isinstance(value, (frozenset, tuple)):
        yield from (_text(one) for one in value)
    else:
        yield _text(value)


def _group(group: NodeGroup) -> str:
    keys = " or ".join(f"pub_hash:{one}" for one in sorted(group.ek_hashes))
    return " and ".join([*sorted(group.selectors), *([keys] if keys else [])])


def _text(value: Any) -> str:
    texts: dict[type, Callable[[Any], str]] = {
        FileKey: lambda key: f"key {key.key_id.hex()}",
        bytes: bytes.hex,
        bool: lambda flag: "true" if flag else "false",
        Action: lambda action: str(action.value),
        tuple: lambda where: ":".join(map(str, where)),
    }
    return texts.get(type(value), str)(value)


@dataclass(frozen=True, slots=True)
class PcrDifference:
    """A PCR that is not as a policy has it.

    Attributes:
        pcr: bank and number, such as `sha256:4`.
        machine: its value, None when it was not quoted.
        allowed: values the policy allows; of sets, those of the closest one.
    """

    pcr: str
    machine: bytes | None
    allowed: tuple[bytes, ...]


def pcr_differences(policy: Policy, evidence: Evidence) -> list[PcrDifference]:
    """Return the PCRs that fail a policy, by bank and number."""
    demands = dict(policy.pcrs)
    if policy.pcr_sets:
        closest = min(policy.pcr_sets, key=lambda one: len(differences(one, evidence.pcrs)))
        demands |= closest.values
    return [
        PcrDifference(_text(where), evidence.pcrs.get(where), tuple(sorted(allowed)))
        for where, allowed in sorted(demands.items())
        if evidence.pcrs.get(where) not in allowed
    ]
