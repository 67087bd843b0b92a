"""Makes a DevID key in this machine's TPM and a request for its certificate."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from spire_hw.cli.flags import GoGroup, flag
from spire_hw.errors import AlreadyExistsError, NotReadyError
from spire_hw.files import create_file
from spire_hw.key import KeyType
from spire_hw.tpm.devidrequest import DevIdRequest, qualifier
from spire_hw.x509.csr import build_csr
from spire_hw.x509.name import Subject
from spire_hw_agent.cli.tpm import Chosen, tpm_flags

if TYPE_CHECKING:
    from spire_hw.key import PublicKey, SignOptions
    from spire_hw.tpm.device import TpmDevice
    from spire_hw.tpm.devid import DevIdKey

_TIMEOUT_S: Final = 180.0
_MAX_COMMON_NAME: Final = 64
_KEY_TYPES: Final = ("ec-p256", "rsa-2048")
_PUBLIC, _PRIVATE = "devid.pub.blob", "devid.priv.blob"
_CSR, _REQUEST = "devid.csr.pem", "devid.request.json"


@click.group("devid", cls=GoGroup)
def group() -> None:
    """A certificate for a key in this machine's TPM."""


@group.command(
    "create",
    examples="""
    spire-hw-agent tpm devid create -out /etc/spire-hw/devid -commonName web-1
    """,
)
@flag("out", "Directory to write the files to; made when missing.", default="")
@flag("commonName", "Name to ask for; the machine's host name when unset.", default="")
@flag("keyType", "Type of the key.", type=click.Choice(_KEY_TYPES), default="ec-p256")
@flag("passwordPath", "File with a password for the key.", default="")
@flag("ownerAuthPath", "File with the password of the owner hierarchy, if one is set.", default="")
@tpm_flags
def create(
    *,
    chosen: Chosen,
    out: str,
    common_name: str,
    key_type: str,
    password_path: str,
    owner_auth_path: str,
) -> None:
    """Make a key in the TPM, a certificate request for it, and the proof where it is."""
    if not out:
        raise click.UsageError("-out is required")
    folder = Path(out)
    _check_free(folder)
    subject = Subject(common_name=common_name or socket.gethostname()[:_MAX_COMMON_NAME])
    files = asyncio.run(
        _make(chosen, KeyType.parse(key_type), subject, password_path, owner_auth_path)
    )
    _write(folder, files)
    chosen.printer.value(
        {"files": [str(folder / name) for name in files]},
        lambda: click.echo(
            f"Key and request are in {folder}. Take {folder / _REQUEST} to\n"
            "`spire-hw-server tpm devid issue`, or the CSR to a CA of yours."
        ),
    )


async def _make(
    chosen: Chosen, key_type: KeyType, subject: Subject, password_path: str, owner_auth_path: str
) -> dict[str, bytes]:
    # Here, so that other commands work on a machine without libtss2.
    from spire_hw.tpm.attest import AkKind, read_attestation_key  # noqa: PLC0415
    from spire_hw.tpm.connection import Hierarchy  # noqa: PLC0415
    from spire_hw.tpm.device import TpmDevice, load_password  # noqa: PLC0415
    from spire_hw.tpm.devid import DevIdKey, certify_devid, create_devid  # noqa: PLC0415

    password = load_password(password_path, pipes=True)
    device = TpmDevice(chosen.tcti)
    try:
        for hierarchy, path in (
            (Hierarchy.ENDORSEMENT, chosen.password_path),
            (Hierarchy.OWNER, owner_auth_path),
        ):
            if path:
                device.set_password(hierarchy, load_password(path, pipes=True))
        blob = await device.run(
            "make DevID key", lambda c: create_devid(c, key_type, password), timeout_s=_TIMEOUT_S
        )
        key = DevIdKey(blob, password)
        csr = await build_csr(_Signer(device, key), subject=subject.encode())
        ak = await device.run("make attestation key", lambda c: read_attestation_key(c, AkKind.ECC))
        proof = await device.run(
            "certify DevID key", lambda c: certify_devid(c, key, qualifier(csr), AkKind.ECC)
        )
    finally:
        await device.close()
    request = DevIdRequest(csr, blob.parsed.raw, ak, proof.attest, proof.signature)
    pem = x509.load_der_x509_csr(csr).public_bytes(serialization.Encoding.PEM)
    return {
        _PUBLIC: blob.parsed.raw,
        _PRIVATE: blob.private[2:],
        _CSR: pem,
        _REQUEST: request.encode(),
    }


class _Signer:
    """A `Signer` over a DevID key."""

    def __init__(self, device: TpmDevice, key: DevIdKey) -> None:
        self._device = device
        self._key = key

    @property
    def public_key(self) -> PublicKey:
        """Return the public half."""
        return self._key.blob.parsed.key

    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        """Sign a SHA-256 digest; the key has no other scheme."""
        from spire_hw.tpm.devid import sign_devid  # noqa: PLC0415 - loads libtss2

        del options
        return await self._device.run("sign", lambda c: sign_devid(c, self._key, digest))


def _check_free(folder: Path) -> None:
    taken = [n for n in (_PUBLIC, _PRIVATE, _CSR, _REQUEST) if (folder / n).exists()]
    if taken:
        raise AlreadyExistsError(
            f"{folder / taken[0]} is there already: a DevID is not replaced; choose another "
            "directory, or remove the old one"
        )


def _write(folder: Path, files: dict[str, bytes]) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise NotReadyError(f"{folder} cannot be written: {e.strerror}") from e
    for name, content in files.items():
        create_file(folder / name, content)
