"""Enrol TPMs from files: a table of many, or what a node's agent printed."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Final

import click

from spire_hw._pb import hw_admin_pb2
from spire_hw.cli.files import read_input
from spire_hw.cli.flags import GoCommand, flag
from spire_hw.cli.output import count_of, shown
from spire_hw.cli.run import batch_code
from spire_hw.errors import InvalidInputError
from spire_hw_server.cli.connect import admin_flags
from spire_hw_server.cli.eksource import MAX_CSV_BYTES, MAX_NODE_BYTES, Wanted, read_csv, read_node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from spire_hw.cli.admin import Admin, Session

_TPM: Final = hw_admin_pb2.DESCRIPTOR.services_by_name["Tpm"]
_OUTCOMES: Final = {
    hw_admin_pb2.EnrollEkResult.ADDED: "added",
    hw_admin_pb2.EnrollEkResult.UPDATED: "updated",
    hw_admin_pb2.EnrollEkResult.UNCHANGED: "unchanged",
}
_REFUSED: Final = "refused"
_PAGE: Final = 500

# What became of a key: outcome, and why it was refused.
_Outcome = tuple[str, str]


@click.command(
    "enroll",
    cls=GoCommand,
    examples="""
    spire-hw-agent tpm info -output json > host.json          # on the machine
    spire-hw-server tpm enroll --from-node host.json -comment "rack 4, web-1" -owner web-team
    spire-hw-server tpm enroll -csv fleet.csv -dryRun
    """,
)
@flag(
    "fromNode",
    "File with what `spire-hw-agent tpm info -output json` printed; - for standard input.",
    repeated=True,
    alias="from-node",
)
@flag("csv", "Table of keys to enrol: ek_hash, comment, owner; - for standard input.", default="")
@flag("template", "Enrol this endorsement key of a node, such as L-1.", default="")
@flag("comment", "Free text kept with keys that have none.", default="")
@flag("owner", "Who answers for machines whose line does not say it.", default="")
@flag("dryRun", "Only say what would be done.", type=bool, default=False, alias="dry-run")
@admin_flags
@click.pass_context
def enroll(
    ctx: click.Context,
    /,
    admin: Admin,
    *,
    from_node: tuple[str, ...],
    csv: str,
    template: str,
    comment: str,
    owner: str,
    dry_run: bool,
) -> None:
    """Enrol TPMs from files; one that is enrolled gets the new comment and owner."""
    if bool(from_node) == bool(csv):
        raise click.UsageError("give either -csv or -fromNode")
    if csv:
        wanted = _read_table(csv, comment, owner)
    else:
        wanted = [_read_node(name, template, comment, owner) for name in from_node]
    outcomes = admin.run(lambda session: _enroll(session, wanted, dry_run=dry_run))
    _report(admin, wanted, outcomes, dry_run=dry_run)
    refused = sum(outcome == _REFUSED for outcome, _ in outcomes)
    ctx.exit(batch_code(len(outcomes) - refused, refused))


def _read_table(name: str, comment: str, owner: str) -> list[Wanted]:
    try:
        return read_csv(read_input(name, MAX_CSV_BYTES), comment, owner)
    except InvalidInputError as e:
        raise InvalidInputError(f"{name}: {e.message}") from e


def _read_node(name: str, template: str, comment: str, owner: str) -> Wanted:
    try:
        return Wanted(name, read_node(read_input(name, MAX_NODE_BYTES), template), comment, owner)
    except InvalidInputError as e:
        return Wanted(name, "", fault=e.message)


async def _enroll(session: Session, wanted: Sequence[Wanted], *, dry_run: bool) -> list[_Outcome]:
    """Return what became of each key, in order."""
    outcomes: list[_Outcome] = [(_REFUSED, one.fault) for one in wanted]
    sound = [number for number, one in enumerate(wanted) if not one.fault]
    with _progress(len(sound)) as progress:
        for start in range(0, len(sound), _PAGE):
            numbers = sound[start : start + _PAGE]
            request = hw_admin_pb2.EnrollEksRequest(dry_run=dry_run)
            for number in numbers:
                one = wanted[number]
                request.eks.add(ek_hash=one.ek_hash, comment=one.comment, owner=one.owner)
            answer = await session.call(_TPM, "EnrollEks", request)
            for number, result in zip(numbers, answer.results, strict=True):
                outcomes[number] = _OUTCOMES.get(result.outcome, _REFUSED), result.message
            progress(len(numbers))
    return outcomes


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that is told of each part; shows a bar to people when there are several."""
    if total <= _PAGE or not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=total, label="Enrolling", show_pos=True, file=sys.stderr) as bar:
        yield bar.update


def _report(
    admin: Admin, wanted: Sequence[Wanted], outcomes: Sequence[_Outcome], *, dry_run: bool
) -> None:
    counts = {
        word: sum(outcome == word for outcome, _ in outcomes)
        for word in (*_OUTCOMES.values(), _REFUSED)
    }
    results = [
        {
            "place": one.place,
            "ek_hash": one.ek_hash,
            "comment": one.comment,
            "owner": one.owner,
            "outcome": outcome,
            "message": message,
        }
        for one, (outcome, message) in zip(wanted, outcomes, strict=True)
    ]

    def pretty() -> None:
        width = max((len(one.place) for one in wanted), default=0)
        for one, (outcome, message) in zip(wanted, outcomes, strict=True):
            what = message if outcome == _REFUSED else f"{one.ek_hash} {one.comment}"
            click.echo(f"{shown(one.place):<{width}}  {outcome:<9}  {shown(what)}".rstrip())
        words = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        done = "Nothing was changed; it would be: " if dry_run else ""
        click.echo(f"{done}{words or count_of(0, 'TPM', 'TPMs')}")

    admin.printer.value({"dry_run": dry_run, "counts": counts, "results": results}, pretty)
