"""The audit log: verify it, look at it, go on after a break."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw.cli.files import read_input
from spire_hw.cli.flags import GoGroup, flag
from spire_hw.cli.output import Printer, complain, output_flags
from spire_hw.cli.run import ExitCode
from spire_hw.clock import SystemClock
from spire_hw.errors import DeniedError, EncodingError, InvalidInputError, NotReadyError
from spire_hw.key import parse_spki
from spire_hw_signer.audit.chain import LogHead
from spire_hw_signer.audit.folder import file_names, read_lines
from spire_hw_signer.audit.record import Kind, parse
from spire_hw_signer.audit.seal import examine, seal, verify_directory
from spire_hw_signer.audit.start import find_hash
from spire_hw_signer.audit.verify import Verdict, Verifier, Witness
from spire_hw_signer.cli import logview
from spire_hw_signer.config import DEFAULT_CONFIG, load_settings
from spire_hw_signer.operators import load_operators
from spire_hw_signer.orders import MAX_ORDER_BYTES, Action, parse_order, verify_order

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from spire_hw.key import PublicKey
    from spire_hw_signer.audit.record import Record
    from spire_hw_signer.audit.seal import Damage
    from spire_hw_signer.config import SignerSettings

_MAX_KEY: Final = 64 * 1024
_MAX_FILE: Final = 256 * 1024 * 1024
_CODES: Final = {
    Verdict.HOLDS: ExitCode.DONE,
    Verdict.SEALED: ExitCode.PARTLY,
    Verdict.BROKEN: ExitCode.FAILED,
}


@click.group("log", cls=GoGroup)
def group() -> None:
    """The audit log: what was signed, refused and ordered."""


@group.command(
    "verify",
    examples="""
    spire-hw-signer log verify /var/lib/spire-hw/signer/audit -logKey log-key.pem
    spire-hw-signer log verify audit -logKey log-key.pem -checkpoints /mnt/witness/checkpoints.log
    spire-hw-signer log verify audit -witness heads.txt -output json
    """,
)
@click.argument("directory")
@flag("logKey", "Public key of the log, PEM or DER; signatures are checked with it.", default="")
@flag("witness", "File with heads that others saw: a number and a hash on each line.", default="")
@flag("checkpoints", "File with checkpoints from another place.", default="")
@output_flags
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    *,
    directory: str,
    log_key: str,
    witness: str,
    checkpoints: str,
    output: str,
    field: str,
) -> None:
    """Recompute a log and compare it with what others know of it; fails when it does not hold.

    Exit status 0: it holds; 6: a break in it was sealed by an operator; 1: it does not hold.
    """
    key = _read_key(log_key) if log_key else None
    heads = list(_read_heads(witness)) if witness else []
    copies = list(_read_checkpoints(checkpoints)) if checkpoints else []
    path = Path(directory)
    verifier = verify_directory(path, Verifier(key, heads, copies))
    report = verifier.finish()
    if key is None:
        complain("Signatures of checkpoints were not checked: no -logKey was given.")
    Printer(as_json=output == "json", field=field).value(
        logview.report_values(report),
        lambda: logview.print_report(report, with_key=key is not None),
    )
    ctx.exit(_CODES[report.verdict])


@group.command(
    "show",
    examples="""
    spire-hw-signer log show /var/lib/spire-hw/signer/audit -last 20
    spire-hw-signer log show audit -kind refusal -output json
    """,
)
@click.argument("directory")
@flag("kind", "Only records of this kind.", type=click.Choice([k.value for k in Kind]))
@flag("from", "Only records from this number on.", type=int, default=0, dest="first")
@flag("last", "Only the last so many records; 0 for all.", type=int, default=0)
@output_flags
def show(
    *, directory: str, kind: str | None, first: int, last: int, output: str, field: str
) -> None:
    """Print records, one a line; nothing is verified."""
    if last < 0 or first < 0:
        raise click.UsageError("a number is negative")
    found = [
        record
        for record in _records(Path(directory))
        if record.seq >= first and kind in {None, record.kind.value}
    ]
    found = found[-last:] if last else found

    def pretty() -> None:
        for record in found:
            click.echo(logview.one_line(record))

    values = [logview.record_values(record) for record in found]
    Printer(as_json=output == "json", field=field).value({"records": values}, pretty)


@group.command(
    "seal",
    examples="""
    spire-hw-signer log seal -config signer.conf -dryRun
    spire-hw-signer log seal -config signer.conf -comment "disk failed on 3 May, ticket 4711"
    spire-hw-signer log seal -config signer.conf -comment "ticket 4711" -order seal.json
    """,
)
@flag("config", "Configuration of the signer.", default=str(DEFAULT_CONFIG))
@flag("comment", "Why; it is written into the log.", default="")
@flag("order", "Order file, where operators have to agree.", default="")
@flag("dryRun", "Only say what is wrong and what would be written.", type=bool, default=False)
@flag(
    "force", "Seal a log whose chain holds, such as after a new log key.", type=bool, default=False
)
@output_flags
def seal_command(
    *, config: str, comment: str, order: str, dry_run: bool, force: bool, output: str, field: str
) -> None:
    """Go on after a break, once you have looked into it; the signer must not run.

    What is broken stays as it is; keep a copy of it all the same.
    """
    settings = load_settings(Path(config))
    witness = settings.witness.file
    copies = (
        [] if witness is None or not witness.exists() else list(_read_checkpoints(str(witness)))
    )
    directory = settings.audit.directory
    damage = examine(directory, copies=copies[-1:])
    printer = Printer(as_json=output == "json", field=field)
    if dry_run:
        printer.value(logview.damage_values(damage), lambda: logview.print_damage(damage))
        return
    if not damage.is_broken and not force:
        raise NotReadyError("the audit log holds; -force seals it all the same")
    if not comment:
        raise click.UsageError("a comment is required: it tells readers of the log what happened")
    names = _allowed(settings, damage, order)
    head = seal(directory, damage, operators=names, comment=comment, clock=SystemClock())
    values = {"seq": head.seq, "hash": head.hash.hex(), "file": damage.file}
    printer.value(values, lambda: click.echo(f"Sealed: the log goes on with record {head.seq}"))


def _allowed(settings: SignerSettings, damage: Damage, order: str) -> tuple[str, ...]:
    """Return who says that the log is sealed."""
    operators = load_operators(settings.operators)
    me = f"uid={os.getuid()}"
    if not operators.need_order(Action.LOG_SEAL):
        return (me,)
    if not order:
        raise DeniedError(
            f"sealing needs an order signed by {operators.describe()}: give it with -order; -dryRun"
            " shows what it has to say"
        )
    signed = parse_order(read_input(order, MAX_ORDER_BYTES))
    wanted = signed.order
    if wanted.action is not Action.LOG_SEAL or wanted.target != damage.target:
        raise DeniedError(f"the order is not for {Action.LOG_SEAL.value} {damage.target}")
    known = wanted.head.seq <= damage.good.head.seq
    names = verify_order(
        signed,
        operators,
        now=SystemClock().now(),
        log=damage.good.log_id,
        hash_at=find_hash(settings.audit.directory, wanted.head.seq) if known else None,
        is_used=wanted.nonce in damage.good.orders,
    )
    return (*names, me)


def _records(directory: Path) -> Iterator[Record]:
    for name in file_names(directory):
        for line in read_lines(directory / name):
            try:
                yield parse(line.text)
            except EncodingError as e:
                complain(f"{name} at byte {line.offset}: {e.message}")


def _read_key(name: str) -> PublicKey:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - only here

    content = read_input(name, _MAX_KEY)
    if content.startswith(b"-----BEGIN"):
        try:
            loaded = serialization.load_pem_public_key(content)
        except ValueError as e:
            raise InvalidInputError(f"{name} holds no PEM public key") from e
        content = loaded.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    return parse_spki(content)


def _read_heads(name: str) -> Iterator[Witness]:
    for number, line in enumerate(read_input(name, _MAX_FILE).splitlines(), start=1):
        words = line.decode("ascii", "replace").replace(":", " ", 1).split(maxsplit=2)
        if not words or words[0].startswith("#"):
            continue
        try:
            seq, value = int(words[0]), bytes.fromhex(words[1])
        except (ValueError, IndexError) as e:
            text = f"{name} line {number}: expected a number and a hash in hexadecimal"
            raise InvalidInputError(text) from e
        source = words[2] if len(words) > 2 else f"line {number} of {name}"  # noqa: PLR2004 - words
        yield Witness(LogHead(seq, value), source)


def _read_checkpoints(name: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(read_input(name, _MAX_FILE).splitlines(), start=1):
        # A receiver of syslog may have put something in front.
        start = line.find(b'{"at":')
        if start < 0:
            continue
        try:
            record = parse(line[start:])
        except EncodingError as e:
            raise InvalidInputError(f"{name} line {number}: {e.message}") from e
        if record.kind is Kind.CHECKPOINT:
            yield record.body
