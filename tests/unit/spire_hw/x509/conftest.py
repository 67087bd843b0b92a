from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from spire_hw.key import KeyType, PrivateKey, SoftwareSigner, generate_private_key
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.authority import X509Authority
from spire_hw.x509.issue import issue_ca_certificate

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)

_CA_USAGE = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


class Mint:
    """Makes certificates of any shape, also wrong ones, with the library's own builder."""

    def key(self) -> ec.EllipticCurvePrivateKey:
        return ec.generate_private_key(ec.SECP256R1())

    def name(self, text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def certificate(
        self,
        subject: str,
        key: PrivateKey,
        issuer: str,
        issuer_key: PrivateKey,
        *,
        ca: bool | None = True,
        path_length: int | None = None,
        usage: x509.KeyUsage | None = None,
        uris: tuple[str, ...] = (),
        start: datetime = NOW - timedelta(days=1),
        end: datetime = NOW + timedelta(days=1),
        extra: tuple[tuple[x509.ExtensionType, bool], ...] = (),
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name(subject))
            .issuer_name(self.name(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )
        if ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca, path_length), True)
        if usage is not None:
            builder = builder.add_extension(usage, True)
        if uris:
            names = [x509.UniformResourceIdentifier(uri) for uri in uris]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        for value, critical in extra:
            builder = builder.add_extension(value, critical)
        return builder.sign(issuer_key, hashes.SHA256())

    def usage(self, **bits: bool) -> x509.KeyUsage:
        names = {n: getattr(_CA_USAGE, n) for n in ("key_cert_sign", "crl_sign")}
        empty: dict[str, Any] = {
            "digital_signature": False,
            "content_commitment": False,
            "key_encipherment": False,
            "data_encipherment": False,
            "key_agreement": False,
            "encipher_only": False,
            "decipher_only": False,
        }
        return x509.KeyUsage(**(empty | names | bits))


@pytest.fixture(scope="session")
def mint() -> Mint:
    return Mint()


@pytest.fixture
def now() -> datetime:
    return NOW


@cache
def _key(key_type: KeyType) -> PrivateKey:
    return generate_private_key(key_type)


MakeAuthority = Callable[[KeyType], Awaitable[X509Authority]]


@pytest_asyncio.fixture
async def make_authority() -> MakeAuthority:
    async def make(key_type: KeyType) -> X509Authority:
        signer = SoftwareSigner(_key(key_type))
        root = await issue_ca_certificate(
            None,
            signer=signer,
            trust_domain=TrustDomain("example.org"),
            not_before=NOW - timedelta(seconds=10),
            not_after=NOW + timedelta(days=1),
        )
        return X509Authority(root, signer)

    return make
