"""What operators ask of a running signer, and have it do: status, keys, clients, policy, clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)

from spire_hw._pb import hw_signer_admin_pb2 as pb
from spire_hw._pb import hw_signer_pb2
from spire_hw.cli.evidence import answer, evidence_flags
from spire_hw.cli.flags import GoCommand, GoGroup, flag
from spire_hw.cli.output import Printer, count_of, epoch, output_flags, relative, table
from spire_hw.clock import SystemClock
from spire_hw_signer.cli.connect import admin_flags
from spire_hw_signer.orders import Action
from spire_hw_signer.policyfile import load_policy

if TYPE_CHECKING:
    from spire_hw.cli.admin import Admin

ADMIN: Final = pb.DESCRIPTOR.services_by_name["SignerAdmin"]
_WIDTH: Final = 19
_comment = flag("comment", "Why; it is written into the audit log.", default="")


def print_done(admin: Admin, done: Any) -> None:
    """Print what an action came to."""

    def pretty() -> None:
        head = done.log_head
        click.echo(table([("Done", done.message), ("Log head", f"{head.seq}")], 9), nl=False)

    admin.printer.message(done, pretty)


def _direct(admin: Admin, action: Action, target: str, comment: str) -> None:
    direct = pb.CarryOutRequest.Direct(action=action.value, target=target, comment=comment)
    print_done(admin, admin.call(ADMIN, "CarryOut", pb.CarryOutRequest(direct=direct)))


@click.command("status", cls=GoCommand, examples="spire-hw-signer status")
@admin_flags
def status(admin: Admin) -> None:
    """Show how the signer and its audit log are."""
    answer = admin.call(ADMIN, "GetStatus", pb.GetStatusRequest())

    def pretty() -> None:
        head = answer.log_head
        checkpoint = json.loads(answer.checkpoint) if answer.checkpoint else {}
        rows = [
            ("Signer", f"{answer.name}, version {answer.version}"),
            ("Policy", answer.policy),
            ("Audit log", f"{answer.log_directory}, id {answer.log_id}"),
            ("Log head", f"{head.seq}:{head.hash.hex()}"),
            ("Log trouble", answer.log_trouble or "none"),
            ("Last checkpoint", f"{checkpoint.get('taken', 'none')}"),
            ("Checkpoint trouble", answer.checkpoint_trouble or "none"),
            ("Clock", answer.clock_fault or "believed"),
        ]
        if answer.HasField("device_log_trouble"):
            rows.append(("Device log trouble", answer.device_log_trouble or "none"))
        rows += [(f"Witness {n}", _place(p)) for n, p in enumerate(answer.places, start=1)]
        need = f"{answer.required} of {', '.join(answer.operators)}"
        rows.append(("Orders signed by", need if answer.required else "nobody: not asked for"))
        rows += [("Revoked", identity) for identity in answer.revoked]
        click.echo(table(rows, _WIDTH), nl=False)

    admin.printer.message(answer, pretty)


def _place(place: Any) -> str:
    return f"{place.name}: {place.trouble}" if place.trouble else place.name


@click.group("key", cls=GoGroup)
def key() -> None:
    """Keys that the signer holds."""


@key.command("list", examples="spire-hw-signer key list")
@admin_flags
def list_keys(admin: Admin) -> None:
    """List keys of all clients and where they are, replaced ones that are retained too."""
    answer = admin.call(ADMIN, "ListKeys", pb.ListKeysRequest())

    def pretty() -> None:
        click.echo(f"Found {count_of(len(answer.keys), 'key', 'keys')}")
        for one in answer.keys:
            click.echo()
            click.echo(table(_key_rows(one), _WIDTH), nl=False)

    admin.printer.message(answer, pretty)


def _key_rows(one: Any) -> list[tuple[str, str]]:
    kind = hw_signer_pb2.KeyType.Name(one.public_key.type).lower().replace("_", "-")
    rows = [
        ("Key", f"{one.owner}/{one.public_key.id}@{one.generation}"),
        ("Type", kind),
        ("Fingerprint", one.public_key.fingerprint),
    ]
    if one.HasField("custody"):
        custody = one.custody
        rows += [("Custody", custody.custody), ("Location", custody.location)]
        rows += [("Device", custody.device)] if custody.device else []
        rows += [("Token", custody.token)] if custody.token else []
    rows += [("Trouble", one.trouble)] if one.trouble else []
    if one.retained:
        until = relative(epoch(one.retained_until), SystemClock().now())
        rows.append(("Replaced", f"is destroyed {until}"))
    return rows


@key.command(
    "attest",
    examples="""
    spire-hw-signer key attest example.org/s1/x509-CA-A -out ca.evidence
    spire-hw-signer key attest -verify ca.evidence -nonce 5a0c...91 -signer 77ab...02
    """,
)
@click.argument("key_id", metavar="[TRUST-DOMAIN/SERVER/KEY]", required=False, default="")
@evidence_flags
@admin_flags
def attest(admin: Admin, key_id: str, **given: Any) -> None:
    """Return evidence of where a key is, signed by the log key; or check such evidence.

    A TPM's key comes with what the TPM itself signs, other keys with what the device reports.
    """

    def ask(wanted: str, nonce: bytes, attestation: list[bytes]) -> str:
        request = pb.AttestKeyRequest(key=wanted, nonce=nonce, attestation=attestation)
        return str(admin.call(ADMIN, "AttestKey", request).evidence)

    answer(admin.printer, key_id, given, ask)


@key.command(
    "restore", examples='spire-hw-signer key restore example.org/s1/x509-CA-A@3 -comment "swapped"'
)
@click.argument("generation")
@_comment
@admin_flags
def restore(admin: Admin, generation: str, comment: str) -> None:
    """Make a replaced generation the current one again."""
    _direct(admin, Action.KEY_RESTORE, generation, comment)


@key.command(
    "destroy", examples='spire-hw-signer key destroy example.org/s1/x509-CA-A@3 -comment "leaked"'
)
@click.argument("generation")
@_comment
@admin_flags
def destroy(admin: Admin, generation: str, comment: str) -> None:
    """Destroy a replaced generation before its time."""
    _direct(admin, Action.KEY_DESTROY, generation, comment)


@click.group("client", cls=GoGroup)
def client() -> None:
    """Clients of the signer."""


@client.command(
    "revoke",
    examples='spire-hw-signer client revoke spiffe://infra.example/spire-server-1 -comment "taken"',
)
@click.argument("identity")
@_comment
@admin_flags
def revoke(admin: Admin, identity: str, comment: str) -> None:
    """Shut a client out at once; one operator is enough for that."""
    _direct(admin, Action.CLIENT_REVOKE, identity, comment)


@client.command("unrevoke", examples="spire-hw-signer client unrevoke sha256:3f0c -comment cleaned")
@click.argument("identity")
@_comment
@admin_flags
def unrevoke(admin: Admin, identity: str, comment: str) -> None:
    """Let a client in again that was shut out here."""
    _direct(admin, Action.CLIENT_UNREVOKE, identity, comment)


@click.group("policy", cls=GoGroup)
def policy() -> None:
    """What clients may do."""


@policy.command("reload", examples='spire-hw-signer policy reload -comment "new server"')
@_comment
@admin_flags
def reload(admin: Admin, comment: str) -> None:
    """Read policy and TLS files again, as SIGHUP does."""
    _direct(admin, Action.POLICY_RELOAD, "", comment)


@policy.command("hash", examples="spire-hw-signer policy hash signer-policy.conf")
@click.argument("file")
@output_flags
def hash_(file: str, output: str, field: str) -> None:
    """Print what `status`, the audit log and orders call a policy; needs no signer at hand."""
    value = load_policy(Path(file)).hash
    printer = Printer(as_json=output == "json", field=field)
    printer.value({"policy": value}, lambda: click.echo(value))


@click.group("clock", cls=GoGroup)
def clock() -> None:
    """The clock of the signer's machine."""


@clock.command("accept", examples='spire-hw-signer clock accept -comment "battery replaced"')
@_comment
@admin_flags
def accept(admin: Admin, comment: str) -> None:
    """Have the signer believe the clock again, once you have made sure that it is right."""
    _direct(admin, Action.CLOCK_ACCEPT, "", comment)


@click.command("key", cls=GoCommand, examples="spire-hw-signer log key > log-key.pem")
@admin_flags
def log_key(admin: Admin) -> None:
    """Print the public key that signs checkpoints, PEM; keep it where the signer cannot reach."""
    answer = admin.call(ADMIN, "GetStatus", pb.GetStatusRequest())
    pem = load_der_public_key(answer.log_key).public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    text = pem.decode("ascii")
    admin.printer.value({"log_key": text}, lambda: click.echo(text, nl=False))
