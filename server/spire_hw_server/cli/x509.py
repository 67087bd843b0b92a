"""X509-SVIDs made by hand."""

from __future__ import annotations

import base64
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw._pb import server_bundle_pb2, server_svid_pb2
from spire_hw.cli.flags import DURATION, GoGroup, flag
from spire_hw.cli.output import complain, epoch, rfc3339
from spire_hw.clock import SystemClock
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.files import replace_file
from spire_hw_server.cli.connect import admin_flags, id_message, id_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw._pb import types_pb2
    from spire_hw.cli.admin import Admin, Session

_SVID: Final = server_svid_pb2.DESCRIPTOR.services_by_name["SVID"]
_BUNDLE: Final = server_bundle_pb2.DESCRIPTOR.services_by_name["Bundle"]


@click.group("x509", cls=GoGroup)
def group() -> None:
    """X509-SVIDs."""


@group.command(
    "mint",
    examples="""
    spire-hw-server x509 mint -spiffeID spiffe://example.org/web -write .
    spire-hw-server x509 mint -spiffeID spiffe://example.org/web -dns web.example.org -ttl 30m
    """,
)
@flag("dns", "DNS name to put into the SVID.", repeated=True)
@flag("spiffeID", "SPIFFE ID of the X509-SVID.", default="")
@flag("ttl", "TTL of the X509-SVID.", type=DURATION, default=timedelta())
@flag("write", "Directory to write files to instead of standard output.", default="")
@admin_flags
def mint(admin: Admin, dns: tuple[str, ...], spiffe_id: str, ttl: timedelta, write: str) -> None:
    """Mint an X509-SVID with a new key."""
    wanted = id_message(spiffe_id)
    key = ec.generate_private_key(ec.SECP256R1())
    request = server_svid_pb2.MintX509SVIDRequest(csr=_csr(key, wanted, dns), ttl=seconds(ttl))
    svid, roots = admin.run(lambda session: _mint(session, request))
    if is_capped(svid.expires_at, ttl):
        expires = rfc3339(svid.expires_at)
        complain(f'X509-SVID lifetime was capped shorter than specified ttl; expires "{expires}"')
    key_der = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    if write:
        _write(Path(write), svid.cert_chain, key_der, roots)
        return
    values = {
        "x509_svid": [_base64(c) for c in svid.cert_chain],
        "private_key": _base64(key_der),
        "root_cas": [_base64(c) for c in roots],
    }

    def pretty() -> None:
        click.echo(f"X509-SVID:\n{pem('CERTIFICATE', svid.cert_chain)}")
        click.echo(f"Private key:\n{pem('PRIVATE KEY', [key_der])}")
        click.echo(f"Root CAs:\n{pem('CERTIFICATE', roots)}")

    admin.printer.value(values, pretty)


async def _mint(
    session: Session, request: server_svid_pb2.MintX509SVIDRequest
) -> tuple[types_pb2.X509SVID, list[bytes]]:
    answer = await session.call(_SVID, "MintX509SVID", request)
    bundle = await session.call(_BUNDLE, "GetBundle", server_bundle_pb2.GetBundleRequest())
    if not answer.svid.cert_chain or not bundle.x509_authorities:
        raise SpireHwError("the server's answer lacks certificates", kind=ErrorKind.INTERNAL)
    return answer.svid, [root.asn1 for root in bundle.x509_authorities]


def _csr(key: ec.EllipticCurvePrivateKey, wanted: types_pb2.SPIFFEID, dns: Sequence[str]) -> bytes:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(id_text(wanted))]
    try:
        names += [x509.DNSName(name) for name in dns]
    except ValueError as e:
        raise click.UsageError(f"-dns: {e}") from e
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def _write(folder: Path, chain: Sequence[bytes], key_der: bytes, roots: Sequence[bytes]) -> None:
    write_public(folder / "svid.pem", pem("CERTIFICATE", chain).encode())
    click.echo(f"X509-SVID written to {folder / 'svid.pem'}")
    write_private(folder / "key.pem", pem("PRIVATE KEY", [key_der]).encode())
    click.echo(f"Private key written to {folder / 'key.pem'}")
    write_public(folder / "bundle.pem", pem("CERTIFICATE", roots).encode())
    click.echo(f"Root CAs written to {folder / 'bundle.pem'}")


def seconds(ttl: timedelta) -> int:
    """Return whole seconds, rounded up."""
    if ttl < timedelta():
        raise click.UsageError("-ttl must not be negative")
    return -(-ttl // timedelta(seconds=1))


def is_capped(expires_at: int, ttl: timedelta) -> bool:
    """Tell whether an SVID lives shorter than was asked for; a minute of delay is no cap."""
    now = SystemClock().now()
    return bool(ttl) and epoch(expires_at) - now < ttl - timedelta(seconds=2)


def pem(label: str, blocks: Sequence[bytes]) -> str:
    """Return DER blocks as PEM."""
    parts = []
    for block in blocks:
        text = base64.b64encode(block).decode()
        lines = "\n".join(text[i : i + 64] for i in range(0, len(text), 64))
        parts.append(f"-----BEGIN {label}-----\n{lines}\n-----END {label}-----\n")
    return "".join(parts)


def write_public(path: Path, data: bytes) -> None:
    """Write a file that all may read, whole or not at all."""
    replace_file(path, data, mode=0o644, shared=True)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    replace_file(path, data, shared=True)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
