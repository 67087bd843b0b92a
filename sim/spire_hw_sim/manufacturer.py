"""A throw-away TPM manufacturer: a CA in two levels that certifies simulated TPMs.

Certificates follow the TCG EK credential profile: empty subject, TPM manufacturer, model and
version in a critical subjectAltName, key usage by key type.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID, ObjectIdentifier

from spire_hw.clock import SystemClock
from spire_hw_sim.tpm_command import ENDORSEMENT

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.key import PublicKey
    from spire_hw_sim.swtpm import Swtpm

_MANUFACTURER = ObjectIdentifier("2.23.133.2.1")
_MODEL = ObjectIdentifier("2.23.133.2.2")
_VERSION = ObjectIdentifier("2.23.133.2.3")
_EK_USAGE = ObjectIdentifier("2.23.133.8.1")
_CHAIN_INDEX = 0x01C00100
_FOREVER = datetime(9999, 12, 31, 23, 59, 59)  # noqa: DTZ001 - x509 takes it as UTC

# PolicySecret(endorsement), the policy of every low-range EK.
_POLICY_A = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")


class EkKind(Enum):
    """Endorsement keys this manufacturer certifies; the value is the certificate's NV index."""

    RSA_2048 = 0x01C00002
    ECC_P256 = 0x01C0000A


@dataclass(frozen=True, slots=True)
class EkCertificate:
    """One certified endorsement key.

    Attributes:
        kind: key type.
        public: TPMT_PUBLIC bytes as the TPM gave them.
        public_key: the same as a key.
        certificate: DER.
    """

    kind: EkKind
    public: bytes
    public_key: PublicKey
    certificate: bytes


class Manufacturer:
    """A vendor with root and intermediate CA.

    Attributes:
        root: root certificate.
        intermediate: the CA that signs EK certificates.
    """

    def __init__(
        self, name: str = "Simulated TPM Vendor", *, valid_from: datetime | None = None
    ) -> None:
        """Make both CAs.

        Args:
            name: organisation in the CA names.
            valid_from: start of all validities; a day ago when None.
        """
        self._valid_from = valid_from or SystemClock().now() - timedelta(days=1)
        self._root_key = ec.generate_private_key(ec.SECP384R1())
        self._key = ec.generate_private_key(ec.SECP256R1())
        root_name, own_name = _ca_name(name, "Root CA"), _ca_name(name, "EK CA 1")
        self.root = self._ca(root_name, self._root_key.public_key(), root_name, 1)
        self.intermediate = self._ca(own_name, self._key.public_key(), root_name, 0)

    def roots_pem(self) -> bytes:
        """Return the root certificate as PEM."""
        return self.root.public_bytes(serialization.Encoding.PEM)

    def intermediates_pem(self) -> bytes:
        """Return the intermediate certificate as PEM."""
        return self.intermediate.public_bytes(serialization.Encoding.PEM)

    def write_roots(self, path: Path) -> Path:
        """Write root and intermediate certificates as one PEM file; return its path."""
        path.write_bytes(self.roots_pem() + self.intermediates_pem())
        return path

    def equip(
        self,
        tpm: Swtpm,
        kinds: tuple[EkKind, ...] = (EkKind.ECC_P256, EkKind.RSA_2048),
        *,
        padding: int = 0,
        with_chain: bool = True,
    ) -> list[EkCertificate]:
        """Certify a TPM's endorsement keys and store the certificates in its NV.

        Args:
            tpm: a running one.
            kinds: which keys.
            padding: bytes of 0xFF after each certificate, as some vendors leave.
            with_chain: also store the intermediate at 0x01C00100.
        """
        made = []
        for kind in kinds:
            handle, public = tpm.commands.create_primary(ENDORSEMENT, _TEMPLATES[kind])
            tpm.commands.flush(handle)
            key = _public_key(public)
            certificate = self.issue(key)
            tpm.commands.nv_store(kind.value, certificate + b"\xff" * padding)
            made.append(EkCertificate(kind, public, key, certificate))
        if with_chain:
            chain = self.intermediate.public_bytes(serialization.Encoding.DER)
            tpm.commands.nv_store(_CHAIN_INDEX, chain)
        return made

    def issue(
        self,
        public_key: PublicKey,
        *,
        manufacturer: str = "id:53494D00",
        model: str = "swtpm",
        version: str = "id:00070001",
        not_after: datetime | None = None,
    ) -> bytes:
        """Return a DER EK certificate for a key."""
        identity = x509.Name(
            [
                x509.RelativeDistinguishedName([x509.NameAttribute(oid, value)])
                for oid, value in (
                    (_MANUFACTURER, manufacturer),
                    (_MODEL, model),
                    (_VERSION, version),
                )
            ]
        )
        is_rsa = isinstance(public_key, rsa.RSAPublicKey)
        own = self.intermediate
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(own.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._valid_from)
            .not_valid_after(not_after or _FOREVER)
            .add_extension(
                x509.SubjectAlternativeName([x509.DirectoryName(identity)]), critical=True
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                _key_usage(key_encipherment=is_rsa, key_agreement=not is_rsa), critical=True
            )
            .add_extension(x509.ExtendedKeyUsage([_EK_USAGE]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.DER)

    def _ca(
        self, subject: x509.Name, key: PublicKey, issuer: x509.Name, path_length: int
    ) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._valid_from)
            .not_valid_after(self._valid_from + timedelta(days=7300))
            .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
            .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._root_key.public_key()),
                critical=False,
            )
            .sign(self._root_key, hashes.SHA384())
        )


def _ca_name(organisation: str, common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{organisation} {common_name}"),
        ]
    )


def _key_usage(
    *,
    key_encipherment: bool = False,
    key_agreement: bool = False,
    key_cert_sign: bool = False,
    crl_sign: bool = False,
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=key_agreement,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _template(algorithm: int, parameters: bytes, unique: bytes) -> bytes:
    head = struct.pack(">HHI", algorithm, 0x000B, 0x000300B2)
    policy = struct.pack(">H", len(_POLICY_A)) + _POLICY_A
    return head + policy + parameters + unique


_AES_128_CFB = struct.pack(">HHH", 0x0006, 128, 0x0043)
_NO_SCHEME = struct.pack(">H", 0x0010)
_TEMPLATES = {
    EkKind.RSA_2048: _template(
        0x0001,
        _AES_128_CFB + _NO_SCHEME + struct.pack(">HI", 2048, 0),
        struct.pack(">H", 256) + bytes(256),
    ),
    EkKind.ECC_P256: _template(
        0x0023,
        _AES_128_CFB + _NO_SCHEME + struct.pack(">H", 0x0003) + _NO_SCHEME,
        (struct.pack(">H", 32) + bytes(32)) * 2,
    ),
}


def _public_key(public: bytes) -> PublicKey:
    """Read the key at the end of an EK's TPMT_PUBLIC."""
    if public[:2] == b"\x00\x01":
        modulus = int.from_bytes(public[-256:], "big")
        return rsa.RSAPublicNumbers(65537, modulus).public_key()
    x, y = public[-66:-34], public[-32:]
    return ec.EllipticCurvePublicNumbers(
        int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP256R1()
    ).public_key()
