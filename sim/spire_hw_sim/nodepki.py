"""A PKI as a site may have had before: an authority, intermediates and certificates of nodes.

Made without the code under test; every certificate can be made wrong on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from spire_hw_sim.pki import HOUR, now

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PEM = serialization.Encoding.PEM
DER = serialization.Encoding.DER
_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


@dataclass(frozen=True)
class Fields:
    """What goes into a certificate.

    Attributes:
        sans: subject alternative names.
        usage: names of the key usages that are set, None for no key usage extension.
        extended: extended key usages, none for no such extension.
        more: further extensions, critical.
    """

    common_name: str = "node-1"
    serial: int = field(default_factory=x509.random_serial_number)
    start: datetime = field(default_factory=lambda: now() - HOUR)
    end: datetime = field(default_factory=lambda: now() + timedelta(days=30))
    ca: bool = False
    path_length: int | None = None
    usage: Sequence[str] | None = ("digital_signature",)
    extended: Sequence[x509.ObjectIdentifier] = ()
    sans: Sequence[x509.GeneralName] = ()
    more: Sequence[x509.ExtensionType] = ()


@dataclass(frozen=True)
class Holder:
    """A certificate and its private key; an authority when its certificate says so."""

    key: Any
    certificate: x509.Certificate
    above: tuple[x509.Certificate, ...] = ()

    @property
    def der(self) -> bytes:
        """Return the certificate in DER."""
        return self.certificate.public_bytes(DER)

    @property
    def chain(self) -> list[bytes]:
        """Return the certificate and the intermediates above it, DER."""
        return [self.der, *(one.public_bytes(DER) for one in self.above)]

    def issue(self, key: Any = None, **fields: Any) -> Holder:
        """Return a new certificate below this one; `fields` are those of `Fields`."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        wanted = Fields(**fields)
        made = _builder(key.public_key(), wanted, self.certificate.subject)
        is_root = self.certificate.subject == self.certificate.issuer
        above = () if is_root else (self.certificate, *self.above)
        return Holder(key, made.sign(self.key, hashes.SHA256()), above)

    def below(self, **fields: Any) -> Holder:
        """Return an intermediate authority."""
        usual = {"common_name": "Site Intermediate", "ca": True, "usage": ("key_cert_sign",)}
        return self.issue(**{**usual, **fields})

    def write(self, directory: Path, name: str) -> tuple[Path, Path]:
        """Write `<name>.crt` with its intermediates and `<name>.key`; return both paths."""
        certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
        certificate.write_bytes(
            b"".join(one.public_bytes(PEM) for one in (self.certificate, *self.above))
        )
        key.touch(mode=0o600)
        key.write_bytes(
            self.key.private_bytes(
                PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, key


def make_root(common_name: str = "Site Root", **fields: Any) -> Holder:
    """Return a new root authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    wanted = Fields(
        **{"common_name": common_name, "ca": True, "usage": ("key_cert_sign",), **fields}
    )
    name = _name(wanted.common_name)
    made = _builder(key.public_key(), wanted, name)
    return Holder(key, made.sign(key, hashes.SHA256()))


def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    """Return a new RSA key."""
    return rsa.generate_private_key(65537, bits)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])


def _builder(public_key: Any, wanted: Fields, issuer: x509.Name) -> x509.CertificateBuilder:
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(wanted.common_name))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(wanted.serial)
        .not_valid_before(wanted.start)
        .not_valid_after(wanted.end)
        .add_extension(x509.BasicConstraints(wanted.ca, wanted.path_length), critical=True)
    )
    if wanted.usage is not None:
        usage = x509.KeyUsage(**{name: name in wanted.usage for name in _USAGES})
        builder = builder.add_extension(usage, critical=True)
    if wanted.extended:
        builder = builder.add_extension(x509.ExtendedKeyUsage(wanted.extended), critical=False)
    if wanted.sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(wanted.sans), critical=False)
    for extension in wanted.more:
        builder = builder.add_extension(extension, critical=True)
    return builder
