from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import Encoding

from spire_hw.errors import AttestationError, EncodingError, InvalidInputError, NotReadyError
from spire_hw.tpm import certificate, der
from spire_hw.tpm.castore import load_roots
from spire_hw.tpm.certificate import parse_certificate
from spire_hw.tpm.certsig import verify_signature
from spire_hw.tpm.ekcert import ChainTime, EkRoots, verify_ek_certificate
from spire_hw.tpm.ekmodel import TpmModel, read_model
from spire_hw_sim import ekca
from spire_hw_sim.ekca import EkCa, ek_spec
from spire_hw_sim.softtpm import SoftTpm, make_ek, make_key, rsa_key
from spire_hw_sim.tpmnode import Vendor

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def _pem(raw: bytes) -> bytes:
    return (
        b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(raw) + b"-----END CERTIFICATE-----\n"
    )


def test_directory_of_pem_and_der_files_is_read(tmp_path: Path) -> None:
    vendor, other = Vendor.make("A"), Vendor.make("B")
    (tmp_path / "a.pem").write_bytes(b"A roots\n" + _pem(vendor.root.certificate))
    (tmp_path / "b.CRT").write_bytes(other.root.certificate)
    (tmp_path / "c.der").write_bytes(vendor.intermediate.certificate + b"\xff" * 16)
    (tmp_path / "README").write_text("not a certificate")
    roots = load_roots(tmp_path)
    assert {c.der for c in roots.anchors} == {vendor.root.certificate, other.root.certificate}
    assert [c.der for c in roots.intermediates] == [vendor.intermediate.certificate]


def test_configured_intermediate_completes_the_path(tmp_path: Path) -> None:
    vendor = Vendor.make()
    path = tmp_path / "all.pem"
    path.write_bytes(_pem(vendor.root.certificate) + _pem(vendor.intermediate.certificate))
    leaf = parse_certificate(vendor.certify(SoftTpm(ek=make_ek("L-2"))))
    proved = verify_ek_certificate(leaf, (), load_roots(path), NOW)
    assert proved.root_fingerprint == hashlib.sha256(vendor.root.certificate).hexdigest()
    assert proved.model == TpmModel("id:4E544300", "NPCT75x", "id:00070002")


def test_intermediates_alone_are_not_roots(tmp_path: Path) -> None:
    path = tmp_path / "only.der"
    path.write_bytes(Vendor.make().intermediate.certificate)
    with pytest.raises(NotReadyError, match="no self-issued"):
        load_roots(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "ends early"),
        (b"junk", "ends early"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n", "malformed"),
        (b"-----BEGIN CERTIFICATE-----\nA===\n-----END CERTIFICATE-----\n", "not base64"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "unexpected PEM block"),
        (b"\0" * ((1 << 20) + 1), "larger than"),
    ],
)
def test_file_of_something_else_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.pem"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=words) as caught:
        load_roots(path)
    assert str(path) in caught.value.message


def test_missing_path_is_not_ready(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match=r"endorsement CAs at .*none cannot be read"):
        load_roots(tmp_path / "none")
    with pytest.raises(NotReadyError, match="no self-issued"):
        load_roots(tmp_path)


def test_cross_reading_with_a_general_library() -> None:
    vendor = Vendor.make()
    raw = vendor.certify(SoftTpm(ek=make_ek("L-1")))
    ours, theirs = parse_certificate(raw), x509.load_der_x509_certificate(raw)
    assert ours.serial == theirs.serial_number
    assert ours.not_before == theirs.not_valid_before_utc
    assert ours.not_after.date() == theirs.not_valid_after_utc.date()
    assert ours.tbs == theirs.tbs_certificate_bytes
    assert ours.signature == theirs.signature
    assert ours.issuer == theirs.issuer.public_bytes()
    assert set(ours.extensions) == {e.oid.dotted_string for e in theirs.extensions}
    assert ours.is_rsa


def _pss(salt: int) -> bytes:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(rsa_key(2048, 3).public_key())
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2040, 1, 1, tzinfo=UTC))
    )
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), salt)
    made = builder.sign(rsa_key(2048, 3), hashes.SHA256(), rsa_padding=pss)
    return made.public_bytes(Encoding.DER)


def test_pss_signature_is_verified() -> None:
    own = parse_certificate(_pss(32))
    verify_signature(own, own.key)


def test_pss_with_another_salt_is_refused() -> None:
    own = parse_certificate(_pss(20))
    with pytest.raises(InvalidInputError, match="RSASSA-PSS parameters"):
        verify_signature(own, own.key)


def test_signature_of_another_family_does_not_verify() -> None:
    vendor = Vendor.make()
    rsa_root = EkCa.root("R", make_key("rsa2048", 4))
    leaf = parse_certificate(vendor.certify(SoftTpm(ek=make_ek("L-2"))))
    signed_by_rsa = parse_certificate(rsa_root.issue(ek_spec(make_ek("L-2").private.public_key())))
    with pytest.raises(AttestationError):
        verify_signature(leaf, parse_certificate(rsa_root.certificate).key)
    with pytest.raises(AttestationError):
        verify_signature(signed_by_rsa, parse_certificate(vendor.root.certificate).key)
    verify_signature(signed_by_rsa, parse_certificate(rsa_root.certificate).key)


def test_certificate_without_alternative_name_says_nothing() -> None:
    vendor = Vendor.make()
    assert read_model(parse_certificate(vendor.root.certificate)) == TpmModel()


def test_strict_time_demands_valid_issuers_now() -> None:
    vendor = Vendor.make()
    leaf = parse_certificate(vendor.certify(SoftTpm(ek=make_ek("L-2"))))
    roots = EkRoots.of([parse_certificate(vendor.root.certificate)])
    chain = (vendor.intermediate.certificate,)
    verify_ek_certificate(leaf, chain, roots, NOW, chain_time=ChainTime.STRICT)


def test_signature_budget_bounds_the_search() -> None:
    key = make_key("secp256r1")
    root = EkCa.root("Root", key)
    # Many roots of one name: every one is a candidate, none of the first 64 is the right one.
    others = [EkCa.root("Root", make_key("secp256r1")) for _ in range(64)]
    roots = EkRoots.of(parse_certificate(c.certificate) for c in [*others, root])
    leaf = parse_certificate(root.issue(ek_spec(make_ek("L-2").private.public_key())))
    with pytest.raises(AttestationError, match="ek_untrusted"):
        verify_ek_certificate(leaf, (), roots, NOW)
    fewer = EkRoots.of(parse_certificate(c.certificate) for c in [*others[:63], root])
    assert verify_ek_certificate(leaf, (), fewer, NOW).root_fingerprint


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\x02\x00", "empty integer"),
        (b"\x02\x02\x00\x01", "not DER"),
        (b"\x02\x02\xff\xff", "not DER"),
        (b"\x04\x01\x01", "tag"),
    ],
)
def test_integers_are_shortest(raw: bytes, words: str) -> None:
    with pytest.raises(EncodingError, match=words):
        der.integer(der.read(raw, "x"))


@pytest.mark.parametrize(
    "raw", [b"\x06\x00", b"\x06\x01\x80", b"\x06\x02\x80\x01", b"\x06\x41" + b"\x01" * 65]
)
def test_object_identifiers_are_canonical(raw: bytes) -> None:
    with pytest.raises(EncodingError):
        der.oid(der.read(raw, "x"))


@pytest.mark.parametrize(
    "text", ["1.2.840.113549.1.1.11", "2.23.133.8.1", "2.5.29.17", "0.9.2342", "2.999.3"]
)
def test_object_identifiers_read_back(text: str) -> None:
    assert der.oid(der.read(ekca.oid(text), "x")) == text


@pytest.mark.parametrize("raw", [b"\x01\x01\x01", b"\x01\x00", b"\x01\x02\xff\xff"])
def test_booleans_are_00_or_ff(raw: bytes) -> None:
    with pytest.raises(EncodingError):
        der.boolean(der.read(raw, "x"))


@pytest.mark.parametrize(
    "raw",
    [b"\x03\x00", b"\x03\x01\x00", b"\x03\x02\x08\x80", b"\x03\x02\x01\x81", b"\x03\x06\0aaaaa"],
)
def test_named_bits_are_canonical(raw: bytes) -> None:
    with pytest.raises(EncodingError):
        der.named_bits(der.read(raw, "x"))


def test_bit_strings_are_whole_bytes() -> None:
    with pytest.raises(EncodingError):
        der.bit_string(der.read(b"\x03\x02\x01\x80", "x"))
    assert der.named_bits(der.read(b"\x03\x02\x05\xa0", "x")) == 0b101


def test_key_usage_reads_named_bits() -> None:
    leaf = parse_certificate(Vendor.make().certify(SoftTpm(ek=make_ek("L-1"))))
    assert leaf.key_usage == certificate.KeyUsage.KEY_ENCIPHERMENT
