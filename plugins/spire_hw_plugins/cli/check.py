"""`check`: does an external plugin do what hosts expect of it?"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw import log
from spire_hw.cli.flags import GoCommand, flag
from spire_hw.cli.output import Printer, output_flags, shown
from spire_hw.cli.run import ExitCode
from spire_hw.clock import SystemClock
from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw.goplugin.conformance import suite
from spire_hw.goplugin.conformance.bench import Subject
from spire_hw.goplugin.conformance.report import Outcome, Report, Step
from spire_hw.goplugin.facade.table import SIDES
from spire_hw.plugin.info import Side
from spire_hw_plugins.cli.serve import kind_of

if TYPE_CHECKING:
    from spire_hw.plugin.info import PluginKind

_WORDS: Final = {
    Outcome.PASSED: "ok",
    Outcome.FAILED: "FAIL",
    Outcome.NOTED: "note",
    Outcome.SKIPPED: "skip",
}
_NAME_WIDTH: Final = 52


@click.command(
    "check",
    cls=GoCommand,
    help="Start an external plugin as a host does and find out whether it does what hosts expect. "
    "A KeyManager is left with keys named spire-hw-check-*, so give it a token of its own.",
    examples="""
    spire-hw-plugin check -kind KeyManager -data test.hcl ./my-plugin
    spire-hw-plugin check -kind NodeAttestor -side agent ./my-plugin -- --verbose
    """,
)
@flag("data", "File with the plugin's configuration, HCL or JSON.", default="")
@flag(
    "effects",
    "Ask also what has effects outside, such as publishing a bundle.",
    type=bool,
    default=False,
)
@flag("kind", "What it is: KeyManager, NodeAttestor and so on.", default="")
@flag("logLevel", "Which of the plugin's own lines are shown.", default="error")
@flag(
    "side",
    "Which host it is for; the server where the plugin type fits both.",
    type=click.Choice([side.value for side in Side]),
)
@output_flags
@click.argument("command")
@click.argument("arguments", nargs=-1)
@click.pass_context
def check(
    ctx: click.Context,
    /,
    command: str,
    arguments: tuple[str, ...],
    *,
    kind: str,
    side: str | None,
    data: str,
    effects: bool,
    log_level: str,
    output: str,
    field: str,
) -> None:
    """Examine a plugin; exit status 1 when something fails."""
    if not kind:
        raise InvalidInputError("-kind is required: say what the plugin is, such as KeyManager")
    wanted = kind_of(kind)
    subject = Subject(
        wanted, _side(wanted, side), str(Path(command).absolute()), arguments, _read(data), effects
    )
    log.configure(log.LogSettings(log.Level.parse(log_level)), stream=sys.stderr)
    printer = Printer(as_json=output == "json", field=field)
    plain = not printer.as_json and not printer.field
    if plain:
        title = f"{wanted.value} plugin for the {subject.side.value}: {subject.cmd}"
        click.echo(f"{shown(title)}\n")
    show = _show if plain else _silent
    report = asyncio.run(suite.examine(subject, SystemClock(), log.get_logger("plugin"), show))
    printer.value(_values(subject, report), lambda: click.echo(f"\n{_summary(report)}"))
    ctx.exit(ExitCode.FAILED if report.count(Outcome.FAILED) else ExitCode.DONE)


def _side(kind: PluginKind, side: str | None) -> Side:
    return SIDES[kind][0] if side is None else Side(side)


def _read(path: str) -> str:
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise UnavailableError(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise InvalidInputError(f"{path} is not UTF-8 text") from e


def _show(step: Step) -> None:
    line = f"  {_WORDS[step.outcome]:<5} {step.name:<{_NAME_WIDTH}} {step.seconds:6.2f} s"
    click.echo(line)
    if step.detail:
        click.echo(f"        {shown(step.detail)}")


def _silent(step: Step) -> None:
    """The report comes as a whole."""


def _summary(report: Report) -> str:
    counts = [f"{report.count(outcome)} {outcome.value}" for outcome in Outcome]
    return ", ".join(counts)


def _values(subject: Subject, report: Report) -> dict[str, Any]:
    return {
        "kind": subject.kind.value,
        "side": subject.side.value,
        "command": subject.cmd,
        "steps": [
            {
                "name": step.name,
                "outcome": step.outcome.value,
                "detail": step.detail,
                "seconds": round(step.seconds, 3),
            }
            for step in report.steps
        ],
        **{outcome.value: report.count(outcome) for outcome in Outcome},
    }
