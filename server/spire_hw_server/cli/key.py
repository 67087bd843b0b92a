"""The keys this server signs with: where they are, and evidence of it that travels."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw._pb import hw_keys_pb2 as pb
from spire_hw.cli.evidence import answer, evidence_flags
from spire_hw.cli.flags import GoCommand, GoGroup, flag
from spire_hw.cli.output import count_of, epoch, relative, table
from spire_hw.clock import SystemClock
from spire_hw_server.cli.connect import admin_flags

if TYPE_CHECKING:
    from spire_hw.cli.admin import Admin

_KEYS: Final = pb.DESCRIPTOR.services_by_name["Keys"]
_WIDTH: Final = 12
_GENERATION: Final = re.compile(r"([^@]{1,255})@([0-9]{1,9})", re.ASCII)
_comment = flag("comment", "Why; it is written into the log.", default="")

group = GoGroup("key", help="The keys this server signs with: where they are, and who says so.")


@group.command("list", cls=GoCommand, examples="spire-hw-server key list")
@admin_flags
def list_keys(admin: Admin) -> None:
    """List all keys, with the authorities they belong to; replaced ones that are retained too."""
    found = admin.call(_KEYS, "ListKeys", pb.ListKeysRequest())

    def pretty() -> None:
        click.echo(f"Found {count_of(len(found.keys), 'key', 'keys')}:\n")
        for key in found.keys:
            click.echo(table(_rows(key), _WIDTH))
        for kept in found.retained:
            click.echo(table(_retained_rows(kept), _WIDTH))

    admin.printer.message(found, pretty)


@group.command("show", cls=GoCommand, examples="spire-hw-server key show x509-CA-A")
@click.argument("key_id", metavar="KEY")
@admin_flags
def show(admin: Admin, key_id: str) -> None:
    """Show one key with all attributes that its device reports now."""
    key = admin.call(_KEYS, "GetKey", pb.GetKeyRequest(id=key_id))

    def pretty() -> None:
        click.echo(table(_rows(key), _WIDTH), nl=False)
        if key.attributes:
            click.echo("Attributes")
            width = max(map(len, key.attributes))
            rows = [(f"  {name}", key.attributes[name]) for name in sorted(key.attributes)]
            click.echo(table(rows, width + 3), nl=False)

    admin.printer.message(key, pretty)


@group.command(
    "attest",
    cls=GoCommand,
    examples="""
    spire-hw-server key attest x509-CA-A -out ca.evidence
    spire-hw-server key attest -verify ca.evidence -nonce 5a0c...91 -signer 77ab...02
    """,
)
@click.argument("key_id", metavar="[KEY]", required=False, default="")
@evidence_flags
@admin_flags
def attest(admin: Admin, key_id: str, **given: Any) -> None:
    """Return signed evidence of where a key lives, or check such evidence.

    A TPM's key comes with what the TPM itself signs, other keys with what the device reports. The
    whole is signed by the key "evidence-log" of the same KeyManager.
    """

    def ask(wanted: str, nonce: bytes, attestation: list[bytes]) -> str:
        request = pb.AttestKeyRequest(id=wanted, nonce=nonce, attestation=attestation)
        return str(admin.call(_KEYS, "AttestKey", request).evidence)

    answer(admin.printer, key_id, given, ask)


@group.command(
    "restore",
    cls=GoCommand,
    examples='spire-hw-server key restore evidence-log@3 -comment "replaced by mistake"',
)
@click.argument("generation", metavar="KEY@GENERATION")
@_comment
@admin_flags
def restore(admin: Admin, generation: str, comment: str) -> None:
    """Make a replaced generation the current one of its key again.

    Not over a key that an authority signs with: stop the server for that, see `hsm restore`.
    """
    key_id, number = parse_generation(generation)
    request = pb.RestoreKeyRequest(id=key_id, generation=number, comment=comment)
    key = admin.call(_KEYS, "RestoreKey", request)
    admin.printer.message(key, lambda: click.echo(table(_rows(key), _WIDTH), nl=False))


@group.command(
    "destroy",
    cls=GoCommand,
    examples='spire-hw-server key destroy x509-CA-A@3 -comment "known to others"',
)
@click.argument("generation", metavar="KEY@GENERATION")
@_comment
@admin_flags
def destroy(admin: Admin, generation: str, comment: str) -> None:
    """Destroy a replaced generation before its time."""
    key_id, number = parse_generation(generation)
    request = pb.DestroyKeyRequest(id=key_id, generation=number, comment=comment)
    answer = admin.call(_KEYS, "DestroyKey", request)
    admin.printer.message(
        answer, lambda: click.echo(f"Generation {number} of {key_id} is destroyed.")
    )


def parse_generation(text: str) -> tuple[str, int]:
    """Return key id and generation of `KEY@GENERATION`."""
    found = _GENERATION.fullmatch(text)
    if found is None:
        raise click.UsageError("name a generation as KEY@GENERATION, as `key list` shows it")
    return found[1], int(found[2])


def _retained_rows(kept: pb.RetainedKey) -> list[tuple[str, str]]:
    until = relative(epoch(kept.until), SystemClock().now())
    return [
        ("Replaced", f"{kept.id}@{kept.generation}"),
        ("Type", kept.type),
        ("Fingerprint", kept.fingerprint),
        ("Destroyed", until),
    ]


def _rows(key: pb.Key) -> list[tuple[str, str]]:
    now = SystemClock().now()
    rows = [("Key", key.id), ("Type", key.type), ("Fingerprint", key.fingerprint)]
    if key.HasField("authority"):
        authority = key.authority
        rows.append(("Authority", f"{authority.kind} {authority.id} ({authority.status})"))
    rows += [("Custody", key.custody), ("Location", key.location)]
    rows += [("Device", key.device)] if key.device else []
    rows += [("Token", key.token)] if key.token else []
    rows += [("Generation", str(key.generation))] if key.generation else []
    rows += [("Created", relative(epoch(key.created_at), now))] if key.created_at else []
    used = relative(epoch(key.last_used_at), now) if key.last_used_at else "not known"
    rows.append(("Last used", used))
    rows += [("Trouble", key.trouble)] if key.trouble else []
    return rows
