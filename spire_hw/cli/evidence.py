"""What commands that give evidence about keys, or check it, have in common."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw.cli.flags import DURATION, F, flag
from spire_hw.cli.output import complain, relative, shown, table
from spire_hw.clock import SystemClock
from spire_hw.errors import (
    AttestationError,
    Finding,
    InvalidInputError,
    SpireHwError,
    VerificationError,
)
from spire_hw.files import parse_file, replace_file

if TYPE_CHECKING:
    from spire_hw.cli.output import Printer
    from spire_hw.evidence.verify import Expected, Verified

_WIDTH: Final = 12
_NONCE_BYTES: Final = 16
_MAX_FILE_BYTES: Final = 64 * 1024
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[0-9a-f]{4,132}")

# Takes the key's id, the nonce and the device's certificates; returns the evidence.
Ask = Callable[[str, bytes, list[bytes]], str]


def evidence_flags(command: F) -> F:
    """Add the flags of a command that `answer` does the work of."""
    for one in reversed(
        (
            flag(
                "nonce",
                "Hex, 8 to 64 bytes: what the evidence has to hold; drawn when it is not given.",
            ),
            flag("out", "File for the evidence in place of standard output.", default=""),
            flag(
                "attestation",
                "PEM file of certificates in which the device attests the key, the key's first, "
                "where they are got another way than over PKCS#11 (YubiHSM: "
                "sign-attestation-certificate).",
                default="",
            ),
            flag("verify", "Check this file of evidence instead; asks nobody.", default=""),
            flag("key", "With -verify: fingerprint of the key it should be about.", default=""),
            flag(
                "signer",
                "With -verify: fingerprint of the key that should have signed it.",
                default="",
            ),
            flag("ak", "With -verify: Name of the TPM's attestation key, hex.", default=""),
            flag("roots", "With -verify: PEM file of the HSM maker's roots.", default=""),
            flag(
                "maxAge",
                "With -verify: how old it may be.",
                type=DURATION,
                default=timedelta(hours=24),
            ),
        )
    ):
        command = one(command)
    return command


def answer(printer: Printer, key_id: str, given: dict[str, Any], ask: Ask) -> None:
    """Get evidence about a key and write it, or check a file of it.

    Args:
        printer: where the answer goes.
        key_id: which key, "" to check a file.
        given: values of `evidence_flags`.
        ask: gets the evidence.

    Raises:
        SpireHwError: the evidence does not hold, or there is none.
    """
    if bool(given["verify"]) == bool(key_id):
        raise click.UsageError("give the id of a key, or -verify with a file")
    nonce = None if given["nonce"] is None else _hex(given["nonce"])
    if given["verify"]:
        _verify(printer, Path(given["verify"]), nonce, given)
        return
    if nonce is None:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        complain(f"Nonce: {nonce.hex()}")
    file = given["attestation"]
    evidence = ask(key_id, nonce, _certificates(Path(file)) if file else [])
    if given["out"]:
        replace_file(Path(given["out"]), evidence.encode() + b"\n", mode=0o644)
        complain(f"Evidence written to {given['out']}")
    else:
        printer.value({"evidence": evidence}, lambda: click.echo(evidence))


def _verify(printer: Printer, path: Path, nonce: bytes | None, given: dict[str, Any]) -> None:
    # Loaded here: parsers of TPM structures that no other command needs.
    from spire_hw.evidence.verify import verify  # noqa: PLC0415

    expected, now = _expected(nonce, given), SystemClock().now()
    try:
        text = parse_file(path, _MAX_FILE_BYTES, _ascii, "evidence")
        verified = verify(text, expected, now)
    except (InvalidInputError, VerificationError) as e:
        found = _findings(e)
        codes = [{"code": one.code, "message": one.message} for one in found]
        printer.value({"holds": False, "findings": codes}, lambda: None)
        lines = "\n".join(f"  {one.message} [{one.code}]" for one in found)
        raise SpireHwError(f"evidence {path} does not hold:\n{lines}") from e

    def pretty() -> None:
        _print(verified)

    printer.value(_values(verified), pretty)


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
