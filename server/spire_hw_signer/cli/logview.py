"""How the audit log is shown to people and programs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw.cli.output import count_of, shown, table
from spire_hw_signer.audit.verify import Verdict

if TYPE_CHECKING:
    from spire_hw_signer.audit.record import Record
    from spire_hw_signer.audit.seal import Damage
    from spire_hw_signer.audit.verify import Finding, Report

_WIDTH: Final = 20


def report_values(report: Report) -> dict[str, Any]:
    """Return what a verification found as plain values."""
    return {
        "verdict": report.verdict.value,
        "log": report.log_id,
        "files": report.files,
        "records": report.records,
        "head": {"seq": report.head.seq, "hash": report.head.hash.hex()},
        "from": report.times[0],
        "to": report.times[1],
        "kinds": report.kinds,
        "checkpoints": report.checkpoints,
        "last_checkpoint": report.last_checkpoint,
        "witnessed": report.witnessed,
        "unknown_outcomes": report.unknown,
        "open_intents": report.open,
        "findings": [_finding_values(finding) for finding in report.findings],
    }


def _finding_values(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "message": finding.message,
        "file": finding.file,
        "line": finding.line,
        "verdict": finding.verdict.value,
    }


def print_report(report: Report, *, with_key: bool) -> None:
    """Print what a verification found."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.kinds.items()))
    rows = [
        ("Log", report.log_id or "(none)"),
        ("Files", str(report.files)),
        ("Records", f"{report.records} ({kinds})" if kinds else "0"),
        ("From", report.times[0]),
        ("To", report.times[1]),
        ("Head", str(report.head)),
        ("Outcomes unknown", str(report.unknown)),
        ("Intents still open", str(report.open)),
    ]
    if with_key:
        vouched = f"{report.checkpoints}, up to record {report.last_checkpoint}"
        rows.append(("Signed checkpoints", vouched))
    if report.witnessed:
        rows.append(("Heads witnessed", str(report.witnessed)))
    click.echo(table(rows, _WIDTH), nl=False)
    for finding in report.findings:
        place = f"{finding.file} line {finding.line}: " if finding.file else ""
        click.echo(f"  [{finding.verdict.value}] {finding.code}: {place}{shown(finding.message)}")
    wrong = sum(1 for finding in report.findings if finding.verdict is not Verdict.HOLDS)
    words = {
        Verdict.HOLDS: "The log holds.",
        Verdict.SEALED: "The log holds but for what was sealed.",
        Verdict.BROKEN: f"The log does NOT hold: {count_of(wrong, 'finding', 'findings')}.",
    }
    click.echo(words[report.verdict])


def one_line(record: Record) -> str:
    """Return a record as a line for people."""
    words = " ".join(f"{k}={_word(v)}" for k, v in sorted(record.body.items()) if v not in ("", {}))
    return shown(f"{record.seq} {record.time} {record.kind.value} {words}")


def _word(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}:{v}" for k, v in sorted(value.items()))
    if isinstance(value, list):
        return ",".join(map(str, value))
    text = str(value)
    return f'"{text}"' if " " in text else text


def record_values(record: Record) -> dict[str, Any]:
    """Return a record as plain values."""
    return {
        **record.body,
        "seq": record.seq,
        "time": record.time,
        "mono": record.mono,
        "boot": record.boot,
        "kind": record.kind.value,
        "prev": record.prev.hex(),
    }


def damage_values(damage: Damage) -> dict[str, Any]:
    """Return what a seal would say as plain values."""
    return {
        "broken": damage.is_broken,
        "fault": damage.fault,
        "good": {"seq": damage.good.head.seq, "hash": damage.good.head.hash.hex()},
        "log": damage.good.log_id,
        "seal": damage.seq,
        "target": damage.target,
    }


def print_damage(damage: Damage) -> None:
    """Print what a seal would say."""
    head = damage.good.head
    rows = [
        ("Broken", "yes" if damage.is_broken else "no"),
        ("Wrong", damage.fault),
        ("Last good record", str(head)),
        ("Seal would be", f"record {damage.seq}"),
        ("Log", damage.good.log_id),
        ("Target of an order", damage.target),
    ]
    click.echo(table(rows, _WIDTH), nl=False)
    if sys.stdout.isatty():
        click.echo("Nothing was changed.")
