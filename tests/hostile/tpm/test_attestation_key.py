"""The attestation key and the proof of its creation."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.errors import AttestationError, ErrorKind, InvalidInputError, SpireHwError
from spire_hw.tpm import wire
from spire_hw.tpm.public import qualified_name
from spire_hw.tpm.wire import sized
from spire_hw_sim.softtpm import (
    AK_ATTRIBUTES,
    OWNER,
    PARENT_ATTRIBUTES,
    SoftKey,
    SoftTpm,
    coordinates,
    encode_public,
    make_ak,
    make_ek,
    make_key,
    make_svid_key,
    sign,
)
from spire_hw_sim.tpmlab import Lab
from spire_hw_sim.tpmnode import TpmNode, under

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spire_hw_plugins.nodeattestor.tpm.wire import AkEvidence, AttestationData

pytestmark = pytest.mark.asyncio
IA, PD = ErrorKind.INVALID_ARGUMENT, ErrorKind.PERMISSION_DENIED
NULL_HIERARCHY = wire.RH_NULL.to_bytes(4, "big")
PLATFORM = wire.RH_PLATFORM.to_bytes(4, "big")


def _codes(error: SpireHwError) -> list[str]:
    assert isinstance(error, AttestationError)
    return [finding.code for finding in error.findings]


def _ak(bend: Callable[[AkEvidence], AkEvidence]) -> Callable[[AttestationData], AttestationData]:
    return lambda data: replace(data, ak=bend(data.ak))


def _changed(**changes: bytes) -> Callable[[AttestationData], AttestationData]:
    return lambda data: replace(data, ak=replace(data.ak, **changes))


def _node(lab: Lab, ak: SoftKey) -> TpmNode:
    return lab.node(SoftTpm(ek=make_ek("L-2"), ak=ak))


BITS = {
    "not restricted": (AK_ATTRIBUTES & ~(1 << 16), "ak: key is not restricted"),
    "imported": (AK_ATTRIBUTES & ~(1 << 5), "ak: key was not made in this TPM"),
    "not fixed to the TPM": (AK_ATTRIBUTES & ~(1 << 1), "ak: key was not made in this TPM"),
    "duplicable": (AK_ATTRIBUTES & ~(1 << 4), "ak: key can leave its TPM"),
    "decrypt as well": (AK_ATTRIBUTES | 1 << 17, "are not those of an AK"),
    "sign clear": (AK_ATTRIBUTES & ~(1 << 18), "are not those of an AK"),
    "stClear": (AK_ATTRIBUTES | 1 << 2, "are not those of an AK"),
    "encryptedDuplication": (AK_ATTRIBUTES | 1 << 11, "are not those of an AK"),
    "reserved bit": (AK_ATTRIBUTES | 1 << 0, "are not those of an AK"),
    "reserved high bit": (AK_ATTRIBUTES | 1 << 31, "are not those of an AK"),
}


@pytest.mark.parametrize("row", BITS)
async def test_attributes_are_demanded(tmp_path: Path, row: str) -> None:
    attributes, words = BITS[row]
    lab = await Lab.make(tmp_path)
    error = await lab.refusal(_node(lab, make_ak(attributes=attributes)))
    assert error.kind is IA
    assert set(_codes(error)) == {"ak_attributes"}
    assert words in error.message


async def test_every_attribute_fault_is_told(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    error = await lab.refusal(_node(lab, make_ak(attributes=1 << 6)))
    assert _codes(error) == ["ak_attributes"] * 4


SCHEMES: dict[str, tuple[str, tuple[int, int] | None, str]] = {
    "scheme NULL": ("secp256r1", None, "ak_scheme"),
    "SHA-1": ("secp256r1", (wire.ALG_ECDSA, wire.ALG_SHA1), "ak_scheme"),
    "RSASSA SHA-1": ("rsa2048", (wire.ALG_RSASSA, wire.ALG_SHA1), "ak_scheme"),
    "ECSCHNORR": ("secp256r1", (0x001C, wire.ALG_SHA256), "ak_scheme"),
    "OAEP": ("rsa2048", (wire.ALG_OAEP, wire.ALG_SHA256), "ak_scheme"),
    "RSASSA on an ECC key": ("secp256r1", (wire.ALG_RSASSA, wire.ALG_SHA256), "ak_scheme"),
}


@pytest.mark.parametrize("row", SCHEMES)
async def test_scheme_is_demanded(tmp_path: Path, row: str) -> None:
    kind, scheme, code = SCHEMES[row]
    lab = await Lab.make(tmp_path)
    node = lab.node()
    public = encode_public(make_key(kind), AK_ATTRIBUTES, scheme=scheme)
    error = await lab.refusal(node, data=_ak(lambda ak: replace(ak, public=public)))
    assert _codes(error) == [code]


async def test_ecdaa_scheme_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    plain = encode_public(
        node.tpm.ak.private, AK_ATTRIBUTES, scheme=(wire.ALG_ECDAA, wire.ALG_SHA256)
    )
    daa = plain.replace(struct.pack(">HH", 0x1A, 0xB), struct.pack(">HHH", 0x1A, 0xB, 1), 1)
    error = await lab.refusal(node, data=_ak(lambda ak: replace(ak, public=daa)))
    assert _codes(error) == ["ak_scheme"]


async def test_symmetric_cipher_on_an_ak_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    public = encode_public(
        node.tpm.ak.private, AK_ATTRIBUTES, aes_bits=128, scheme=(wire.ALG_ECDSA, wire.ALG_SHA256)
    )
    error = await lab.refusal(node, data=_ak(lambda ak: replace(ak, public=public)))
    assert _codes(error) == ["ak_scheme"]


async def test_sha1_name_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    public = encode_public(
        node.tpm.ak.private,
        AK_ATTRIBUTES,
        name_alg=wire.ALG_SHA1,
        scheme=(wire.ALG_ECDSA, wire.ALG_SHA256),
    )
    error = await lab.refusal(node, data=_ak(lambda ak: replace(ak, public=public)))
    assert _codes(error) == ["ak_name_alg"]


def _flip(place: int, value: int) -> Callable[[bytes], bytes]:
    return lambda area: area[:place] + struct.pack(">H", value) + area[place + 2 :]


AREAS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "size prefix": ("secp256r1", sized, "ak: public area"),
    "one byte after": ("secp256r1", lambda a: a + b"\0", "1 extra bytes"),
    "60 KiB after": ("secp256r1", lambda a: a + bytes(20_000), "20000 extra bytes"),
    "name algorithm NULL": ("secp256r1", _flip(2, 0x10), "name algorithm 0x0010"),
    "name algorithm unknown": ("secp256r1", _flip(2, 0xFFFF), "name algorithm 0xffff"),
    "HMAC key": ("secp256r1", _flip(0, wire.ALG_KEYEDHASH), "key type 0x0008 is not supported"),
    "symmetric key": ("secp256r1", _flip(0, wire.ALG_SYMCIPHER), "key type 0x0025"),
    "P-192": ("secp256r1", _flip(16, 1), "curve 0x0001"),
    "SM2": ("secp256r1", _flip(16, 0x20), "curve 0x0020"),
    "RSA-1024": ("rsa2048", _flip(16, 1024), "RSA-1024 is not supported"),
    "RSA field is not the modulus length": ("rsa2048", _flip(16, 3072), "RSA modulus has 256"),
    "KDF not NULL": ("secp256r1", _flip(18, 0x22), "key derivation scheme"),
    "exponent 3": (
        "rsa2048",
        lambda a: a[:18] + struct.pack(">I", 3) + a[22:],
        "exponent must be",
    ),
    "even modulus": ("rsa2048", lambda a: a[:-1] + bytes((a[-1] & 0xFE,)), "small factor"),
    "top bit clear": ("rsa2048", lambda a: a[:24] + b"\0" + a[25:], "is not supported"),
    "off the curve": ("secp256r1", lambda a: a[:-1] + bytes((a[-1] ^ 1,)), "not on P-256"),
    "coordinate not below p": (
        "secp256r1",
        lambda a: a[:22] + b"\xff" * 32 + a[54:],
        "coordinate is not in range",
    ),
    "zero added": (
        "secp256r1",
        lambda a: a[:20] + sized(b"\0" + a[22:54]) + a[54:],
        "coordinate must be 32 bytes",
    ),
    "policy of 65 bytes": ("secp256r1", _flip(8, 65), "field of 65 bytes, limit 64"),
}


@pytest.mark.parametrize("row", AREAS)
async def test_public_area_is_refused(tmp_path: Path, row: str) -> None:
    kind, bend, words = AREAS[row]
    lab = await Lab.make(tmp_path)
    node = _node(lab, make_ak(kind))
    error = await lab.refusal(node, data=_ak(lambda ak: replace(ak, public=bend(ak.public))))
    assert isinstance(error, InvalidInputError)
    assert error.message.startswith("ak: ")
    assert words in error.message


async def test_dropped_leading_zero_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    while True:
        ak = make_ak()
        assert isinstance(ak.private, ec.EllipticCurvePrivateKey)
        x, y = coordinates(ak.private)
        if x[0] == 0:
            break
    short = ak.public[:20] + sized(x[1:]) + sized(y)
    node = _node(lab, ak)
    error = await lab.refusal(node, data=_ak(lambda e: replace(e, public=short)))
    assert "coordinate must be 32 bytes" in error.message
    await lab.attest(node)


async def test_ak_equal_to_the_csr_key_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    error = await lab.refusal(node, csr_spki=node.tpm.ak.spki)
    assert _codes(error) == ["keys_equal"]


async def test_ak_equal_to_the_ek_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    ek = node.tpm.ek.private
    public = encode_public(ek, AK_ATTRIBUTES, scheme=(wire.ALG_ECDSA, wire.ALG_SHA256))
    error = await lab.refusal(node, data=_ak(lambda ak: replace(ak, public=public)))
    assert _codes(error) == ["keys_equal"]


# --- creation -----------------------------------------------------------------------------------


async def test_changed_creation_data_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    for bit in (0, 7, 100, 8 * 60):
        bent = _flip_bit(node.tpm.creation_data(), bit)
        error = await lab.refusal(node, data=_changed(create_data=bent))
        assert _codes(error)[0] in {"creation_hash", "creation_malformed"}


def _flip_bit(data: bytes, bit: int) -> bytes:
    place = bit // 8 % len(data)
    return data[:place] + bytes((data[place] ^ 1 << bit % 8,)) + data[place + 1 :]


async def test_creation_of_another_key_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node, other = lab.node(), SoftTpm()
    data = node.tpm.creation_data()
    attest, _ = other.creation(data)
    error = await lab.refusal(
        node,
        data=_ak(
            lambda ak: replace(
                ak, create_attestation=attest, create_signature=node.tpm.sign(attest)
            )
        ),
    )
    assert _codes(error) == ["creation_name"]
    attest, signature = other.creation(data)
    error = await lab.refusal(
        node,
        data=_ak(lambda ak: replace(ak, create_attestation=attest, create_signature=signature)),
    )
    assert _codes(error) == ["creation_signature", "creation_name"]


@pytest.mark.parametrize("kind", [wire.ST_QUOTE, wire.ST_CERTIFY, wire.ST_TIME, 0x8014, 0x8016])
async def test_other_statement_in_place_of_creation_is_refused(tmp_path: Path, kind: int) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    body = node.tpm.creation(node.tpm.creation_data())[0][-70:]
    attest = node.tpm.attest(kind, body, b"")
    error = await lab.refusal(
        node,
        data=_ak(
            lambda ak: replace(
                ak, create_attestation=attest, create_signature=node.tpm.sign(attest)
            )
        ),
    )
    assert _codes(error) == ["creation_type"]
    assert f"ak: attestation type {kind:04X}, expected 801A" in error.message


async def _refuse_signature(lab: Lab, node: TpmNode, signature: bytes) -> str:
    error = await lab.refusal(node, data=_ak(lambda ak: replace(ak, create_signature=signature)))
    assert error.kind is IA
    return _codes(error)[0]


ECDSA = struct.pack(">HH", wire.ALG_ECDSA, wire.ALG_SHA256)
RSASSA = struct.pack(">HH", wire.ALG_RSASSA, wire.ALG_SHA256)
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551.to_bytes(32, "big")
ONE = (1).to_bytes(32, "big")
ECC_SIGNATURES = {
    "RSA signature": (RSASSA + sized(bytes(256)), "creation_scheme"),
    "HMAC": (struct.pack(">HH", 5, 0xB) + bytes(32), "creation_scheme"),
    "ECDAA": (struct.pack(">HH", 0x1A, 0xB) + sized(ONE) + sized(ONE), "creation_scheme"),
    "SHA-1": (struct.pack(">HH", 0x18, 4) + sized(ONE) + sized(ONE), "creation_scheme"),
    "SHA-384": (struct.pack(">HH", 0x18, 0xC) + sized(ONE) + sized(ONE), "creation_scheme"),
    "unknown hash": (
        struct.pack(">HH", 0x18, 0xFF) + sized(ONE) + sized(ONE),
        "creation_scheme",
    ),
    "r zero": (ECDSA + sized(bytes(32)) + sized(ONE), "creation_signature"),
    "s zero": (ECDSA + sized(ONE) + sized(b""), "creation_signature"),
    "r not below n": (ECDSA + sized(ORDER) + sized(ONE), "creation_signature"),
    "33 bytes": (ECDSA + sized(b"\0" + ONE) + sized(ONE), "creation_signature"),
    "size 65535": (ECDSA + b"\xff\xff" + ONE, "creation_scheme"),
    "seven bytes": (ECDSA + b"\0\0\0", "creation_scheme"),
    "extra byte": (ECDSA + sized(ONE) + sized(ONE) + b"\0", "creation_scheme"),
    "wrong": (ECDSA + sized(ONE) + sized(ONE), "creation_signature"),
}


@pytest.mark.parametrize("row", ECC_SIGNATURES)
async def test_signature_of_an_ecc_ak_is_refused(tmp_path: Path, row: str) -> None:
    signature, code = ECC_SIGNATURES[row]
    lab = await Lab.make(tmp_path)
    assert await _refuse_signature(lab, lab.node(), signature) == code


RSA_SIGNATURES = {
    "ECDSA r and s": (ECDSA + sized(ONE) + sized(ONE), "creation_scheme"),
    "PSS in place of PKCS#1": (
        struct.pack(">HH", wire.ALG_RSAPSS, wire.ALG_SHA256) + sized(bytes(256)),
        "creation_scheme",
    ),
    "short": (RSASSA + sized(bytes(255)), "creation_signature"),
    "long": (RSASSA + sized(bytes(257)), "creation_signature"),
    "wrong": (RSASSA + sized(bytes(256)), "creation_signature"),
}


@pytest.mark.parametrize("row", RSA_SIGNATURES)
async def test_signature_of_an_rsa_ak_is_refused(tmp_path: Path, row: str) -> None:
    signature, code = RSA_SIGNATURES[row]
    lab = await Lab.make(tmp_path)
    assert await _refuse_signature(lab, _node(lab, make_ak("rsa2048")), signature) == code


async def test_tpm12_activation_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    payload = lab.node().payload()
    bent = payload.replace(b'"UseTCSDActivationFormat":false', b'"UseTCSDActivationFormat":true')
    error = await lab.refusal(lab.node(), payload=bent)
    assert error.message == "ak: TPM 1.2 format is not supported"


# --- placement ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parent", "code"),
    [(NULL_HIERARCHY, "ak_hierarchy"), (PLATFORM, "ak_hierarchy"), (OWNER, "ak_hierarchy")],
)
async def test_other_hierarchy_is_denied(tmp_path: Path, parent: bytes, code: str) -> None:
    lab = await Lab.make(tmp_path)
    error = await lab.refusal(_node(lab, make_ak(parent=parent)))
    assert error.kind is PD
    assert _codes(error) == [code]


async def test_owner_hierarchy_is_accepted_when_allowed(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, "allow_owner_ak = true\n")
    made = await lab.attest(_node(lab, make_ak(parent=OWNER)))
    assert "ak:hierarchy:owner" in made.selector_values


async def test_child_of_an_announced_parent_is_placed(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, "allow_owner_ak = true\n")
    srk = make_key("secp256r1")
    parent = SoftKey(srk, encode_public(srk, PARENT_ATTRIBUTES, aes_bits=128), OWNER)
    node = _node(lab, make_ak(parent=under(parent)))
    error = await lab.refusal(node)
    assert _codes(error) == ["ak_qualified_name"]
    node.parent = parent
    assert "ak:hierarchy:owner" in (await lab.attest(node)).selector_values
    other = make_key("secp256r1")
    node.parent = SoftKey(other, encode_public(other, PARENT_ATTRIBUTES, aes_bits=128), OWNER)
    assert _codes(await lab.refusal(node)) == ["ak_qualified_name"]


async def test_creation_data_must_name_the_same_parent(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    data = node.tpm.creation_data(parent_name=b"\x00\x0b" + bytes(32))
    attest, signature = node.tpm.creation(data)
    error = await lab.refusal(
        node,
        data=_ak(
            lambda ak: replace(
                ak, create_data=data, create_attestation=attest, create_signature=signature
            )
        ),
    )
    assert _codes(error) == ["creation_parent"]


async def test_random_qualified_name_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    for signer in (b"", b"\x00\x0b" + bytes(32), qualified_name(OWNER, node.tpm.ek.name)):
        body = node.tpm.creation(node.tpm.creation_data())[0][-70:]
        attest = node.tpm.attest(wire.ST_CREATION, body, b"", signer=signer)
        error = await lab.refusal(
            node,
            data=_changed(create_attestation=attest, create_signature=node.tpm.sign(attest)),
        )
        assert _codes(error) == ["ak_qualified_name"]


@pytest.mark.parametrize("kind", ["secp256r1", "secp384r1", "secp521r1", "rsa2048", "rsa3072"])
@pytest.mark.parametrize("hash_alg", [wire.ALG_SHA256, wire.ALG_SHA384, wire.ALG_SHA512])
async def test_every_usual_ak_is_accepted(tmp_path: Path, kind: str, hash_alg: int) -> None:
    lab = await Lab.make(tmp_path)
    tpm = SoftTpm(ek=make_ek("L-2"), ak=make_ak(kind, hash_alg=hash_alg))
    tpm.ak_scheme = (wire.ALG_RSASSA if kind.startswith("rsa") else wire.ALG_ECDSA, hash_alg)
    made = await lab.attest(lab.node(tpm))
    assert "ak:hierarchy:endorsement" in made.selector_values


async def test_pss_ak_is_accepted(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    scheme = (wire.ALG_RSAPSS, wire.ALG_SHA256)
    tpm = SoftTpm(ek=make_ek("L-2"), ak=make_ak("rsa2048", scheme=scheme), ak_scheme=scheme)
    await lab.attest(lab.node(tpm))


async def test_signature_of_the_csr_key_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    attest, _ = node.tpm.creation(node.tpm.creation_data())
    forged = sign(make_svid_key().private, attest, (wire.ALG_ECDSA, wire.ALG_SHA256))
    assert await _refuse_signature(lab, node, forged) == "creation_signature"
