"""DevID certificates for nodes that attested with the same TPM."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from spire_hw._pb import hw_devid_pb2
from spire_hw.cli.files import read_input, write_output
from spire_hw.cli.flags import DURATION, GoGroup, flag
from spire_hw.clock import SystemClock
from spire_hw.files import parse_file
from spire_hw.keyfile import load_private_key
from spire_hw.tpm.devidrequest import DevIdRequest, check_request, parse_request
from spire_hw.x509.certificate import encode_der, encode_pem, load_pem
from spire_hw.x509.devid import issue_devid
from spire_hw_server.cli.connect import admin_flags

if TYPE_CHECKING:
    from cryptography import x509

    from spire_hw.cli.admin import Admin


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
    asked = parse_request(read_input(request, _MAX_FILE_BYTES))
    checked = check_request(asked)  # by ourselves too: what is signed here is ours to answer for
    authority, issuers = parse_file(Path(ca_cert), _MAX_FILE_BYTES, _parse_authority, pipes=True)
    key = load_private_key(Path(ca_key), pipes=True)
    node = admin.call(_DEVID, "CheckRequest", _message(asked))
    certificate = issue_devid(
        authority,
        key,
        spki=checked.csr.spki,
        common_name=common_name,
        now=SystemClock().now(),
        ttl=ttl,
    )
    write_output(out, encode_pem([certificate, *issuers]))
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


def _parse_authority(text: bytes) -> tuple[x509.Certificate, list[bytes]]:
    """Return the provisioning CA and what has to follow its certificates: it, unless a root."""
    chain = load_pem(text)
    return chain[0], [encode_der(c) for c in chain if c.subject != c.issuer]
