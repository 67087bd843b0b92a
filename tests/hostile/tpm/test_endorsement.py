"""Endorsement keys, their certificates and the paths to a manufacturer."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from spire_hw.errors import AttestationError, ErrorKind, SpireHwError
from spire_hw.key import spki_der
from spire_hw.tpm import public, wire
from spire_hw_sim import ekca
from spire_hw_sim.ekca import EkCa, Spec, ca_spec, ek_spec, tlv
from spire_hw_sim.softtpm import (
    SoftKey,
    SoftTpm,
    coordinates,
    encode_public,
    make_ak,
    make_ek,
    make_key,
    rsa_key,
    template,
)
from spire_hw_sim.tpmlab import Lab, ListedEks
from spire_hw_sim.tpmnode import TpmNode, Vendor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.asyncio
IA, PD = ErrorKind.INVALID_ARGUMENT, ErrorKind.PERMISSION_DENIED


def _codes(error: SpireHwError) -> list[str]:
    assert isinstance(error, AttestationError)
    return [finding.code for finding in error.findings]


async def _refuse_certificate(
    lab: Lab, bend: Callable[[Spec], object], label: str = "L-2"
) -> SpireHwError:
    node = lab.node(SoftTpm(ek=make_ek(label)))
    spec = ek_spec(node.tpm.ek.private.public_key())
    bend(spec)
    node.certificate = lab.vendor.intermediate.issue(spec)
    return await lab.refusal(node)


def _ext(kind: str, value: bytes | None) -> Callable[[Spec], None]:
    """Replace the extension of a kind (None: leave it out)."""
    needle = ekca.oid(kind)

    def bend(spec: Spec) -> None:
        spec.extensions = [e for e in spec.extensions if needle not in e]
        if value is not None:
            spec.extensions.append(value)

    return bend


def _set(**changes: object) -> Callable[[Spec], None]:
    def bend(spec: Spec) -> None:
        for name, value in changes.items():
            setattr(spec, name, value)

    return bend


def _san(*names: bytes) -> Callable[[Spec], None]:
    return _ext(ekca.SAN, ekca.extension(ekca.SAN, ekca.san(*names), critical=True))


DENIED = {
    "expired": (_set(not_after=ekca.utc("20240101")), "ek_expired"),
    "not yet valid": (_set(not_before=ekca.utc("20990101")), "ek_expired"),
    "CA true": (_ext(ekca.BASIC_CONSTRAINTS, ekca.basic_constraints(ca=True)), "ek_ca"),
    "unknown critical extension": (
        _ext("1.2.3", ekca.extension("1.2.3", b"\x05\x00", critical=True)),
        "ek_critical_extension",
    ),
    "TLS server certificate": (
        _ext(ekca.EKU, ekca.eku("1.3.6.1.5.5.7.3.1")),
        "ek_extended_key_usage",
    ),
    "digital signature only": (
        _ext(ekca.KEY_USAGE, ekca.key_usage(ekca.DIGITAL_SIGNATURE)),
        "ek_key_usage",
    ),
    "key encipherment on an ECC key": (
        _ext(ekca.KEY_USAGE, ekca.key_usage(ekca.KEY_ENCIPHERMENT)),
        "ek_key_usage",
    ),
    "signing certificate": (
        _ext(ekca.KEY_USAGE, ekca.key_usage(ekca.DIGITAL_SIGNATURE, ekca.KEY_AGREEMENT)),
        "ek_key_usage",
    ),
    "key usage missing": (_ext(ekca.KEY_USAGE, None), "ek_key_usage"),
    "SHA-1": (_set(hash="sha1"), "ek_signature_algorithm"),
}


@pytest.mark.parametrize("row", DENIED)
async def test_certificate_is_denied(tmp_path: Path, row: str) -> None:
    bend, code = DENIED[row]
    error = await _refuse_certificate(await Lab.make(tmp_path), bend)
    assert error.kind is PD
    assert _codes(error) == [code]


async def test_key_agreement_on_an_rsa_key_is_denied(tmp_path: Path) -> None:
    bend = _ext(ekca.KEY_USAGE, ekca.key_usage(ekca.KEY_AGREEMENT))
    error = await _refuse_certificate(await Lab.make(tmp_path), bend, "L-1")
    assert _codes(error) == ["ek_key_usage"]


TIME = b"\x18\x0f"
MALFORMED = {
    "month 13": (_set(not_after=tlv(0x18, b"20301301000000Z")), "validity dates"),
    "no zone": (_set(not_after=tlv(0x18, b"20301201000000")), "validity dates"),
    "offset": (_set(not_after=tlv(0x18, b"20301201000000+0100")), "validity dates"),
    "not digits": (_set(not_after=tlv(0x17, b"30120100000_Z")), "validity dates"),
    "other type": (_set(not_after=tlv(0x0C, b"301201000000Z")), "validity dates"),
    "ends before it begins": (_set(not_after=ekca.utc("20190101")), "validity dates"),
    "two manufacturers": (
        _san(ekca.name(("2.23.133.2.1", "id:4E544300"), ("2.23.133.2.1", "id:494E5443"))),
        "TPM manufacturer is ambiguous",
    ),
    "two directory names": (_san(ekca.tpm_name(), ekca.tpm_name()), "ambiguous"),
    "model twice": (
        _san(ekca.name(("2.23.133.2.2", "a"), ("2.23.133.2.2", "b"))),
        "TPM model is ambiguous",
    ),
    "manufacturer not id": (_san(ekca.tpm_name("NTC")), "is not id: and 8 hexadecimal digits"),
    "manufacturer short": (_san(ekca.tpm_name("id:4E54")), "is not id: and 8 hexadecimal"),
    "manufacturer not hex": (_san(ekca.tpm_name("id:4E5443zz")), "is not id: and 8"),
    "model with newline": (_san(ekca.tpm_name(model="a\nb")), "characters that are not allowed"),
    "model with NUL": (_san(ekca.tpm_name(model="a\0b")), "characters that are not allowed"),
    "model with ESC": (_san(ekca.tpm_name(model="\x1b[31m")), "characters that are not allowed"),
    "model of 10000": (
        _san(ekca.tpm_name(model="a" * 10000)),
        "characters that are not allowed",
    ),
    "model empty": (_san(ekca.tpm_name(model="")), "characters that are not allowed"),
    "inner algorithm differs": (
        _set(inner_algorithm=tlv(0x30, ekca.oid("1.2.840.10045.4.3.3"))),
        "signature algorithms inside and outside differ",
    ),
    "extension twice": (
        lambda spec: spec.extensions.append(spec.extensions[0]),
        "appears twice",
    ),
    "explicit curve": (
        _set(spki=tlv(0x30, tlv(0x30, ekca.oid("1.2.840.10045.2.1"), tlv(0x30)), tlv(3, b"\0\4"))),
        "not in canonical form",
    ),
    "Ed25519": (
        _set(spki=tlv(0x30, tlv(0x30, ekca.oid("1.3.101.112")), tlv(3, b"\0" + bytes(32)))),
        "key type is not supported",
    ),
    "secp256k1": (
        _set(
            spki=ec.generate_private_key(ec.SECP256K1())
            .public_key()
            .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        ),
        "key type is not supported",
    ),
}


@pytest.mark.parametrize("row", MALFORMED)
async def test_certificate_is_malformed(tmp_path: Path, row: str) -> None:
    bend, words = MALFORMED[row]
    error = await _refuse_certificate(await Lab.make(tmp_path), bend)
    assert error.kind is IA
    assert words in error.message
    assert error.message.startswith("ek: ")
    assert "\n" not in error.message


def _ec_spki(point: bytes, curve: str = "1.2.840.10045.3.1.7") -> bytes:
    algorithm = tlv(0x30, ekca.oid("1.2.840.10045.2.1"), ekca.oid(curve))
    return tlv(0x30, algorithm, tlv(0x03, b"\x00" + point))


def _rsa_spki(modulus: int, exponent: int) -> bytes:
    algorithm = tlv(0x30, ekca.oid("1.2.840.113549.1.1.1"), b"\x05\x00")
    numbers = tlv(0x30, ekca.integer(modulus), ekca.integer(exponent))
    return tlv(0x30, algorithm, tlv(0x03, b"\x00" + numbers))


GOOD_N = rsa_key(2048).public_key().public_numbers().n
P256 = 2**256 - 2**224 + 2**192 + 2**96 - 1
KEYS = {
    "512 bits": (_rsa_spki((1 << 511) | 1, 65537), "RSA-512 is not supported"),
    "1024 bits": (_rsa_spki((1 << 1023) | 1, 65537), "RSA-1024 is not supported"),
    "16384 bits": (_rsa_spki((1 << 16383) | 1, 65537), "RSA-16384 is not supported"),
    "65536 bits": (_rsa_spki((1 << 65535) | 1, 65537), "RSA-65536 is not supported"),
    "top bit clear": (_rsa_spki(GOOD_N >> 1 | 1, 65537), "RSA-2047 is not supported"),
    "exponent 3": (_rsa_spki(GOOD_N, 3), "RSA exponent must be 65537"),
    "exponent nearly n": (_rsa_spki(GOOD_N, GOOD_N - 2), "RSA exponent must be 65537"),
    "exponent 0": (_rsa_spki(GOOD_N, 0), "RSA exponent must be 65537"),
    "exponent 1": (_rsa_spki(GOOD_N, 1), "RSA exponent must be 65537"),
    "exponent 5": (_rsa_spki(GOOD_N, 5), "RSA exponent must be 65537"),
    "exponent 17": (_rsa_spki(GOOD_N, 17), "RSA exponent must be 65537"),
    "even exponent": (_rsa_spki(GOOD_N, 65536), "RSA exponent must be 65537"),
    "negative exponent": (_rsa_spki(GOOD_N, -65537), "RSA exponent must be 65537"),
    "even modulus": (_rsa_spki(GOOD_N - 1, 65537), "modulus is not acceptable"),
    "small factor": (_rsa_spki(GOOD_N // 997 * 997 | 0, 65537), "RSA"),
    "negative modulus": (_rsa_spki(-GOOD_N, 65537), "RSA"),
    "off the curve": (
        _ec_spki(b"\x04" + bytes(31) + b"\x05" + bytes(31) + b"\x01"),
        "not on P-256",
    ),
    "infinity": (_ec_spki(b"\x00"), "not in canonical form"),
    "zero": (_ec_spki(b"\x04" + bytes(64)), "not on P-256"),
    "x not below p": (
        _ec_spki(b"\x04" + (P256 + 5).to_bytes(32, "big") + bytes(32)),
        "not in range",
    ),
    "short": (_ec_spki(b"\x04" + bytes(62)), "not in canonical form"),
    "long": (_ec_spki(b"\x04" + bytes(66)), "not in canonical form"),
    "P-192": (_ec_spki(bytes(49), "1.2.840.10045.3.1.1"), "key type is not supported"),
    "SM2": (_ec_spki(bytes(65), "1.2.156.10197.1.301"), "key type is not supported"),
    "compressed": (_ec_spki(b"\x02" + bytes(32)), "not in canonical form"),
    "hybrid": (_ec_spki(b"\x06" + bytes(64)), "not in canonical form"),
}


@pytest.mark.parametrize("row", KEYS)
async def test_weak_or_odd_key_in_a_certificate_is_refused(tmp_path: Path, row: str) -> None:
    spki, words = KEYS[row]
    error = await _refuse_certificate(await Lab.make(tmp_path), _set(spki=spki))
    assert error.kind is IA
    assert words in error.message


async def test_roca_key_is_refused(tmp_path: Path) -> None:
    product = 1
    for prime in (n for n in range(2, 168) if all(n % d for d in range(2, n))):
        product *= prime
    modulus = pow(65537, 77, product)
    while modulus.bit_length() < 2048 or modulus.bit_length() > 2048 or modulus % 2 == 0:
        modulus = (secrets.randbits(2047) | 1 << 2047) // product * product + pow(
            65537, 77, product
        )
        if any(modulus % p == 0 for p in range(3, 1000)):
            modulus = 0
    error = await _refuse_certificate(
        await Lab.make(tmp_path), _set(spki=_rsa_spki(modulus, 65537))
    )
    assert "CVE-2017-15361" in error.message


@pytest.mark.parametrize(
    "parameters",
    [
        tlv(0x30, tlv(0xA2, tlv(0x30, ekca.oid("1.2.840.113549.1.1.9"), tlv(4, b"TCPA")))),
        tlv(0x30, tlv(0xA0, tlv(0x30, ekca.oid("1.2.840.113549.2.5")))),
        tlv(0x30, tlv(0xA5, tlv(0x30))),
        tlv(0x04, b"x"),
    ],
)
async def test_unusual_oaep_parameters_are_refused(tmp_path: Path, parameters: bytes) -> None:
    key = make_ek("L-1").private.public_key()
    bend = _set(spki=ekca.oaep_spki(key, parameters))
    error = await _refuse_certificate(await Lab.make(tmp_path), bend, "L-1")
    assert error.kind is IA
    assert "RSAES-OAEP parameters are not supported" in error.message


DER: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda c: c[:-1],
    "cut early": lambda c: c[:3],
    "bytes after": lambda c: c + b"\0",
    "indefinite length": lambda c: b"\x30\x80" + c[4:] + b"\0\0",
    "length not minimal": lambda c: b"\x30\x83\x00" + c[2:],
    "high tag": lambda c: b"\x3f" + c[1:],
    "not a certificate": lambda _: tlv(0x30, tlv(0x30), tlv(0x30)),
    "empty tbs": lambda _: tlv(0x30, tlv(0x30), tlv(0x30), tlv(3, b"\0")),
    "too large": lambda c: tlv(0x30, c, bytes(17000)),
}


@pytest.mark.parametrize("row", DER)
async def test_certificate_that_is_not_der_is_refused(tmp_path: Path, row: str) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    assert node.certificate is not None
    node.certificate = DER[row](node.certificate)
    error = await lab.refusal(node)
    assert error.kind is IA
    assert error.message.startswith("ek: certificate")


# --- keys that contradict each other ----------------------------------------------------------


async def test_genuine_certificate_with_a_software_key_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    software = lab.node(SoftTpm(ek=make_ek("L-2")))
    software.certificate = node.certificate
    error = await lab.refusal(software)
    assert _codes(error) == ["ek_key_mismatch"]
    assert error.message == "ek: certificate and public key are different keys [ek_key_mismatch]"


async def test_public_area_of_another_key_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    other = make_ek("L-2").public
    with_key = await lab.refusal(lab.node(), data=lambda d: replace(d, ek_pub=other))
    alone = await lab.refusal(lab.node(), data=lambda d: replace(d, ek_pub=other, ek_spki=None))
    assert _codes(with_key) == _codes(alone) == ["ek_key_mismatch"]


async def test_compressed_public_key_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    key = node.tpm.ek.private.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    point = key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    node.certificate = None
    error = await lab.refusal(node, data=lambda d: replace(d, ek_spki=_ec_spki(point)))
    assert _codes(error) == ["ek_key_mismatch"]


def _area(**changes: int | bytes | tuple[int, int]) -> Callable[[SoftKey], bytes]:
    def build(ek: SoftKey) -> bytes:
        t = template("L-2")
        settings = {"name_alg": t.name_alg, "policy": t.auth_policy, "aes_bits": t.aes_bits}
        attributes = changes.pop("attributes", t.attributes)
        return encode_public(ek.private, attributes, **{**settings, **changes})  # type: ignore[arg-type]

    return build


@pytest.mark.parametrize(
    ("build", "code"),
    [
        (_area(attributes=0x000200B2), "ek_template"),
        (_area(attributes=0x000100B2), "ek_template"),
        (_area(attributes=0x000700B2), "ek_signing_key"),
        (
            _area(attributes=0x00050472, policy=b"", aes_bits=0, scheme=(0x18, 0xB)),
            "ek_signing_key",
        ),
        (_area(name_alg=wire.ALG_SHA1), "ek_template"),
        (_area(name_alg=wire.ALG_SHA384), "ek_template"),
        (_area(aes_bits=0), "ek_template"),
        (_area(aes_bits=256), "ek_template"),
        (_area(policy=bytes(32)), "ek_template"),
        (_area(policy=b""), "ek_template"),
        (_area(scheme=(wire.ALG_OAEP, wire.ALG_SHA256)), "ek_template"),
    ],
)
async def test_public_area_of_no_ek_template_is_refused(
    tmp_path: Path, build: Callable[[SoftKey], bytes], code: str
) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    error = await lab.refusal(node, data=lambda d: replace(d, ek_pub=build(node.tpm.ek)))
    assert _codes(error) == [code]


@pytest.mark.parametrize("kind", [wire.ALG_KEYEDHASH, wire.ALG_SYMCIPHER, 0, 0xFFFF])
async def test_public_area_of_another_type_is_refused(tmp_path: Path, kind: int) -> None:
    lab = await Lab.make(tmp_path)
    error = await lab.refusal(
        lab.node(), data=lambda d: replace(d, ek_pub=kind.to_bytes(2, "big") + d.ek_pub[2:])
    )
    assert "ek: public area: key type" in error.message


@pytest.mark.parametrize("more", [b"\0", b""])
async def test_coordinates_of_a_public_area_have_one_length(tmp_path: Path, more: bytes) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    key = node.tpm.ek.private
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    x, _ = coordinates(key)
    other = wire.sized(more + (x if more else x[1:]))
    area = node.tpm.ek.public.replace(wire.sized(x), other)
    error = await lab.refusal(node, data=lambda d: replace(d, ek_pub=area))
    assert error.kind is IA
    assert error.message.startswith("ek: public area ")
    assert "coordinate must be 32 bytes" in error.message


# --- paths ------------------------------------------------------------------------------------


async def test_unknown_manufacturer_is_denied(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    error = await lab.refusal(Vendor.make("Stranger").equip(TpmNode(SoftTpm(ek=make_ek("L-2")))))
    assert error.kind is PD
    assert error.message == "ek: issuer is not trusted [ek_untrusted]"


async def test_home_made_root_of_the_same_name_is_denied(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    error = await lab.refusal(Vendor.make("Vendor").equip(TpmNode(SoftTpm(ek=make_ek("L-2")))))
    assert error.kind is PD
    assert error.message == ("ek: signature does not verify with the trusted issuer [ek_untrusted]")


async def test_root_sent_by_the_node_is_not_trusted(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    stranger = Vendor.make("Stranger")
    node = stranger.equip(TpmNode(SoftTpm(ek=make_ek("L-2"))))
    node.chain = (stranger.intermediate.certificate, stranger.root.certificate)
    assert _codes(await lab.refusal(node)) == ["ek_untrusted"]


async def test_intermediate_missing_is_denied(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    node.chain = ()
    assert _codes(await lab.refusal(node)) == ["ek_untrusted"]


async def test_flipped_signature_bit_is_denied(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    assert node.certificate is not None
    node.certificate = node.certificate[:-1] + bytes((node.certificate[-1] ^ 1,))
    assert _codes(await lab.refusal(node)) == ["ek_untrusted"]


async def _refuse_issuer(lab: Lab, spec: Spec, *, below: bool = False) -> SpireHwError:
    key = make_key("secp256r1")
    spec.spki = spki_der(key.public_key())
    issuer = lab.vendor.root.child("Odd CA", key, spec)
    chain = [issuer.certificate]
    if below:
        issuer = issuer.child("Lower CA", make_key("secp256r1"))
        chain.append(issuer.certificate)
    node = lab.node()
    node.certificate = issuer.issue(ek_spec(node.tpm.ek.private.public_key()))
    node.chain = tuple(chain)
    return await lab.refusal(node)


async def test_leaf_as_issuer_is_denied(tmp_path: Path) -> None:
    key = make_key("secp256r1").public_key()
    spec = replace(ek_spec(key), subject=ekca.common_name("Odd CA"))
    error = await _refuse_issuer(await Lab.make(tmp_path), spec)
    assert error.message == "ek: issuer is not a CA certificate [ek_issuer]"


async def test_issuer_without_cert_sign_or_constraints_is_denied(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    key = make_key("secp256r1").public_key()
    for extensions in (
        [ekca.basic_constraints(ca=True), ekca.key_usage(ekca.DIGITAL_SIGNATURE)],
        [ekca.key_usage(ekca.KEY_CERT_SIGN)],
    ):
        spec = replace(ca_spec("Odd CA", key), extensions=extensions)
        assert _codes(await _refuse_issuer(lab, spec)) == ["ek_issuer"]


async def test_exceeded_path_length_is_denied(tmp_path: Path) -> None:
    spec = ca_spec("Odd CA", make_key("secp256r1").public_key(), path_length=0)
    error = await _refuse_issuer(await Lab.make(tmp_path), spec, below=True)
    assert "path length" in error.message
    assert _codes(error) == ["ek_issuer"]


async def test_unknown_critical_extension_of_an_issuer_is_denied(tmp_path: Path) -> None:
    spec = ca_spec("Odd CA", make_key("secp256r1").public_key())
    spec.extensions.append(ekca.extension("2.5.29.30", tlv(0x30), critical=True))
    error = await _refuse_issuer(await Lab.make(tmp_path), spec)
    assert _codes(error) == ["ek_critical_extension"]


async def test_issuer_that_was_expired_at_issuance_is_denied(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    key = make_key("secp256r1").public_key()
    for dates in (("20100101", "20191231"), ("20250101", "20400101")):
        spec = replace(
            ca_spec("Odd CA", key), not_before=ekca.utc(dates[0]), not_after=ekca.utc(dates[1])
        )
        assert _codes(await _refuse_issuer(lab, spec)) == ["ek_issuer_expired"]


async def test_chain_of_seven_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    for count in (7, 40):
        node = lab.node()
        node.chain *= count
        error = await lab.refusal(node)
        assert error.message == "ek: chain is longer than 6 certificates"


async def test_circle_of_issuers_ends(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    a, b = make_key("secp256r1"), make_key("secp256r1")
    first = EkCa(ekca.common_name("B"), b, b"").issue(ca_spec("A", a.public_key()))
    second = EkCa(ekca.common_name("A"), a, b"").issue(ca_spec("B", b.public_key()))
    node = lab.node()
    leaf = ek_spec(node.tpm.ek.private.public_key())
    node.certificate = EkCa(ekca.common_name("A"), a, first).issue(leaf)
    node.chain = (first, second)
    assert _codes(await lab.refusal(node)) == ["ek_untrusted"]


async def test_path_deeper_than_six_is_denied(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    issuer, chain = lab.vendor.root, []
    for n in range(6):
        issuer = issuer.child(f"CA {n}", make_key("secp256r1"))
        chain.append(issuer.certificate)
    node = lab.node()
    node.certificate = issuer.issue(ek_spec(node.tpm.ek.private.public_key()))
    node.chain = tuple(chain)
    assert _codes(await lab.refusal(node)) == ["ek_untrusted"]


async def test_malformed_intermediate_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    error = await lab.refusal(lab.node(), data=lambda d: replace(d, ek_chain=(b"\x30\x00",)))
    assert error.kind is IA
    assert error.message.startswith("ek: intermediate certificate")


# --- policy -----------------------------------------------------------------------------------


async def test_unlisted_key_is_denied(tmp_path: Path) -> None:
    listed = ListedEks()
    lab = await Lab.make(tmp_path, 'ek_policy = "hash"\n', ek_list=listed)
    node = lab.node()
    error = await lab.refused(node)
    assert error.kind is PD
    assert error.message == "ek: endorsement key is not registered [ek_unlisted]"
    listed.hashes.add(node.ek_hash)
    made = await lab.attest(node)
    assert "ek:method:hash" in made.selector_values
    assert not any(s.startswith(("manufacturer:", "ek:ca:")) for s in made.selector_values)


async def test_both_conditions_are_needed_when_both_are_asked(tmp_path: Path) -> None:
    listed = ListedEks()
    lab = await Lab.make(tmp_path, 'ek_policy = "ca_and_hash"\n', ek_list=listed)
    node = lab.node()
    with pytest.raises(AttestationError) as caught:
        await lab.attest(node)
    assert _codes(caught.value) == ["ek_unlisted"]
    listed.hashes.add(node.ek_hash)
    await lab.attest(node)
    node.certificate, node.chain = None, ()
    with pytest.raises(AttestationError) as caught:
        await lab.attest(node)
    assert _codes(caught.value) == ["ek_no_certificate"]
    node.certificate = Vendor.make("Stranger").certify(node.tpm)
    with pytest.raises(AttestationError) as caught:
        await lab.attest(node)
    assert _codes(caught.value) == ["ek_untrusted"]


async def test_certificate_is_needed_when_the_ca_decides(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    node.certificate = None
    error = await lab.refusal(node)
    assert error.kind is PD
    assert _codes(error) == ["ek_no_certificate"]


async def test_every_reason_is_told_when_either_would_do(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, 'ek_policy = "ca_or_hash"\n', ek_list=ListedEks())
    node = lab.node()
    node.certificate = Vendor.make("Stranger").certify(node.tpm)
    assert _codes(await lab.refusal(node)) == ["ek_untrusted", "ek_unlisted"]


# --- controls: genuine and odd ----------------------------------------------------------------


async def _accept(lab: Lab, bend: Callable[[Spec], object], label: str = "L-2") -> list[str]:
    node = lab.node(SoftTpm(ek=make_ek(label)))
    spec = ek_spec(node.tpm.ek.private.public_key())
    bend(spec)
    node.certificate = lab.vendor.intermediate.issue(spec)
    return (await lab.attest(node)).selector_values


def _oaep(parameters: bytes) -> Callable[[Spec], None]:
    return lambda spec: setattr(
        spec, "spki", ekca.oaep_spki(make_ek("L-1").private.public_key(), parameters)
    )


_SHA256 = ekca.oid("2.16.840.1.101.3.4.2.1")
_MGF1 = tlv(0x30, ekca.oid("1.2.840.113549.1.1.8"), tlv(0x30, _SHA256, b"\x05\x00"))
ODD = {
    "unordered sets": (_san(ekca.tpm_name(one_set=True)), "L-2"),
    "OAEP with defaults": (_oaep(b"\x30\x00"), "L-1"),
    "OAEP without parameters": (_oaep(b""), "L-1"),
    "OAEP with SHA-256": (
        _oaep(tlv(0x30, tlv(0xA0, tlv(0x30, _SHA256, b"\x05\x00")), tlv(0xA1, _MGF1))),
        "L-1",
    ),
    "OAEP with an empty label": (
        _oaep(tlv(0x30, tlv(0xA2, tlv(0x30, ekca.oid("1.2.840.113549.1.1.9"), b"\x04\x00")))),
        "L-1",
    ),
    "negative serial": (_set(serial=-5), "L-2"),
    "serial zero": (_set(serial=0), "L-2"),
    "subject and no extended usage": (_ext(ekca.EKU, None), "L-2"),
    "UTCTime": (_set(not_before=tlv(0x17, b"200101000000Z")), "L-2"),
    "UTCTime of 1999": (_set(not_before=tlv(0x17, b"991231235959Z")), "L-2"),
    "no basic constraints": (_ext(ekca.BASIC_CONSTRAINTS, None), "L-2"),
    "unknown extension, not critical": (_ext("1.2.3", ekca.extension("1.2.3", b"\5\0")), "L-2"),
}


@pytest.mark.parametrize("row", ODD)
async def test_odd_but_genuine_certificate_is_accepted(tmp_path: Path, row: str) -> None:
    settings = 'ek_chain_time = "ignore"\n' if "1999" in row else ""
    bend, label = ODD[row]
    selectors = await _accept(await Lab.make(tmp_path, settings), bend, label)
    assert "manufacturer:id:4E544300" in selectors
    assert "model:NPCT75x" in selectors
    assert "version:id:00070002" in selectors


async def test_issuer_expired_today_but_valid_at_issuance_is_accepted(tmp_path: Path) -> None:
    key = make_key("secp256r1")
    root = EkCa.root("Old Root", make_key("rsa3072"))
    spec = replace(ca_spec("Old CA", key.public_key()), not_after=ekca.utc("20240101"))
    vendor = Vendor(root, root.child("Old CA", key, spec))
    lab = await Lab.make(tmp_path, vendor=vendor)
    await lab.attest(lab.node())
    strict = await Lab.make(tmp_path, 'ek_chain_time = "strict"\n', vendor=vendor)
    with pytest.raises(AttestationError) as caught:
        await strict.attest(strict.node())
    assert _codes(caught.value) == ["ek_issuer_expired"]


async def test_expired_leaf_is_accepted_when_dates_are_ignored(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, 'ek_chain_time = "ignore"\n')
    await _accept(lab, _set(not_after=ekca.utc("20240101")))


async def test_leaf_expires_by_the_host_clock(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    spec = ek_spec(node.tpm.ek.private.public_key())
    end = lab.clock.now() + timedelta(days=1)
    spec.not_after = ekca.utc(f"{end:%Y%m%d}")
    node.certificate = lab.vendor.intermediate.issue(spec)
    await lab.attest(node)
    await lab.clock.advance(timedelta(days=2))
    with pytest.raises(AttestationError, match="ek_expired"):
        await lab.attest(node)


async def test_sha1_link_is_accepted_only_when_pinned(tmp_path: Path) -> None:
    key = make_key("secp256r1")
    root = EkCa.root("Old Root", make_key("rsa2048", 7))
    child = root.child("SHA-1 CA", key, replace(ca_spec("SHA-1 CA", key.public_key()), hash="sha1"))
    vendor = Vendor(root, child)
    lab = await Lab.make(tmp_path, vendor=vendor)
    with pytest.raises(AttestationError, match="ek_signature_algorithm"):
        await lab.attest(lab.node())
    pin = hashlib.sha256(child.certificate).hexdigest()
    pinned = await Lab.make(tmp_path, f'sha1_ca_fingerprints = ["{pin}"]\n', vendor=vendor)
    await pinned.attest(pinned.node())


async def test_md5_link_is_denied(tmp_path: Path) -> None:
    root = EkCa.root("Old Root", make_key("rsa2048", 7))
    vendor = Vendor(root, root.child("Old CA", make_key("rsa2048", 8)))
    lab = await Lab.make(tmp_path, vendor=vendor)
    node = lab.node()
    assert node.certificate is not None
    sha256, md5 = (ekca.oid(f"1.2.840.113549.1.1.{n}") for n in (11, 4))
    assert node.certificate.count(sha256) == 2
    node.certificate = node.certificate.replace(sha256, md5)
    error = await lab.refusal(node)
    assert error.kind is PD
    assert _codes(error) == ["ek_signature_algorithm"]


@pytest.mark.parametrize("ek", ["L-1", "L-2", "H-1", "H-2", "H-3", "H-6"])
@pytest.mark.parametrize("ak", ["secp256r1", "rsa2048"])
async def test_every_usual_endorsement_key_is_accepted(tmp_path: Path, ek: str, ak: str) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node(SoftTpm(ek=make_ek(ek), ak=make_ak(ak)))
    made = await lab.attest(node)
    assert made.can_reattest
    assert f"pub_hash:{public.ek_hash(node.tpm.ek.private.public_key())}" in made.selector_values


async def test_coordinates_with_a_leading_zero_are_accepted(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    while True:
        ek = make_ek("L-2")
        assert isinstance(ek.private, ec.EllipticCurvePrivateKey)
        if ek.private.public_key().public_numbers().x < 1 << 248:
            break
    await lab.attest(lab.node(SoftTpm(ek=ek)))


async def test_rsa_keys_of_a_process_are_shared() -> None:
    assert isinstance(make_ek("L-1").private, rsa.RSAPrivateKey)
