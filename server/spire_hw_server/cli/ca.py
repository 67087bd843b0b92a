"""A CA under an offline root: the server's half of it, and the ceremony on the root's own machine."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from spire_hw import log as logs
from spire_hw._pb import hw_ca_pb2 as pb
from spire_hw.cli.flags import DURATION, GoCommand, GoGroup, flag
from spire_hw.cli.output import complain, epoch, relative, rfc3339, table
from spire_hw.clock import SystemClock
from spire_hw.errors import InvalidInputError, SpireHwError
from spire_hw.files import create_file, parse_file
from spire_hw.key import KeyType
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.certificate import encode_pem, load_certificate, parse_pem, public_key_of
from spire_hw.x509.name import Subject
from spire_hw_server.ca import ceremony
from spire_hw_server.cli.connect import admin_flags

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.cli.admin import Admin
    from spire_hw.pkcs11.existing import ExistingKey

_CA: Final = pb.DESCRIPTOR.services_by_name["Ca"]
_MAX_FILE_BYTES: Final = 1 << 20
_WIDTH: Final = 16
_UNLIMITED: Final = -1
_KEY_HELP: Final = (
    "RFC 7512 URI of the root's key: pkcs11:token=...;object=...?module-path=...; without "
    "&pin-source=file:... the PIN is asked for at the terminal."
)

group = GoGroup("ca", help="A CA of this server under a root that is kept offline.")


@group.command(
    "csr",
    cls=GoCommand,
    examples="spire-hw-server ca csr -out server-ca.csr",
)
@flag("out", "File that gets the request.", default="")
@flag("replace", "Give up an authority that is prepared.", type=bool, default=False)
@admin_flags
def csr(admin: Admin, out: str, *, replace: bool) -> None:
    """Make the key of the next X.509 authority and a certificate request for it.

    Take the request to the root's machine (ca sign) and bring the certificate back (ca import).
    """
    if not out:
        raise click.UsageError("-out is required")
    answer = admin.call(_CA, "RequestAuthority", pb.RequestAuthorityRequest(replace=replace))
    request = x509.load_der_x509_csr(answer.csr)
    create_file(Path(out), request.public_bytes(Encoding.PEM), "request", mode=0o644)
    values = {"file": out, "key_id": answer.key_id, "due_at": answer.due_at}

    def pretty() -> None:
        click.echo(f"Request for key {answer.key_id} written to {out}.")
        if answer.due_at:
            due = epoch(answer.due_at)
            click.echo(
                f"Import the certificate {relative(due, SystemClock().now())} at the latest: then "
                "the server makes its next authority itself, with another key."
            )

    admin.printer.value(values, pretty)


@group.command(
    "import",
    cls=GoCommand,
    examples="spire-hw-server ca import -chain server-ca.pem -root root.pem -activate",
)
@flag("chain", "PEM file with the new CA certificate, then intermediates.", default="")
@flag("root", "PEM file with the root.", default="")
@flag("activate", "Let it sign at once.", type=bool, default=False)
@admin_flags
def import_(admin: Admin, chain: str, root: str, *, activate: bool) -> None:
    """Take the certificate that was signed for the server's request.

    The root is published in the trust bundle; the authority waits until the active one nears its end.
    """
    if not chain or not root:
        raise click.UsageError("-chain and -root are required")
    roots = _read_pem(root)
    if len(roots) != 1:
        raise InvalidInputError(f"{root} holds {len(roots)} certificates, the root alone is needed")
    request = pb.ImportAuthorityRequest(chain=_read_pem(chain), root=roots[0], activate=activate)
    answer = admin.call(_CA, "ImportAuthority", request)

    def pretty() -> None:
        rows = [
            ("Authority ID", answer.authority_id),
            ("Root", answer.root_id),
            ("Expires at", rfc3339(answer.expires_at)),
            ("State", "active" if answer.active else "prepared"),
        ]
        click.echo(table(rows, _WIDTH))

    admin.printer.message(answer, pretty)


def _ceremony_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    for one in (
        flag("yes", "Sign without asking.", type=bool, default=False),
        flag("record", "Files that get the record: this name with .txt and .json.", default=""),
        flag("key", _KEY_HELP, default=""),
    ):
        command = one(command)
    return command


@group.command(
    "root",
    cls=GoCommand,
    examples="""
    spire-hw-server ca root -commonName "Example Root 2026" -out root.pem -record root-ceremony \\
      -key "pkcs11:token=root;object=root-2026?module-path=/usr/lib/hsm.so&pin-source=file:/etc/spire-hw/root-pin"
    """,
)
@flag("keyType", "Type of the new key.", default="ec-p384")
@flag("existing", "Use the key that is there, rather than make one.", type=bool, default=False)
@flag("organization", "Organisation in the root's name.", default="")
@flag("commonName", "Common name of the root.", default="")
@flag("ttl", "How long the root lives.", type=DURATION, default=timedelta(days=3650))
@flag(
    "pathLength", "CA certificates that may stand below it; -1 for any number.", type=int, default=2
)
@flag("out", "File that gets the certificate.", default="")
@_ceremony_flags
def root(
    *,
    key: str,
    key_type: str,
    organization: str,
    common_name: str,
    ttl: timedelta,
    path_length: int,
    out: str,
    record: str,
    existing: bool,
    yes: bool,
) -> None:
    """Make the key and certificate of a root, on the root's own machine."""
    if not key or not common_name or not out or not record:
        raise click.UsageError("-key, -commonName, -out and -record are required")
    subject = Subject(
        organization=(organization,) if organization else (), common_name=common_name
    ).encode()
    wanted = KeyType.parse(key_type)
    _check_new(out, record)
    if not existing and not yes:
        _check_asked()  # a key that is made stays on the token
    limit = None if path_length == _UNLIMITED else path_length

    async def work() -> None:
        opened = await _open(key, None if existing else wanted)
        try:
            now = SystemClock().now()
            plan = ceremony.plan_root(opened, subject, ttl, limit, now)
            await _perform(plan, opened, (), out, record, yes=yes)
        finally:
            await opened.close()

    asyncio.run(work())


@group.command(
    "sign",
    cls=GoCommand,
    examples="""
    spire-hw-server ca sign -csr server-ca.csr -cert root.pem -trustDomain example.org \\
      -out server-ca.pem -record ceremony-1 \\
      -key "pkcs11:token=root;object=root-2026?module-path=/usr/lib/hsm.so&pin-source=file:/etc/spire-hw/root-pin"
    """,
)
@flag("csr", "File with the server's request.", default="")
@flag("cert", "PEM file: the certificate of the key that signs, then those above it.", default="")
@flag("trustDomain", "Trust domain whose CA it is to be.", default="")
@flag("ttl", "How long the CA lives.", type=DURATION, default=timedelta(days=365))
@flag(
    "pathLength", "CA certificates that may stand below it; -1 for any number.", type=int, default=0
)
@flag("out", "File that gets the certificate, and the intermediates above it.", default="")
@_ceremony_flags
def sign(
    *,
    key: str,
    csr: str,
    cert: str,
    trust_domain: str,
    ttl: timedelta,
    path_length: int,
    out: str,
    record: str,
    yes: bool,
) -> None:
    """Sign a server's request with a root, on the root's own machine."""
    if not key or not csr or not cert or not trust_domain or not out or not record:
        raise click.UsageError("-key, -csr, -cert, -trustDomain, -out and -record are required")
    request = parse_file(Path(csr), _MAX_FILE_BYTES, _parse_csr)
    above = _read_pem(cert)
    _check_new(out, record)
    plan = ceremony.plan_intermediate(
        request,
        above[0],
        TrustDomain.parse(trust_domain),
        life=ttl,
        path_length=None if path_length == _UNLIMITED else path_length,
        now=SystemClock().now(),
    )

    async def work() -> None:
        opened = await _open(key, None, above[0])
        try:
            await _perform(plan, opened, _without_root(above), out, record, yes=yes)
        finally:
            await opened.close()

    asyncio.run(work())


def _without_root(chain: list[bytes]) -> tuple[bytes, ...]:
    loaded = [(der, load_certificate(der)) for der in chain]
    return tuple(der for der, c in loaded if c.issuer != c.subject)


async def _open(
    uri: str, key_type: KeyType | None, certificate: bytes | None = None
) -> ExistingKey:
    """Open the root's key, or make it."""
    from spire_hw.pkcs11.existing import make_key, open_existing  # noqa: PLC0415 - HSM code for two commands alone
    from spire_hw.pkcs11.pool.place import Pins, place_of_uri  # noqa: PLC0415 - likewise

    place = place_of_uri(uri, may_ask=True)
    guard, log = Pins().guard(place), logs.get_logger("ceremony")
    if key_type is not None:
        return await make_key(place, guard, log, key_type)
    public_key = None if certificate is None else public_key_of(load_certificate(certificate))
    return await open_existing(place, guard, log, public_key=public_key)


async def _perform(
    plan: ceremony.Plan,
    key: ExistingKey,
    above: tuple[bytes, ...],
    out: str,
    record: str,
    *,
    yes: bool,
) -> None:
    """Show what is to be signed, ask, sign, and write certificate and record."""
    from spire_hw.pkcs11.evidence import evidence_texts  # noqa: PLC0415 - as above

    place = {"Location": key.location, "CKA_ID": key.cka_id.hex(), **evidence_texts(key.evidence)}
    complain(table([*plan.fields().items(), ("Key that signs", key.location)], _WIDTH))
    if not yes:
        _ask()
    made = await ceremony.sign(plan, key)
    values, text = ceremony.record_of(plan, made, place, SystemClock().now())
    create_file(Path(out), encode_pem((made, *above)), "certificate", mode=0o644)
    create_file(Path(f"{record}.json"), _json(values), "record", mode=0o644)
    create_file(Path(f"{record}.txt"), text.encode(), "record", mode=0o644)
    click.echo(text)


def _check_asked() -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("nobody to ask: look at what is to be signed, then use -yes")


def _ask() -> None:
    _check_asked()
    if not click.confirm("Sign this?", default=False, err=True):
        raise SpireHwError("nothing was signed")


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=2).encode() + b"\n"


def _check_new(out: str, record: str) -> None:
    """Refuse to begin a ceremony whose results could not be written."""
    for name in (out, f"{record}.json", f"{record}.txt"):
        if Path(name).exists():
            raise InvalidInputError(f"{name} is there already: records are not written over")
        if not Path(name).absolute().parent.is_dir():
            raise InvalidInputError(f"the directory of {name} does not exist")


def _read_pem(name: str) -> list[bytes]:
    return parse_file(Path(name), _MAX_FILE_BYTES, parse_pem)


def _parse_csr(content: bytes) -> bytes:
    """Return the DER of a request in PEM or DER."""
    if not content.lstrip().startswith(b"-----BEGIN"):
        return content
    try:
        return x509.load_pem_x509_csr(content).public_bytes(Encoding.DER)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise InvalidInputError("holds no certificate request in PEM or DER") from e
