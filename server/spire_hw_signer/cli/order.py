"""Orders: what several operators agree to, each with a key of their own."""

from __future__ import annotations

import json
import os
import secrets
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from spire_hw._pb import hw_signer_admin_pb2 as pb
from spire_hw.cli.files import read_input
from spire_hw.cli.flags import DURATION, GoGroup, flag
from spire_hw.cli.output import Printer, complain, output_flags, relative, shown, table
from spire_hw.clock import SystemClock
from spire_hw.errors import InvalidInputError
from spire_hw.files import create_file, replace_file
from spire_hw_signer.audit.chain import LogHead
from spire_hw_signer.cli.admin import ADMIN, print_done
from spire_hw_signer.cli.connect import admin_flags
from spire_hw_signer.operators import load_private_key
from spire_hw_signer.orders import (
    MAX_LIFE,
    MAX_ORDER_BYTES,
    Action,
    Order,
    SignedOrder,
    check_name,
    check_target,
    parse_order,
)

if TYPE_CHECKING:
    from spire_hw.cli.admin import Admin

_NONCE_BYTES: Final = 16
_WIDTH: Final = 12
_DEFAULT_LIFE: Final = timedelta(hours=24)


@click.group("order", cls=GoGroup)
def group() -> None:
    """Orders that several operators have to sign."""


@group.command("keygen", examples="spire-hw-signer order keygen -out alice.key")
@flag("out", "File for the private key; the public one goes beside it, as FILE.pub.", default="")
@output_flags
def keygen(out: str, output: str, field: str) -> None:
    """Make an operator's key; keep it on a machine of your own, not on the signer's."""
    if not out:
        raise click.UsageError("a file is required: -out FILE")
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    file = Path(out)
    beside = file.with_name(f"{file.name}.pub")
    create_file(file, private, "operator's key")
    create_file(beside, public, "operator's public key", mode=0o644)

    def pretty() -> None:
        click.echo(f"Private key: {file}\nPublic key:  {beside}, for the signer's operators {{ }}")

    values = {"private_key": str(file), "public_key": str(beside)}
    Printer(as_json=output == "json", field=field).value(values, pretty)


@group.command(
    "create",
    examples="""
    spire-hw-signer order create -action key.restore -target example.org/s1/x509-CA-A@3 -out o.json
    spire-hw-signer order create -action log.seal -target FILE@DIGEST -log ID -head SEQ:HASH -out o.json
    """,
)
@flag("action", "What is to be done.", type=click.Choice([a.value for a in Action]))
@flag("target", "To what; see the manual for each action.", default="")
@flag("expires", "How long the order is good for.", type=DURATION, default=_DEFAULT_LIFE)
@flag("comment", "Why.", default="")
@flag("log", "Id of the signer's audit log; asked of the signer without it.", default="")
@flag("head", "Record of that log and its hash, SEQ:HASH; likewise.", default="")
@flag("out", "File for the order.", default="")
@admin_flags
def create(
    admin: Admin,
    *,
    action: str | None,
    target: str,
    expires: timedelta,
    comment: str,
    log: str,
    head: str,
    out: str,
) -> None:
    """Write an order that nobody has signed yet."""
    if not action or not out:
        raise click.UsageError("an action and a file are required: -action ACTION -out FILE")
    if not timedelta() < expires <= MAX_LIFE:
        raise click.UsageError(f"-expires is more than nothing and up to {MAX_LIFE.days * 24}h")
    wanted = Action.parse(action)
    check_target(wanted, target)
    if bool(log) != bool(head):
        raise click.UsageError("-log and -head go together")
    if not log:
        status = admin.call(ADMIN, "GetStatus", pb.GetStatusRequest())
        log, at = status.log_id, LogHead(status.log_head.seq, status.log_head.hash)
    else:
        at = _parse_head(head)
    order = Order(
        action=wanted,
        target=target,
        expires=SystemClock().now() + expires,
        log=log,
        head=at,
        nonce=secrets.token_hex(_NONCE_BYTES),
        comment=comment,
    )
    data = SignedOrder(order).encode()
    parse_order(data)
    create_file(Path(out), data, "order file", mode=0o644)
    admin.printer.value(json.loads(data), lambda: _print_order(SignedOrder(order)))


@group.command(
    "sign",
    examples="spire-hw-signer order sign -order o.json -name alice -key alice.key",
)
@flag("order", "Order file; the signature is added to it.", default="")
@flag("name", "Your name in the signer's configuration.", default="")
@flag("key", "Your private key.", default="")
@flag("yes", "Do not ask.", type=bool, default=False)
@output_flags
def sign(*, order: str, name: str, key: str, yes: bool, output: str, field: str) -> None:
    """Sign an order after reading what it says; needs no signer at hand."""
    if not order or not name or not key:
        raise click.UsageError("-order FILE, -name NAME and -key FILE are required")
    check_name(name)
    path = Path(order)
    signed = parse_order(read_input(order, MAX_ORDER_BYTES))
    if not yes:
        complain(_order_text(signed))
        if os.isatty(0):
            click.confirm("Sign this?", abort=True, err=True)
        else:
            raise click.UsageError("nobody is there to be asked; -yes signs without asking")
    made = signed.sign(name, load_private_key(Path(key)))
    replace_file(path, made.encode(), "order file", mode=0o644)
    printer = Printer(as_json=output == "json", field=field)
    printer.value(json.loads(made.encode()), lambda: _print_order(made))


@group.command("show", examples="spire-hw-signer order show -order o.json")
@flag("order", "Order file.", default="")
@output_flags
def show(order: str, output: str, field: str) -> None:
    """Print what an order says; signatures are not verified."""
    if not order:
        raise click.UsageError("a file is required: -order FILE")
    signed = parse_order(read_input(order, MAX_ORDER_BYTES))
    printer = Printer(as_json=output == "json", field=field)
    printer.value(json.loads(signed.encode()), lambda: _print_order(signed))


@group.command("submit", examples="spire-hw-signer order submit -order o.json")
@flag("order", "Order file.", default="")
@admin_flags
def submit(admin: Admin, order: str) -> None:
    """Have the signer carry out an order that enough operators have signed."""
    if not order:
        raise click.UsageError("a file is required: -order FILE")
    data = read_input(order, MAX_ORDER_BYTES)
    parse_order(data)
    done = admin.call(ADMIN, "CarryOut", pb.CarryOutRequest(order=data))
    print_done(admin, done)


def _parse_head(text: str) -> LogHead:
    seq, _, value = text.partition(":")
    try:
        return LogHead(int(seq), bytes.fromhex(value))
    except ValueError as e:
        raise InvalidInputError("-head: expected a number, a colon and a hash") from e


def _order_text(signed: SignedOrder) -> str:
    order = signed.order
    rows: list[tuple[str, Any]] = [
        ("Action", order.action.value),
        ("Target", order.target),
        ("Comment", order.comment),
        ("Expires", relative(order.expires, SystemClock().now())),
        ("Signer's log", order.log),
        ("Record", str(order.head)),
        ("Nonce", order.nonce),
        ("Signed by", ", ".join(signed.signatures) or "nobody"),
    ]
    return table([(label, shown(value)) for label, value in rows], _WIDTH)


def _print_order(signed: SignedOrder) -> None:
    click.echo(_order_text(signed), nl=False)
