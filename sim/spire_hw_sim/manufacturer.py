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
# Larger than any one certificate of ours, so that certificates lie across two indices.
_CHAIN_PART = 1000
_FOREVER = datetime(9999, 12, 31, 23, 59, 59)  # noqa: DTZ001 - x509 takes it as UTC

# PolicySecret(endorsement), the policy of every low-range EK.
_POLICY_A = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")

# Either that or what an NV index holds, the policy of every high-range EK.
_POLICY_B_SHA256 = bytes.fromhex("ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0")
_POLICY_B_SHA384 = bytes.fromhex(
    "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419ca"
    "cb47ba09699646150f9fc000f3f80e12"
)


@dataclass(frozen=True, slots=True)
class _Signer:
    name: x509.Name
    key: ec.EllipticCurvePrivateKey


class EkKind(Enum):
    """Endorsement keys this manufacturer certifies; the value is the certificate's NV index."""

    RSA_2048 = 0x01C00002
    ECC_P256 = 0x01C0000A
    RSA_2048_HIGH = 0x01C00012
    ECC_P256_HIGH = 0x01C00014
    ECC_P384 = 0x01C00016
    RSA_3072 = 0x01C0001C


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
    """A vendor with a root and one or several intermediate CAs.

    Attributes:
        root: root certificate.
        intermediate: the CA that signs EK certificates.
        upper: CAs between both, as on-die CAs have them; the one below the root first.
    """

    def __init__(
        self,
        name: str = "Simulated TPM Vendor",
        *,
        valid_from: datetime | None = None,
        levels: int = 1,
    ) -> None:
        """Make the CAs.

        Args:
            name: organisation in the CA names.
            valid_from: start of all validities; a day ago when None.
            levels: how many CAs there are below the root.
        """
        self._valid_from = valid_from or SystemClock().now() - timedelta(days=1)
        self._root_key = ec.generate_private_key(ec.SECP384R1())
        self._key = ec.generate_private_key(ec.SECP256R1())
        root_name, own_name = _ca_name(name, "Root CA"), _ca_name(name, "EK CA 1")
        root = _Signer(root_name, self._root_key)
        self.root = self._ca(root_name, self._root_key.public_key(), root, levels)
        self.upper: list[x509.Certificate] = []
        above = root
        for level in range(levels - 1, 0, -1):
            signer = _Signer(_ca_name(name, f"CA {level}"), ec.generate_private_key(ec.SECP384R1()))
            self.upper.append(self._ca(signer.name, signer.key.public_key(), above, level))
            above = signer
        self.intermediate = self._ca(own_name, self._key.public_key(), above, 0)

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
        wrapped: bool = False,
        with_chain: bool = True,
    ) -> list[EkCertificate]:
        """Certify a TPM's endorsement keys and store the certificates in its NV.

        Args:
            tpm: a running one.
            kinds: which keys.
            padding: bytes of 0xFF after each certificate, as some vendors leave.
            wrapped: put each certificate into the older form with 5 bytes in front.
            with_chain: also store the CAs between root and EK from 0x01C00100 on.
        """
        made = []
        for kind in kinds:
            handle, public = tpm.commands.create_primary(ENDORSEMENT, _TEMPLATES[kind])
            tpm.commands.flush(handle)
            key = _public_key(public)
            certificate = self.issue(key)
            head = b"\x10\x01\x00" + struct.pack(">H", len(certificate)) if wrapped else b""
            tpm.commands.nv_store(kind.value, head + certificate + b"\xff" * padding)
            made.append(EkCertificate(kind, public, key, certificate))
        if with_chain:
            chain = (self.intermediate, *reversed(self.upper))
            stored = b"".join(one.public_bytes(serialization.Encoding.DER) for one in chain)
            for number, start in enumerate(range(0, len(stored), _CHAIN_PART)):
                part = stored[start : start + _CHAIN_PART]
                tpm.commands.nv_store(_CHAIN_INDEX + number, part)
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
        self, subject: x509.Name, key: PublicKey, issuer: _Signer, path_length: int
    ) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._valid_from)
            .not_valid_after(self._valid_from + timedelta(days=7300))
            .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
            .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()),
                critical=False,
            )
            .sign(issuer.key, hashes.SHA384())
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


def _low(algorithm: int, parameters: bytes, unique: bytes) -> bytes:
    head = struct.pack(">HHI", algorithm, 0x000B, 0x000300B2)
    return head + struct.pack(">H", len(_POLICY_A)) + _POLICY_A + parameters + unique


def _high(algorithm: int, name_alg: int, policy: bytes, parameters: bytes) -> bytes:
    head = struct.pack(">HHI", algorithm, name_alg, 0x000300F2)
    unique = bytes(2 if algorithm == _RSA else 4)
    return head + struct.pack(">H", len(policy)) + policy + parameters + unique


_RSA, _ECC, _SHA256, _SHA384 = 0x0001, 0x0023, 0x000B, 0x000C
_AES_128_CFB = struct.pack(">HHH", 0x0006, 128, 0x0043)
_AES_256_CFB = struct.pack(">HHH", 0x0006, 256, 0x0043)
_NO_SCHEME = struct.pack(">H", 0x0010)
_P256, _P384 = (_NO_SCHEME + struct.pack(">H", curve) + _NO_SCHEME for curve in (3, 4))
_RSA_2048, _RSA_3072 = (_NO_SCHEME + struct.pack(">HI", bits, 0) for bits in (2048, 3072))
_TEMPLATES = {
    EkKind.RSA_2048: _low(_RSA, _AES_128_CFB + _RSA_2048, struct.pack(">H", 256) + bytes(256)),
    EkKind.ECC_P256: _low(_ECC, _AES_128_CFB + _P256, (struct.pack(">H", 32) + bytes(32)) * 2),
    EkKind.RSA_2048_HIGH: _high(_RSA, _SHA256, _POLICY_B_SHA256, _AES_128_CFB + _RSA_2048),
    EkKind.ECC_P256_HIGH: _high(_ECC, _SHA256, _POLICY_B_SHA256, _AES_128_CFB + _P256),
    EkKind.ECC_P384: _high(_ECC, _SHA384, _POLICY_B_SHA384, _AES_256_CFB + _P384),
    EkKind.RSA_3072: _high(_RSA, _SHA384, _POLICY_B_SHA384, _AES_256_CFB + _RSA_3072),
}


def _public_key(public: bytes) -> PublicKey:
    """Read the key at the end of an EK's TPMT_PUBLIC."""
    if public[:2] == b"\x00\x01":
        for size in (256, 384):
            if public[-size - 2 : -size] == struct.pack(">H", size):
                modulus = int.from_bytes(public[-size:], "big")
                return rsa.RSAPublicNumbers(65537, modulus).public_key()
    for curve, size in ((ec.SECP256R1(), 32), (ec.SECP384R1(), 48)):
        if public[-size - 2 : -size] == struct.pack(">H", size):
            x, y = public[-2 * size - 2 : -size - 2], public[-size:]
            return ec.EllipticCurvePublicKey.from_encoded_point(curve, b"\x04" + x + y)
    raise ValueError("a key of another kind")
