"""Attestation certificates as a YubiHSM 2 is documented to make them; not tried with a device.

Source: Yubico, "YubiHSM 2 User Guide": Attestation, Origin, Capabilities.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from spire_hw_sim.pki import now

if TYPE_CHECKING:
    from spire_hw.key import PrivateKey, PublicKey

ARC: Final = "1.3.6.1.4.1.41482.4"
SIGN_ECDSA, EXPORTABLE = 1 << 0x07, 1 << 0x10
_DAY: Final = timedelta(days=1)


def capabilities(flags: int) -> bytes:
    """Return the extension's value for a set of capabilities."""
    return b"\x03\x09\x00" + flags.to_bytes(8)


# Number to DER: firmware 2.4.0, serial 7654321, generated, domain 1, capabilities, object 0x1234.
EXTENSIONS: Final = {
    1: bytes.fromhex("0403020400"),
    2: bytes.fromhex("020374cbb1"),
    3: bytes.fromhex("03020001"),
    4: bytes.fromhex("0303000001"),
    5: capabilities(SIGN_ECDSA),
    6: bytes.fromhex("02021234"),
}


class YubiHsm:
    """A device and its maker.

    Attributes:
        root: the maker's certificate.
        device: that of the device's attestation key, below it.
    """

    def __init__(self) -> None:
        root_key = ec.generate_private_key(ec.SECP256R1())
        self.root = _certificate("root", root_key.public_key(), "root", root_key)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.device = _certificate("device", self._key.public_key(), "root", root_key)

    def attestation(self, key: PublicKey, changed: dict[int, bytes | None]) -> list[bytes]:
        """Return the DER chain for a key.

        Args:
            key: the key that is attested.
            changed: other values for extensions, None to leave one out.
        """
        given = {n: v for n, v in {**EXTENSIONS, **changed}.items() if v is not None}
        name = "YubiHSM Attestation id 0x1234"
        leaf = _certificate(name, key, "device", self._key, given)
        return [der(leaf), der(self.device)]


def der(certificate: x509.Certificate) -> bytes:
    """Return a certificate's DER."""
    return certificate.public_bytes(serialization.Encoding.DER)


def _certificate(
    name: str,
    key: PublicKey,
    issuer: str,
    issuer_key: PrivateKey,
    extensions: dict[int, bytes] | None = None,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - _DAY)
        .not_valid_after(now() + _DAY)
    )
    for number, value in (extensions or {}).items():
        oid = x509.ObjectIdentifier(f"{ARC}.{number}")
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())
