from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.key import fingerprint, spki_der
from spire_hw.tpm import wire
from spire_hw.tpm.public import (
    EK_TEMPLATES,
    RESTRICTED,
    SIGN,
    build_ecc_key,
    build_rsa_key,
    check_ek,
    check_svid_key,
    ek_hash,
    key_label,
    name_of,
    parse_public,
    qualified_name,
)
from spire_hw_sim.softtpm import (
    SVID_KEY_ATTRIBUTES,
    encode_public,
    make_ak,
    make_ek,
    make_key,
    make_svid_key,
)


def _policy_a(name: str) -> bytes:
    size = hashlib.new(name).digest_size
    first = hashlib.new(name, bytes(size) + bytes.fromhex("000001514000000b")).digest()
    return hashlib.new(name, first).digest()


# PolicyAuthorizeNV branch of the high-range templates (EK Credential Profile, Annex B.6.3).
POLICY_C = {
    "sha256": "3767e2edd43ff45a3a7e1eaefcef78643dca964632e7aad82c673a30d8633fde",
    "sha384": (
        "d6032ce61f2fb3c240eb3cf6a33237ef2b6a16f4293c22b455e261cffd217ad5"
        "b4947c2d73e63005eed2dc2b3593d165"
    ),
    "sha512": (
        "589ee1e146544716e8deafe6db247b01b81e9f9c7dd16b814aa159138749105f"
        "ba5388dd1dea702f35240c184933121e2c61b8f50d3ef91393a49a38c3f73fc8"
    ),
}


@pytest.mark.parametrize("template", EK_TEMPLATES, ids=lambda t: t.label)
def test_template_policies_follow_from_their_definition(template: object) -> None:
    assert template in EK_TEMPLATES
    entry = next(t for t in EK_TEMPLATES if t is template)
    name = wire.HASHES[entry.name_alg][0]
    expected = _policy_a(name)
    if entry.label.startswith("H"):
        size = hashlib.new(name).digest_size
        branches = expected + bytes.fromhex(POLICY_C[name])
        expected = hashlib.new(name, bytes(size) + bytes.fromhex("00000171") + branches).digest()
    assert entry.auth_policy == expected


def test_area_of_an_ecc_ak_reads_back() -> None:
    ak = make_ak()
    public = parse_public(ak.public)
    assert len(ak.public) == 88
    assert public.spki == ak.spki
    assert public.name == b"\x00\x0b" + hashlib.sha256(ak.public).digest() == name_of(ak.public)
    assert (public.scheme, public.scheme_hash) == (wire.ALG_ECDSA, wire.ALG_SHA256)
    assert public.has(RESTRICTED | SIGN)
    assert public.symmetric is None


def test_area_of_an_rsa_ak_reads_back() -> None:
    ak = make_ak("rsa2048")
    public = parse_public(ak.public)
    assert len(ak.public) == 280
    assert public.spki == ak.spki
    explicit = encode_public(ak.private, SVID_KEY_ATTRIBUTES, exponent=65537)
    assert parse_public(explicit).spki == ak.spki


@pytest.mark.parametrize("name_alg", [wire.ALG_SHA384, wire.ALG_SHA512])
def test_name_follows_the_name_algorithm(name_alg: int) -> None:
    raw = encode_public(make_key("secp256r1"), SVID_KEY_ATTRIBUTES, name_alg=name_alg)
    digest = hashlib.new(wire.HASHES[name_alg][0], raw).digest()
    assert parse_public(raw).name == name_alg.to_bytes(2, "big") + digest


def test_name_of_too_few_bytes_is_an_encoding_error() -> None:
    for raw in (b"", b"\x00\x01\x00", b"\x00\x23\x00\x10"):
        with pytest.raises(EncodingError):
            name_of(raw)


def test_ek_hash_is_the_fingerprint_of_the_spki() -> None:
    key = make_ek("L-1").private.public_key()
    assert ek_hash(key) == fingerprint(spki_der(key)) == hashlib.sha256(spki_der(key)).hexdigest()


@pytest.mark.parametrize("label", ["L-1", "L-2", "H-1", "H-2", "H-3", "H-4", "H-6", "H-7"])
def test_every_template_is_recognised(label: str) -> None:
    assert check_ek(parse_public(make_ek(label).public)).label == label


def test_svid_key_of_every_usual_kind_is_accepted() -> None:
    for extra in (0, 1 << 7, 1 << 10):
        check_svid_key(parse_public(make_svid_key(attributes=0x00040072 | extra).public))


def test_qualified_name_is_a_chain_of_hashes() -> None:
    name = make_ak().name
    expected = b"\x00\x0b" + hashlib.sha256(bytes.fromhex("4000000b") + name).digest()
    assert qualified_name(bytes.fromhex("4000000b"), name) == expected
    with pytest.raises(EncodingError):
        qualified_name(b"", b"\xff\xff")


def test_key_label_names_size_or_curve() -> None:
    assert key_label(make_key("rsa2048").public_key()) == "rsa2048"
    assert key_label(make_key("secp384r1").public_key()) == "secp384r1"


def test_composite_modulus_with_two_large_factors_is_a_key() -> None:
    numbers = make_key("rsa2048").public_key().public_numbers()
    assert isinstance(numbers, rsa.RSAPublicNumbers)
    assert build_rsa_key(numbers.n, numbers.e, "key").key_size == 2048


@pytest.mark.parametrize(
    ("point", "words"),
    [
        (b"", "canonical form"),
        (b"\x03" + bytes(32), "canonical form"),
        (b"\x04" + bytes(64), "not on P-256"),
    ],
)
def test_points_have_one_form(point: bytes, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        build_ecc_key("secp256r1", point, "key")
