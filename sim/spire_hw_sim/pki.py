"""Throw-away authorities and SVIDs, right ones and wrong ones, made without the code under test."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from spire_hw.bundle.bundle import Bundle, X509Root
from spire_hw.clock import SystemClock
from spire_hw.spiffeid import TrustDomain
from spire_hw.transport.tls import TlsIdentity

if TYPE_CHECKING:
    from spire_hw.key import PrivateKey, PublicKey, Signer

HOUR = timedelta(hours=1)
_EKUS = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


def now() -> datetime:
    """Return the machine's time, in whole seconds."""
    return SystemClock().now().replace(microsecond=0)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


class Authority:
    """A CA of a trust domain; `below` makes an intermediate of it.

    Attributes:
        trust_domain: whose it is.
        parent: who signed it, None for a root.
        key: its private key.
        certificate: its certificate, `der` the same encoded.
    """

    def __init__(self, trust_domain: str, parent: Authority | None = None) -> None:
        self.trust_domain = TrustDomain.parse(trust_domain)
        self.parent = parent
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, f"{trust_domain} {id(self)}")]
        )
        issuer = parent or self
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(issuer.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() - HOUR)
            .not_valid_after(now() + 24 * HOUR)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()),
                critical=False,
            )
            .add_extension(
                x509.SubjectAlternativeName(
                    [x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]
                ),
                critical=False,
            )
        )
        self.certificate = builder.sign(issuer.key, hashes.SHA256())
        self.der = self.certificate.public_bytes(serialization.Encoding.DER)

    def below(self) -> Authority:
        """Return a new intermediate."""
        return Authority(self.trust_domain.name, self)

    @property
    def chain(self) -> tuple[bytes, ...]:
        """Return the DER certificates to send after a leaf, the root left out."""
        return () if self.parent is None else (self.der, *self.parent.chain)

    def bundle(self, *more: Authority) -> Bundle:
        """Return a bundle with this authority and more of the same trust domain."""
        return Bundle(
            self.trust_domain, tuple(X509Root(authority.der) for authority in (self, *more))
        )

    def leaf(
        self,
        public_key: PublicKey,
        spiffe_id: str,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        uris: tuple[str, ...] | None = None,
        ca: bool = False,
        usages: tuple[x509.ObjectIdentifier, ...] = _EKUS,
    ) -> bytes:
        """Return a leaf, DER: a good one unless told otherwise."""
        names = [x509.UniformResourceIdentifier(uri) for uri in uris or (spiffe_id,)]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "SPIRE")]))
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start or now() - HOUR)
            .not_valid_after(end or now() + HOUR)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(_usage(ca=ca), critical=True)
            .add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)

    def identity(
        self,
        spiffe_id: str,
        *,
        private_key: PrivateKey | None = None,
        signer: Signer | None = None,
        version: int = 0,
        start: datetime | None = None,
        end: datetime | None = None,
        uris: tuple[str, ...] | None = None,
        ca: bool = False,
    ) -> TlsIdentity:
        """Return a TLS identity: with a new key unless a key or a signer is given."""
        if signer is not None:
            public_key = signer.public_key
        else:
            private_key = private_key or ec.generate_private_key(ec.SECP256R1())
            public_key = private_key.public_key()
        leaf = self.leaf(public_key, spiffe_id, start=start, end=end, uris=uris, ca=ca)
        return TlsIdentity((leaf, *self.chain), private_key, signer, version)

    def revocation_list(
        self, *serials: int, until: datetime | None = None, name: x509.Name | None = None
    ) -> bytes:
        """Return a revocation list, PEM; the issuer's name may be written another way."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(name or self.name)
            .last_update(now() - 2 * HOUR)
            .next_update(until or now() + HOUR)
        )
        for serial in serials:
            revoked = x509.RevokedCertificateBuilder().serial_number(serial)
            builder = builder.add_revoked_certificate(revoked.revocation_date(now()).build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def dated_pem(begins: datetime, ends: datetime) -> str:
    """Return a self-signed CA certificate for a time that may be over, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "dated")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode()
