"""DevID certificates for nodes that attested with the same TPM."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from spire_hw._pb import hw_devid_pb2
from spire_hw.cli.flags import DURATION, GoGroup, flag
from spire_hw.clock import SystemClock
from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.key import check_public_key
from spire_hw.tpm.devidrequest import DevIdRequest, check_request, parse_request
from spire_hw.x509.certificate import encode_pem, load_certificate, parse_pem
from spire_hw.x509.devid import issue_devid
from spire_hw_server.cli.connect import Admin, admin_flags

if TYPE_CHECKING:
    from cryptography import x509

    from spire_hw.key import PrivateKey

_DEVID: Final = hw_devid_pb2.DESCRIPTOR.services_by_name["DevId"]
_MAX_FILE_BYTES: Final = 1 << 20
_YEAR: Final = timedelta(days=365)


@click.group("devid", cls=GoGroup)
def group() -> None:
    """DevID certificates for nodes that attested by their TPM."""


@group.command(
    "issue",
    examples="""
    spire-hw-server tpm devid issue -request devid.request.json -commonName web-1 \\
        -caCert devid-ca.pem -caKey devid-ca.key -out devid.crt.pem
    """,
)
@flag("request", "What `spire-hw-agent tpm devid create` wrote on the node.", default="")
@flag("commonName", "Name of the machine in the certificate.", default="")
@flag("caCert", "PEM file: the provisioning CA's certificate, then its issuers.", default="")
@flag("caKey", "PEM file with the provisioning CA's private key.", default="")
@flag("ttl", "How long the certificate is valid.", type=DURATION, default=_YEAR)
@flag("out", "File to write the certificate and its issuers to.", default="")
@admin_flags
def issue(
    admin: Admin,
    *,
    request: str,
    common_name: str,
    ca_cert: str,
    ca_key: str,
    ttl: timedelta,
    out: str,
) -> None:
    """Issue a DevID certificate, if the server knows the TPM the request is from."""
    given = {"request": request, "commonName": common_name, "caCert": ca_cert, "caKey": ca_key}
    if missing := [f"-{name}" for name, value in {**given, "out": out}.items() if not value]:
        raise click.UsageError(f"required: {', '.join(missing)}")
    if ttl <= timedelta(0):
        raise click.UsageError("-ttl must be greater than 0")
    asked = parse_request(_read(Path(request)))
    checked = check_request(asked)  # by ourselves too: what is signed here is ours to answer for
    authority, issuers = _load_authority(Path(ca_cert))
    key = _load_key(Path(ca_key))
    node = admin.call(_DEVID, "CheckRequest", _message(asked))
    certificate = issue_devid(
        authority,
        key,
        spki=checked.csr.spki,
        common_name=common_name,
        now=SystemClock().now(),
        ttl=ttl,
    )
    _write(Path(out), encode_pem([certificate, *issuers]))
    admin.printer.message(
        node, lambda: click.echo(f"DevID certificate of {node.agent_id} written to {out}")
    )


def _message(request: DevIdRequest) -> hw_devid_pb2.CheckDevIdRequest:
    return hw_devid_pb2.CheckDevIdRequest(
        csr=request.csr,
        public_area=request.public,
        ak=request.ak,
        attest=request.attest,
        signature=request.signature,
    )


def _load_authority(path: Path) -> tuple[x509.Certificate, list[bytes]]:
    """Return the provisioning CA and what has to follow its certificates: it, unless a root."""
    try:
        chain = parse_pem(_read(path))
        loaded = [load_certificate(der) for der in chain]
    except InvalidInputError as e:
        raise InvalidInputError(f"{path}: {e.message}") from e
    issuers = [d for d, c in zip(chain, loaded, strict=True) if c.subject != c.issuer]
    return loaded[0], issuers


def _load_key(path: Path) -> PrivateKey:
    content = _read(path)
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError as e:
        raise InvalidInputError(f"{path}: the private key is encrypted; decrypt it") from e
    except (ValueError, UnsupportedAlgorithm) as e:
        raise InvalidInputError(f"{path}: holds no private key in PEM") from e
    try:
        check_public_key(key.public_key())
    except InvalidInputError as e:
        raise InvalidInputError(f"{path}: {e.message}") from e
    return key  # type: ignore[return-value]  # check_public_key let EC and RSA alone through


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as e:
        raise NotReadyError(f"{path} cannot be read: {e.strerror}") from e
    if len(content) > _MAX_FILE_BYTES:
        raise InvalidInputError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB")
    return content


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as e:
        raise NotReadyError(f"{path} cannot be written: {e.strerror}") from e
