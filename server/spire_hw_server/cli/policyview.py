"""Verdicts and differences of policies as text for people and as plain values for programs."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw.cli.output import count_of, epoch, relative, shown, table
from spire_hw.clock import SystemClock
from spire_hw.posture.diff import pcr_differences
from spire_hw.posture.policy import ek_selectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw._pb import hw_policy_pb2 as pb
    from spire_hw.posture.diff import Difference, PcrDifference, VerdictChange
    from spire_hw.posture.policy import Policy
    from spire_hw.posture.verdict import Check, Verdict
    from spire_hw_server.cli.policysource import Shown

_LABEL_WIDTH: Final = 13
_GAP: Final = 2
_SHORT_HEAD, _SHORT_TAIL = 16, 8
_NARROW: Final = 80
_MOST_VALUES: Final = 5


def verdict_values(one: Shown, policy: Policy, verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain values."""
    return {
        "evidence": one.source,
        "policy": verdict.policy,
        "version": verdict.version,
        "policy_sha256": verdict.policy_sha256,
        "is_for_node": policy.is_for(ek_selectors(one.evidence.ek)),
        "holds": verdict.holds,
        "action": verdict.action.value,
        "checks": [
            {
                "rule": check.rule,
                "holds": check.holds,
                "code": check.code,
                "action": check.action.value,
                "message": check.message,
            }
            for check in verdict.checks
        ],
        "selectors": list(verdict.selectors),
        "pcr_differences": [
            {
                "pcr": difference.pcr,
                "machine": None if difference.machine is None else difference.machine.hex(),
                "allowed": [value.hex() for value in difference.allowed],
            }
            for difference in pcr_differences(policy, one.evidence)
        ],
    }


def print_verdict(one: Shown, policy: Policy, verdict: Verdict) -> None:
    """Print a verdict line by line."""
    click.echo(f"{shown(one.source)} under policy {policy.reference}:\n")
    if not policy.is_for(ek_selectors(one.evidence.ek)):
        click.echo("! nodes: this machine is in no group of the policy, which is not used for it")
    for check in verdict.checks:
        click.echo(_line(check))
    if differing := pcr_differences(policy, one.evidence):
        click.echo()
        _print_pcrs(differing)
    failed = sum(not check.holds for check in verdict.checks)
    click.echo()
    if verdict.holds:
        click.echo(_coloured("Accepted", "green"))
        for selector in verdict.selectors:
            click.echo(f"  selector {selector}")
    else:
        rules = count_of(failed, "check fails", "checks fail")
        click.echo(_coloured(f"Not accepted: {rules}, action {verdict.action.value}", "red"))


def print_info(infos: Sequence[pb.PolicyInfo]) -> None:
    """Print what is known about policies, without their texts."""
    now = SystemClock().now()
    for info in infos:
        rows = [("Policy", f"{info.name}@{info.version}")]
        rows += [("Description", info.description)] if info.description else []
        rows += [("State", "deleted")] if info.deleted else [("SHA-256", info.sha256)]
        rows += [("For", "every node that no other policy is for")] if info.is_default else []
        rows += [("Comment", info.comment)] if info.comment else []
        rows += [("File", info.file)] if info.file else []
        rows += [("Stored", relative(epoch(info.created_at), now))] if info.created_at else []
        rows += [("Stored by", info.created_by)] if info.created_by else []
        click.echo(table(rows, _LABEL_WIDTH))


def difference_values(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """Return differences of policies as plain values."""
    return [
        {"rule": one.rule, "removed": list(one.removed), "added": list(one.added)}
        for one in differences
    ]


def print_differences(differences: Sequence[Difference]) -> None:
    """Print what two policies have not in common."""
    for one in differences:
        click.echo(shown(one.rule))
        for sign, colour, values in (("-", "red", one.removed), ("+", "green", one.added)):
            for value in values[:_MOST_VALUES]:
                click.echo(_coloured(f"  {sign} {shown(value)}", colour))
            if len(values) > _MOST_VALUES:
                click.echo(_coloured(f"  {sign} {len(values) - _MOST_VALUES} more", colour))


def change_values(one: Shown, change: VerdictChange) -> dict[str, Any]:
    """Return what becomes of evidence under another policy, as plain values."""
    sides = {"before": change.before, "after": change.after}
    return {
        "evidence": one.source,
        "changes": change.changes,
        **{
            name: {
                "holds": verdict.holds,
                "action": verdict.action.value,
                "codes": list(dict.fromkeys(c.code for c in verdict.checks if not c.holds)),
            }
            for name, verdict in sides.items()
        },
    }


def print_change(one: Shown, change: VerdictChange) -> None:
    """Print what becomes of evidence under another policy."""
    words = [
        "accepted" if verdict.holds else verdict.action.value
        for verdict in (change.before, change.after)
    ]
    text = f"{words[0]} -> {words[1]}" if change.changes else f"still {words[0]}"
    click.echo(f"{shown(one.source)}: {text}")
    before = {check.message for check in change.before.checks if not check.holds}
    for check in change.after.checks:
        if not check.holds and check.message not in before:
            click.echo(_line(check))


def _line(check: Check) -> str:
    if check.holds:
        return f"{_coloured('✓', 'green')} {shown(check.rule)}: {shown(check.message)}"
    end = f" [{check.code}, {check.action.value}]"
    return f"{_coloured('✗', 'red')} {shown(check.rule)}: {shown(check.message)}{end}"


def _print_pcrs(differences: Sequence[PcrDifference]) -> None:
    """Print values of the machine beside those of the policy, in two columns."""
    width = shutil.get_terminal_size((_NARROW, 24)).columns
    first = max(len(one.pcr) for one in differences)
    longest = max(2 * len(v) for one in differences for v in (one.machine or b"", *one.allowed))
    whole = width >= first + 2 * longest + 2 * _GAP

    def column(value: bytes | None) -> str:
        if value is None:
            return "not quoted"
        text = value.hex()
        return text if whole else f"{text[:_SHORT_HEAD]}..{text[-_SHORT_TAIL:]}"

    wide = longest if whole else _SHORT_HEAD + _SHORT_TAIL + 2
    click.echo(f"{'PCR':<{first}}  {'machine':<{wide}}  policy")
    for one in differences:
        allowed = [column(value) for value in one.allowed[:_MOST_VALUES]]
        if len(one.allowed) > _MOST_VALUES:
            allowed.append(f"{len(one.allowed) - _MOST_VALUES} more")
        for number, value in enumerate(allowed):
            left = (one.pcr, column(one.machine)) if number == 0 else ("", "")
            machine = _coloured(f"{left[1]:<{wide}}", "red")
            click.echo(f"{left[0]:<{first}}  {machine}  {_coloured(value, 'green')}")


def _coloured(text: str, colour: str) -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else click.style(text, fg=colour)
