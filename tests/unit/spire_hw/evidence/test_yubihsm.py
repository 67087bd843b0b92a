"""Attestation certificates as YubiHSM 2 is documented to make them; no device was at hand."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from spire_hw.errors import AttestationError
from spire_hw.evidence.document import challenge
from spire_hw.evidence.yubihsm import verify_attestation
from spire_hw.key import spki_der
from spire_hw_sim.pki import now

if TYPE_CHECKING:
    from spire_hw.key import PrivateKey

_ARC = "1.3.6.1.4.1.41482.4"
_GENERATED, _IMPORTED = 0x01, 0x02
_SIGN_ECDSA, _EXPORTABLE = 1 << 0x07, 1 << 0x10
# Extension number to DER: firmware 2.4.0, serial 7654321, origin, domains, capabilities, object id.
_EXTENSIONS = {
    1: bytes.fromhex("0403020400"),
    2: bytes.fromhex("020374cbb1"),
    3: bytes.fromhex("03020001"),
    4: bytes.fromhex("0303000001"),
    5: b"\x03\x09\x00" + _SIGN_ECDSA.to_bytes(8),
    6: bytes.fromhex("02021234"),
}


class Maker:
    """The maker's root, and one device's attestation key below it."""

    def __init__(self) -> None:
        self.root_key = ec.generate_private_key(ec.SECP256R1())
        self.root = self.certificate("root", self.root_key, "root", self.root_key)
        self.device_key = ec.generate_private_key(ec.SECP256R1())
        self.device = self.certificate("device", self.device_key, "root", self.root_key)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.spki = spki_der(self.key.public_key())

    def certificate(
        self,
        name: str,
        key: PrivateKey,
        issuer: str,
        issuer_key: PrivateKey,
        extensions: dict[int, bytes] | None = None,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() - timedelta(days=1))
            .not_valid_after(now() + timedelta(days=1))
        )
        for number, value in (extensions or {}).items():
            oid = x509.ObjectIdentifier(f"{_ARC}.{number}")
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    def attestation(self, **changed: bytes | None) -> list[bytes]:
        """Return the chain for the key; `e3=...` is another value for extension 3, None leaves it out."""
        values: dict[int, bytes | None] = dict(_EXTENSIONS)
        values |= {int(name[1:]): value for name, value in changed.items()}
        given = {n: v for n, v in values.items() if v is not None}
        name = "YubiHSM Attestation id 0x1234"
        leaf = self.certificate(name, self.key, "device", self.device_key, given)
        return [der(leaf), der(self.device)]


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker()


def codes(maker: Maker, chain: list[bytes], *roots: x509.Certificate) -> set[str]:
    with pytest.raises(AttestationError) as caught:
        verify_attestation(chain, maker.spki, roots)
    return {one.code for one in caught.value.findings}


def test_a_device_says_that_it_generated_a_key(maker: Maker) -> None:
    said, is_trusted = verify_attestation(maker.attestation(), maker.spki, [maker.root])
    assert (said.serial, said.firmware, said.object_id) == (7654321, "2.4.0", 0x1234)
    assert not said.is_exportable
    assert is_trusted


def test_without_a_root_nobody_vouches_for_the_device(maker: Maker) -> None:
    assert not verify_attestation(maker.attestation(), maker.spki, [])[1]


def test_a_chain_may_hold_the_root_itself(maker: Maker) -> None:
    chain = [*maker.attestation(), der(maker.root)]
    assert verify_attestation(chain, maker.spki, [maker.root])[1]


def test_a_key_that_can_leave_under_a_wrapping_key_is_told(maker: Maker) -> None:
    flags = b"\x03\x09\x00" + (_SIGN_ECDSA | _EXPORTABLE).to_bytes(8)
    said, _ = verify_attestation(maker.attestation(e5=flags), maker.spki, [])
    assert said.is_exportable


def test_an_imported_key_is_refused(maker: Maker) -> None:
    chain = maker.attestation(e3=bytes((0x03, 0x02, 0x00, _IMPORTED)))
    assert codes(maker, chain) == {"not_generated"}


def test_another_makers_device_is_refused(maker: Maker) -> None:
    assert codes(maker, maker.attestation(), Maker().root) == {"statement_chain"}


def test_a_certificate_signed_by_another_device_is_refused(maker: Maker) -> None:
    chain = [maker.attestation()[0], der(Maker().device)]
    assert codes(maker, chain) == {"statement_chain"}


def test_a_certificate_of_another_key_is_refused(maker: Maker) -> None:
    other = Maker()
    assert codes(maker, other.attestation()) == {"statement_key"}


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6])
@pytest.mark.parametrize(
    "value", [None, b"", b"\x03", bytes.fromhex("0500"), bytes.fromhex("030301ffff")]
)
def test_a_certificate_that_is_not_as_documented_is_refused(
    maker: Maker, number: int, value: bytes | None
) -> None:
    changed: dict[str, bytes | None] = {f"e{number}": value}
    assert codes(maker, maker.attestation(**changed)) == {"statement_malformed"}


@pytest.mark.parametrize("count", [0, 1, 5])
def test_chains_of_odd_lengths_are_refused(maker: Maker, count: int) -> None:
    chain = (maker.attestation() * 3)[:count]
    assert codes(maker, chain) == {"statement_malformed"}


def test_what_is_no_certificate_is_refused(maker: Maker) -> None:
    assert codes(maker, [b"x", b"y"]) == {"statement_malformed"}


def test_a_challenge_tells_its_parts_apart() -> None:
    one = challenge(b"a" * 8, "b", b"c")
    assert one != challenge(b"a" * 9, "", b"c")
    assert one != challenge(b"a" * 8, "bc", b"")
    assert len(one) == 32
