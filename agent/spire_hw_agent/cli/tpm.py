"""What this machine's TPM is, and the hash under which a server enrols it."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from cryptography.hazmat.primitives import serialization

from spire_hw.cli.flags import F, GoGroup, flag
from spire_hw.cli.output import Printer, output_flags, table
from spire_hw.errors import InvalidInputError
from spire_hw.tpm.certificate import parse_certificate
from spire_hw.tpm.ekmodel import TpmModel, read_model
from spire_hw.tpm.names import format_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.tpm.connection import Connection
    from spire_hw.tpm.endorsement import Endorsement
    from spire_hw.tpm.info import Lockout, TpmInfo

T = TypeVar("T")

_EK_TYPES: Final = ("auto", "ec-p256", "ec-p384", "rsa-2048", "rsa-3072")
_WIDTH: Final = 18
_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which TPM a command is about, and how it answers.

    Attributes:
        tcti: TCTI or device path; empty for the kernel's resource manager.
        password_path: file with the password of the endorsement hierarchy.
        printer: writes the answer.
    """

    tcti: str
    password_path: str
    printer: Printer

    def run(self, operation: str, job: Callable[[Connection], T]) -> T:
        """Run a job on the TPM."""
        return asyncio.run(self._run(operation, job))

    async def _run(self, operation: str, job: Callable[[Connection], T]) -> T:
        # Here, so that other commands work on a machine without libtss2.
        from spire_hw.tpm.connection import Hierarchy  # noqa: PLC0415
        from spire_hw.tpm.device import TpmDevice, load_password  # noqa: PLC0415

        password = load_password(self.password_path, pipes=True)
        device = TpmDevice(self.tcti)
        try:
            if password:
                device.set_password(Hierarchy.ENDORSEMENT, password)
            return await device.run(operation, job, timeout_s=_TIMEOUT_S)
        finally:
            await device.close()


def tpm_flags(command: F) -> F:
    """Add the flags all commands here have; the command gets `chosen`."""

    @functools.wraps(command)
    def wrapped(
        tpm_device_path: str,
        tcti: str,
        endorsement_auth_path: str,
        output: str,
        field: str,
        **rest: Any,
    ) -> Any:
        if tpm_device_path and tcti:
            raise click.UsageError("give -tpmDevicePath or -tcti, not both")
        printer = Printer(output == "json", field)
        chosen = Chosen(tcti or tpm_device_path, endorsement_auth_path, printer)
        return command(chosen=chosen, **rest)

    made: Any = output_flags(wrapped)
    made = flag(
        "endorsementAuthPath",
        "File with the password of the endorsement hierarchy, if one is set.",
        default="",
    )(made)
    made = flag("tcti", "TCTI string instead of a device.", default="")(made)
    made = flag("tpmDevicePath", "TPM device; /dev/tpmrm0 when there is one TPM.", default="")(made)
    result: F = made
    return result


@click.group("tpm", cls=GoGroup)
def group() -> None:
    """This machine's TPM."""


@group.command(
    "info",
    examples="""
    spire-hw-agent tpm info
    spire-hw-agent tpm info -output json
    """,
)
@tpm_flags
def info(chosen: Chosen) -> None:
    """Show make, abilities, PCR banks and endorsement keys of the TPM."""
    from spire_hw.tpm.info import read_info  # noqa: PLC0415 - loads libtss2

    found = chosen.run("read what the TPM is", read_info)
    chosen.printer.value(_as_values(found), lambda: _show(found))


@group.command(
    "ek-hash",
    examples="""
    spire-hw-agent tpm ek-hash
    spire-hw-server tpm allow $(ssh web-1 spire-hw-agent tpm ek-hash)
    """,
)
@flag(
    "ekType",
    "Which endorsement key, as in the attestor's ek_type.",
    type=click.Choice(_EK_TYPES),
    default="auto",
)
@tpm_flags
def ek_hash(chosen: Chosen, ek_type: str) -> None:
    """Print the hash by which a server enrols this TPM."""
    from spire_hw.tpm.endorsement import EkType, find_endorsement  # noqa: PLC0415 - loads libtss2

    wanted = EkType(ek_type)
    found = chosen.run("find the endorsement key", lambda c: find_endorsement(c, wanted))
    chosen.printer.value(_key_values(found), lambda: click.echo(found.hash))


def _as_values(found: TpmInfo) -> dict[str, Any]:
    identity = found.identity
    return {
        "manufacturer": identity.manufacturer,
        "vendor": identity.vendor,
        "firmware": identity.firmware,
        "specification": identity.specification,
        "algorithms": list(found.algorithms),
        "curves": list(found.curves),
        "pcr_banks": {bank: list(pcrs) for bank, pcrs in found.pcr_banks.items()},
        "ek_hash": found.ek_hash,
        "lockout": asdict(found.lockout),
        "endorsement_keys": [_key_values(key) for key in found.endorsement_keys],
        "complaints": list(found.complaints),
    }


def _key_values(key: Endorsement) -> dict[str, Any]:
    return {
        "ek_hash": key.hash,
        "template": key.label,
        "handle": "" if key.handle is None else f"0x{key.handle:08x}",
        "public_key": _pem_key(key),
        "certificate": None if key.certificate is None else _certificate_values(key.certificate),
        "chain": [one.hex() for one in key.chain],
    }


def _pem_key(key: Endorsement) -> str:
    return key.parsed.key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode("ascii")


def _certificate_values(der: bytes) -> dict[str, Any]:
    """Return what a certificate says; the text of one that does not load is its fault."""
    try:
        certificate = parse_certificate(der)
        model = read_model(certificate)
    except InvalidInputError as e:
        return {"fault": e.message, "der": der.hex()}
    return {
        "issuer": format_name(certificate.issuer),
        "serial": f"{certificate.serial:x}",
        "not_before": certificate.not_before.isoformat(),
        "not_after": certificate.not_after.isoformat(),
        "manufacturer": model.manufacturer,
        "model": model.model,
        "version": model.version,
        "der": der.hex(),
    }


def _show(found: TpmInfo) -> None:
    identity = found.identity
    rows = [
        ("Manufacturer", f"{identity.manufacturer} {identity.vendor}".strip()),
        ("Firmware", identity.firmware),
        ("TPM version", identity.specification),
        ("Algorithms", ", ".join(found.algorithms)),
        ("Curves", ", ".join(found.curves)),
    ]
    rows += [(f"PCR bank {bank}", _ranges(pcrs)) for bank, pcrs in found.pcr_banks.items()]
    rows.append(("Wrong passwords", _lockout_text(found.lockout)))
    click.echo(table(rows, _WIDTH), nl=False)
    for key in found.endorsement_keys:
        click.echo()
        click.echo(table(_key_rows(key), _WIDTH), nl=False)
    for complaint in found.complaints:
        click.echo(f"\nWarning: {complaint}", err=True)


def _lockout_text(lockout: Lockout) -> str:
    counted = f"{lockout.failures} of {lockout.max_failures}"
    if not lockout.is_locked:
        return counted
    return (
        f"{counted}: LOCKED, keys with a password are refused even with the right one; one is "
        f"forgiven every {lockout.interval_s} s, all with `tpm2_dictionarylockout -c`"
    )


def _key_rows(key: Endorsement) -> list[tuple[str, str]]:
    where = "made on demand" if key.handle is None else f"at 0x{key.handle:08x}"
    rows = [("EK hash", key.hash), ("EK", f"template {key.label}, {where}")]
    if key.certificate is None:
        return [*rows, ("EK certificate", "none: enrol by hash")]
    values = _certificate_values(key.certificate)
    if "fault" in values:
        return [*rows, ("EK certificate", values["fault"])]
    model = TpmModel(values["manufacturer"], values["model"], values["version"])
    return [
        *rows,
        ("EK certificate", f"serial {values['serial']}"),
        ("  issuer", values["issuer"]),
        ("  valid", f"{values['not_before']} to {values['not_after']}"),
        ("  TPM", " ".join(t for t in (model.manufacturer, model.model, model.version) if t)),
        ("  chain in TPM", str(len(key.chain))),
    ]


def _ranges(numbers: tuple[int, ...]) -> str:
    """Return `0-7, 10` for the numbers 0 to 7 and 10."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
