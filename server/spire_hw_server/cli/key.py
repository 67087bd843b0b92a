"""The keys this server signs with: where they are, and evidence of it that travels."""

from __future__ import annotations

import re
import secrets
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw._pb import hw_keys_pb2 as pb
from spire_hw.cli.flags import DURATION, GoCommand, GoGroup, flag
from spire_hw.cli.output import complain, count_of, epoch, relative, shown, table
from spire_hw.clock import SystemClock
from spire_hw.errors import (
    AttestationError,
    Finding,
    InvalidInputError,
    SpireHwError,
    VerificationError,
)
from spire_hw.files import parse_file, replace_file
from spire_hw_server.cli.connect import Admin, admin_flags

if TYPE_CHECKING:
    from spire_hw.evidence.verify import Expected, Verified

_KEYS: Final = pb.DESCRIPTOR.services_by_name["Keys"]
_WIDTH: Final = 12
_NONCE_BYTES: Final = 16
_MAX_FILE_BYTES: Final = 64 * 1024
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[0-9a-f]{4,132}")

group = GoGroup("key", help="The keys this server signs with: where they are, and who says so.")


@group.command("list", cls=GoCommand, examples="spire-hw-server key list")
@admin_flags
def list_keys(admin: Admin) -> None:
    """List all keys, with the authorities they belong to."""
    answer = admin.call(_KEYS, "ListKeys", pb.ListKeysRequest())

    def pretty() -> None:
        click.echo(f"Found {count_of(len(answer.keys), 'key', 'keys')}:\n")
        for key in answer.keys:
            click.echo(table(_rows(key), _WIDTH))

    admin.printer.message(answer, pretty)


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
@flag("nonce", "Hex, 8 to 64 bytes: what the evidence has to hold; drawn when it is not given.")
@flag("out", "File for the evidence in place of standard output.", default="")
@flag(
    "attestation",
    "PEM file of certificates in which the device attests the key, the key's first, where they are "
    "got another way than over PKCS#11 (YubiHSM: sign-attestation-certificate).",
    default="",
)
@flag("verify", "Check this file of evidence instead; asks no server.", default="")
@flag("key", "With -verify: fingerprint of the key it should be about.", default="")
@flag("signer", "With -verify: fingerprint of the key that should have signed it.", default="")
@flag("ak", "With -verify: Name of the TPM's attestation key, hex.", default="")
@flag("roots", "With -verify: PEM file of the HSM maker's roots.", default="")
@flag(
    "maxAge",
    "With -verify: how old it may be.",
    type=DURATION,
    default=timedelta(hours=24),
)
@admin_flags
def attest(admin: Admin, key_id: str, nonce: str | None, verify: str, **given: Any) -> None:
    """Return signed evidence of where a key lives, or check such evidence.

    A TPM's key comes with what the TPM itself signs, other keys with what the device reports. The
    whole is signed by the key "evidence-log" of the same KeyManager.
    """
    if bool(verify) == bool(key_id):
        raise click.UsageError("give the id of a key, or -verify with a file")
    raw = None if nonce is None else _hex(nonce)
    if verify:
        _verify(admin, Path(verify), raw, given)
        return
    drawn = secrets.token_bytes(_NONCE_BYTES) if raw is None else raw
    if raw is None:
        complain(f"Nonce: {drawn.hex()}")
    request = pb.AttestKeyRequest(id=key_id, nonce=drawn)
    if given["attestation"]:
        request.attestation.extend(_certificates(Path(given["attestation"])))
    answer = admin.call(_KEYS, "AttestKey", request)
    if given["out"]:
        replace_file(Path(given["out"]), answer.evidence.encode() + b"\n", mode=0o644)
        complain(f"Evidence written to {given['out']}")
    else:
        admin.printer.message(answer, lambda: click.echo(answer.evidence))


def _verify(admin: Admin, path: Path, nonce: bytes | None, given: dict[str, Any]) -> None:
    # Loaded here: parsers of TPM structures that no other command of this file needs.
    from spire_hw.evidence.verify import verify as check  # noqa: PLC0415

    expected, now = _expected(nonce, given), SystemClock().now()
    try:
        text = parse_file(path, _MAX_FILE_BYTES, _ascii, "evidence")
        verified = check(text, expected, now)
    except (InvalidInputError, VerificationError) as e:
        found = _findings(e)
        codes = [{"code": one.code, "message": one.message} for one in found]
        admin.printer.value({"holds": False, "findings": codes}, lambda: None)
        lines = "\n".join(f"  {one.message} [{one.code}]" for one in found)
        raise SpireHwError(f"evidence {path} does not hold:\n{lines}") from e

    def pretty() -> None:
        _print(verified)

    admin.printer.value(_values(verified), pretty)


def _findings(error: InvalidInputError | VerificationError) -> list[Finding]:
    if isinstance(error, AttestationError):
        return error.findings
    malformed = isinstance(error, InvalidInputError)
    return [Finding("evidence_malformed" if malformed else "evidence_signature", error.message)]


def _expected(nonce: bytes | None, given: dict[str, Any]) -> Expected:
    from spire_hw.evidence.verify import Expected  # noqa: PLC0415 - as above
    from spire_hw.x509.certificate import load_certificate  # noqa: PLC0415

    roots = given["roots"]
    found = _certificates(Path(roots)) if roots else []
    return Expected(
        nonce=nonce,
        max_age=given["max_age"],
        key=_matching(_SHA256, given["key"], "-key"),
        signer=_matching(_SHA256, given["signer"], "-signer"),
        ak_name=_matching(_NAME, given["ak"], "-ak"),
        roots=tuple(load_certificate(der) for der in found),
    )


def _matching(pattern: re.Pattern[str], text: str, name: str) -> str | None:
    if not text:
        return None
    lower = text.lower().removeprefix("sha256:")
    if pattern.fullmatch(lower) is None:
        raise click.UsageError(f"{name} is not hex of the right length")
    return lower


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as e:
        raise click.UsageError("-nonce is not hex") from e


def _ascii(content: bytes) -> str:
    try:
        return content.decode("ascii")
    except UnicodeDecodeError as e:
        raise InvalidInputError("is no evidence: it is not text") from e


def _certificates(path: Path) -> list[bytes]:
    from spire_hw.x509.certificate import parse_pem  # noqa: PLC0415 - as above

    return parse_file(path, _MAX_FILE_BYTES, parse_pem)


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


def _print(verified: Verified) -> None:
    document = verified.document
    evidence, now = document.key.evidence, SystemClock().now()
    rows = [
        ("Key", document.key.key_id),
        ("Fingerprint", document.key.fingerprint),
        ("Of", document.trust_domain),
        ("Custody", evidence.custody.value),
        ("Location", evidence.location),
        ("Made", relative(document.made_at, now)),
        ("Nonce", document.nonce.hex()),
    ]
    click.echo(table(rows, _WIDTH))
    for sentence in verified.proved:
        click.echo(f"Proved: {shown(sentence)}")
    for sentence in verified.believed:
        click.echo(f"Believed: {shown(sentence)}")


def _values(verified: Verified) -> dict[str, Any]:
    from spire_hw.evidence.document import encode_report  # noqa: PLC0415 - as above

    document = verified.document
    return {
        "holds": True,
        "trust_domain": document.trust_domain,
        "nonce": document.nonce.hex(),
        "made_at": int(document.made_at.timestamp()),
        "key": encode_report(document.key),
        "signer": encode_report(document.signer),
        "proved": list(verified.proved),
        "believed": list(verified.believed),
    }
