"""CAs of TPM manufacturers on disk: import them, look at them, check an endorsement key with them."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw.cli.files import read_input
from spire_hw.cli.flags import F, GoGroup, flag
from spire_hw.cli.output import Printer, count_of, output_flags, shown
from spire_hw.cli.run import batch_code
from spire_hw.clock import SystemClock
from spire_hw.errors import InvalidInputError, SpireHwError
from spire_hw.tpm.caimport import Blob, Judged, Kind, judge
from spire_hw.tpm.castore import (
    INTERMEDIATES,
    ROOTS,
    Source,
    load_roots,
    read_source,
    write_certificate,
)
from spire_hw.tpm.crl import is_signed_by
from spire_hw.tpm.crlfiles import watch_crls
from spire_hw.tpm.ekcert import ChainTime, EkRoots, verify_ek_certificate
from spire_hw.tpm.names import format_name
from spire_hw_server.cli.eksource import MAX_NODE_BYTES, read_certificates

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from spire_hw.tpm.crl import Crl, Revocations

_FOLDERS: Final = {Kind.ROOT: ROOTS, Kind.INTERMEDIATE: INTERMEDIATES}
_MAX_NAMES: Final = 3
_FINGERPRINT: Final = 16
_DATE: Final = 10


def _printer(command: F) -> F:
    """Add `-output` and `-field`; the command gets `printer`."""

    @functools.wraps(command)
    def inner(*args: Any, output: str, field: str, **kwargs: Any) -> Any:
        return command(*args, printer=Printer(output == "json", field), **kwargs)

    return output_flags(inner)  # type: ignore[return-value]


@click.group("ca", cls=GoGroup)
def group() -> None:
    """CAs of TPM manufacturers, as endorsement_ca_path takes them."""


@dataclass(frozen=True, slots=True)
class _Import:
    """What an import came to: verdicts on certificates, and files that are none."""

    source: Source
    found: tuple[Judged, ...]

    def of(self, *kinds: Kind) -> list[Judged]:
        return [one for one in self.found if one.kind in kinds]

    def values(self, new: int, *, dry_run: bool) -> dict[str, Any]:
        counts = {kind.value: len(self.of(kind)) for kind in Kind}
        return {
            "source": {"kind": self.source.kind, "sha256": self.source.sha256},
            "dry_run": dry_run,
            "counts": counts | {"faulty": len(self.source.faults), "new": new},
            "certificates": [one.values() for one in self.found],
            "faulty": [{"name": name, "reason": text} for name, text in self.source.faults],
            "ignored": list(self.source.ignored),
        }


@group.command(
    "import",
    examples="""
    spire-hw-server tpm ca import TrustedTpm.cab -out /etc/spire-hw/tpm-makers
    spire-hw-server tpm ca import makers.pem -out /etc/spire-hw/tpm-makers -dryRun
    """,
)
@click.argument("source", required=False, default="", metavar="SOURCE")
@flag("out", "Directory that gets the folders roots and intermediates.", default="")
@flag("dryRun", "Only say what would be taken.", type=bool, default=False, alias="dry-run")
@_printer
def import_(source: str, out: str, *, dry_run: bool, printer: Printer) -> None:
    """Take CAs from a directory, a PEM or DER file, or a cabinet such as TrustedTpm.cab.

    Roots and intermediates go into folders of their own; what is there already stays. Check where
    SOURCE is from before: whoever made it decides which machines you trust.
    """
    if not source or not (out or dry_run):
        raise click.UsageError("a SOURCE and -out are required")
    read = read_source(Path(source))
    done = _Import(read, tuple(judge(read.found, SystemClock().now())))
    taken = done.of(*_FOLDERS)
    new = 0
    for one in [] if dry_run else taken:
        new += _write(Path(out), one)
    printer.value(done.values(new, dry_run=dry_run), lambda: _show_import(done, out, new, dry_run))
    if not taken:
        raise InvalidInputError(f"{source} holds no CA certificate that can vouch for TPMs")


def _write(out: Path, one: Judged) -> bool:
    if one.certificate is None:
        return False
    comment = format_name(one.certificate.subject) or "no name"
    folder = out / _FOLDERS[one.kind]
    return write_certificate(folder, one.file_name, one.certificate.der, comment)


def _show_import(done: _Import, out: str, new: int, dry_run: bool) -> None:
    digest = f", SHA-256 {done.source.sha256}" if done.source.sha256 else ""
    click.echo(f"Source: {done.source.kind}{digest}\n")
    for kind, title in ((Kind.ROOT, "Roots"), (Kind.INTERMEDIATE, "Intermediates")):
        _show_taken(title, done.of(kind))
    refused = [(one.reason, one.name) for one in done.of(Kind.REFUSED)]
    _show_reasons("Refused", [*refused, *((text, name) for name, text in done.source.faults)])
    copies = len(done.of(Kind.DUPLICATE))
    taken = count_of(len(done.of(*_FOLDERS)), "certificate", "certificates")
    left = count_of(len(refused) + len(done.source.faults), "refused", "refused")
    end = "Nothing was written." if dry_run else f"{new} new in {shown(out)}."
    click.echo(f"{taken} taken, {left}, {copies} twice. {end}")


def _show_taken(title: str, found: Sequence[Judged]) -> None:
    if not found:
        return
    click.echo(f"{title}: {len(found)}")
    for one in found:
        click.echo(f"  {_line(one)}")
        for note in one.notes:
            click.echo(f"    {note}")
    click.echo()


def _line(one: Judged) -> str:
    if one.certificate is None:
        return shown(one.name)
    until = one.certificate.not_after.isoformat()[:_DATE]
    subject = format_name(one.certificate.subject)
    return f"{one.fingerprint[:_FINGERPRINT]}  until {until}  {subject}"


def _show_reasons(title: str, found: Iterable[tuple[str, str]]) -> None:
    """Write reasons with how often and where, so that a thousand of one kind are one line."""
    names: dict[str, list[str]] = defaultdict(list)
    for reason, name in found:
        names[reason].append(name)
    if not names:
        return
    click.echo(f"{title}: {sum(map(len, names.values()))}")
    for reason, where in sorted(names.items(), key=lambda item: -len(item[1])):
        more = f" and {len(where) - _MAX_NAMES} more" if len(where) > _MAX_NAMES else ""
        click.echo(f"  {shown(reason)}")
        click.echo(f"    {shown(', '.join(where[:_MAX_NAMES]))}{more}")
    click.echo()


@group.command("list", examples="spire-hw-server tpm ca list /etc/spire-hw/tpm-makers")
@click.argument("path", required=False, default="", metavar="PATH")
@_printer
def list_(path: str, printer: Printer) -> None:
    """List the CAs of a file or directory, as the attestor would take them."""
    found = _judge_store(_load(path))
    values = {"certificates": [one.values() for one in found]}

    def pretty() -> None:
        for kind, title in ((Kind.ROOT, "Roots"), (Kind.INTERMEDIATE, "Intermediates")):
            _show_taken(title, [one for one in found if one.kind is kind])
        _show_reasons("Useless", [(o.reason, o.name) for o in found if not o.is_taken])

    printer.value(values, pretty)


def _load(path: str, pinned: Sequence[str] = ()) -> EkRoots:
    if not path:
        raise click.UsageError("a PATH is required")
    return load_roots(Path(path), [one.lower().replace(":", "") for one in pinned])


def _judge_store(roots: EkRoots) -> list[Judged]:
    certificates = (*roots.anchors, *roots.intermediates)
    names = (format_name(one.subject) for one in certificates)
    blobs = [Blob(name, one.der) for name, one in zip(names, certificates, strict=True)]
    return judge(blobs, SystemClock().now())


@group.command(
    "verify",
    examples="""
    spire-hw-server tpm ca verify /etc/spire-hw/tpm-makers
    spire-hw-server tpm ca verify /etc/spire-hw/tpm-makers host.json ek.der -crl /etc/spire-hw/crls
    """,
)
@click.argument("path", required=False, default="", metavar="PATH")
@click.argument("keys", nargs=-1, metavar="[EK...]")
@flag("crl", "File or directory of revocation lists.", default="")
@flag(
    "chainTime",
    "As ek_chain_time.",
    type=click.Choice([t.value for t in ChainTime]),
    default=ChainTime.ISSUER_AT_LEAF_ISSUANCE.value,
)
@flag("sha1", "SHA-256 of a CA certificate that may be signed with SHA-1.", repeated=True)
@_printer
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    *,
    path: str,
    keys: tuple[str, ...],
    crl: str,
    chain_time: str,
    sha1: tuple[str, ...],
    printer: Printer,
) -> None:
    """Check a store of CAs, and endorsement certificates against it.

    EK is a certificate in PEM or DER, or what `spire-hw-agent tpm info -output json` printed.
    """
    roots = _load(path, sha1)
    crls = watch_crls(Path(crl), required=False).value if crl else None
    faults = [one for one in _judge_store(roots) if not one.is_taken]
    now = SystemClock().now()
    lists = [_describe_crl(one, roots, now) for one in (crls.crls if crls else ())]
    checked = [_check(name, roots, crls, ChainTime(chain_time), now) for name in keys]
    values = {
        "roots": len(roots.anchors),
        "intermediates": len(roots.intermediates),
        "faults": [one.values() for one in faults],
        "crls": lists,
        "keys": checked,
    }

    def pretty() -> None:
        intermediates = count_of(len(roots.intermediates), "intermediate", "intermediates")
        click.echo(f"{count_of(len(roots.anchors), 'root', 'roots')}, {intermediates}")
        _show_reasons("Useless", [(one.reason, one.name) for one in faults])
        _show_crls(lists)
        for one in checked:
            click.echo(_verdict(one))

    printer.value(values, pretty)
    bad = sum(not one["trusted"] for one in checked)
    if keys:
        ctx.exit(batch_code(len(checked) - bad, bad))
    ctx.exit(batch_code(0, len(faults) + sum(bool(one["fault"]) for one in lists)))


def _check(
    name: str, roots: EkRoots, crls: Revocations | None, chain_time: ChainTime, at: datetime
) -> dict[str, Any]:
    out: dict[str, Any] = {"name": name, "trusted": False}
    try:
        leaf, chain = read_certificates(read_input(name, MAX_NODE_BYTES))
        proved = verify_ek_certificate(
            leaf, chain, roots, at, chain_time=chain_time, revocations=crls
        )
    except SpireHwError as e:
        return out | {"reason": e.message}
    model = proved.model
    return out | {
        "trusted": True,
        "root": proved.root_fingerprint,
        "manufacturer": model.manufacturer,
        "model": model.model,
        "version": model.version,
    }


def _describe_crl(crl: Crl, roots: EkRoots, at: datetime) -> dict[str, Any]:
    """Return what a revocation list says, and why it does not count."""
    issuers = [*roots.anchors_named(crl.issuer), *roots.intermediates_named(crl.issuer)]
    fault = note = ""
    if not issuers:
        note = "its issuer is not among the CAs: for CAs that TPMs hold themselves, or for nothing"
    elif not any(is_signed_by(crl, issuer) for issuer in issuers):
        fault = "its issuer did not sign it, or may not"
    elif not crl.is_complete:
        fault = "not complete: a delta, an indirect list, or one with parts not understood"
    elif not crl.is_fresh(at):
        fault = "not valid now"
    until = None if crl.next_update is None else crl.next_update.isoformat()
    return {
        "issuer": format_name(crl.issuer),
        "this_update": crl.this_update.isoformat(),
        "next_update": until,
        "revoked": len(crl.revoked),
        "fault": fault,
        "note": note,
    }


def _show_crls(lists: Sequence[dict[str, Any]]) -> None:
    if not lists:
        return
    click.echo(f"Revocation lists: {len(lists)}")
    for one in lists:
        until = (one["next_update"] or "?")[:_DATE]
        click.echo(f"  until {until}, {one['revoked']} revoked  {one['issuer']}")
        if one["fault"]:
            click.echo(f"    does not count: {one['fault']}")
        if one["note"]:
            click.echo(f"    {one['note']}")
    click.echo()


def _verdict(one: dict[str, Any]) -> str:
    if not one["trusted"]:
        return f"{shown(one['name'])}: refused: {shown(one['reason'])}"
    words = [one[name] for name in ("manufacturer", "model", "version") if one[name]]
    return f"{shown(one['name'])}: trusted: {' '.join(words)}, root {one['root'][:_FINGERPRINT]}"
