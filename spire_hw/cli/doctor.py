"""`doctor`: checks a live set-up and says what to do about what it finds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from spire_hw.cli.checks import check_time, check_versions, faults_found
from spire_hw.cli.findings import Finding, Level
from spire_hw.cli.flags import GoCommand, flag
from spire_hw.cli.output import Printer, count_of, output_flags, shown
from spire_hw.cli.run import ExitCode
from spire_hw.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)


class Examine(Protocol[S_contra]):
    """Makes all checks of a program."""

    def __call__(self, settings: S_contra, *, login: bool) -> Iterable[Finding]:
        """Return what is found; `login` allows to log in to tokens, once."""
        ...


def doctor_command(
    what: str, default: Path, load: Callable[..., S], examine: Examine[S]
) -> click.Command:
    """Return `doctor`.

    Args:
        what: `server`, `agent` or `signer`.
        default: its configuration file.
        load: `spire_hw.config.host.load` for its settings.
        examine: makes all checks.
    """

    @click.pass_context
    def doctor(
        ctx: click.Context,
        /,
        config: str,
        *,
        expand_env: bool,
        login: bool,
        verbose: bool,
        output: str,
        field: str,
    ) -> None:
        findings = [*check_versions(), *check_time()]
        try:
            settings = load(Path(config), expand_env=expand_env)
        except ConfigError as e:
            remedy = "correct the file; nothing else was looked at"
            findings += faults_found(e, remedy)
        else:
            findings += examine(settings, login=login)
        printer = Printer(as_json=output == "json", field=field)
        printer.value(_values(findings), lambda: _show(findings, verbose=verbose))
        ctx.exit(_code(findings))

    made = output_flags(doctor)
    made = flag("verbose", "Show what is well too.", type=bool, default=False)(made)
    text = "Log in to the HSM once; without it only the token's flags are looked at."
    made = flag("login", text, type=bool, default=False)(made)
    text = "Expand environment variables in the file."
    made = flag("expandEnv", text, type=bool, default=False)(made)
    made = flag("config", "The configuration file.", default=str(default))(made)
    return click.command(
        "doctor",
        cls=GoCommand,
        help=f"Check the {what}'s live set-up and say what to do. Exit status 0 when all is well, "
        "1 with problems, 6 with warnings only.",
        examples=f"spire-hw-{what} doctor -config /etc/spire-hw/{what}.conf -verbose",
    )(made)


def _code(findings: Sequence[Finding]) -> ExitCode:
    levels = {finding.level for finding in findings}
    if Level.PROBLEM in levels:
        return ExitCode.FAILED
    return ExitCode.PARTLY if Level.WARNING in levels else ExitCode.DONE


def _count(findings: Sequence[Finding], level: Level) -> int:
    return sum(finding.level is level for finding in findings)


def _values(findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "findings": [
            {"check": f.check, "level": f.level.value, "message": f.message, "remedy": f.remedy}
            for f in findings
        ],
        "ok": _count(findings, Level.OK),
        "warnings": _count(findings, Level.WARNING),
        "problems": _count(findings, Level.PROBLEM),
    }


def _show(findings: Sequence[Finding], *, verbose: bool) -> None:
    for finding in findings:
        if finding.level is Level.OK and not verbose:
            continue
        click.echo(f"{finding.level.value:<8} {finding.check}: {shown(finding.message)}")
        if finding.remedy:
            click.echo(f"{'':<8} -> {shown(finding.remedy)}")
    problems, warnings = _count(findings, Level.PROBLEM), _count(findings, Level.WARNING)
    click.echo(
        f"{count_of(problems, 'problem', 'problems')}, "
        f"{count_of(warnings, 'warning', 'warnings')}, {_count(findings, Level.OK)} checks are well"
    )
