from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from spire_hw.errors import InvalidInputError, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, generate_private_key, spki_der
from spire_hw.pkcs11.keys import (
    CKK_EC,
    CKK_RSA,
    CKM_ECDSA,
    CKM_RSA_PKCS,
    CKM_RSA_PKCS_PSS,
    EC_PARAMS,
    PublicMaterial,
    check_request,
    public_key_of,
    sign_scheme,
    signature_of,
)

SHA256, SHA512 = HashAlgorithm.SHA256, HashAlgorithm.SHA512


def test_a_digest_longer_than_the_curve_is_cut_to_its_leftmost_bytes() -> None:
    digest = hashlib.sha512(b"x").digest()
    scheme = sign_scheme(KeyType.EC_P256, SignOptions(SHA512))
    assert (scheme.mechanism, scheme.data(digest)) == (CKM_ECDSA, digest[:32])
    assert sign_scheme(KeyType.EC_P384, SignOptions(SHA512)).data(digest) == digest[:48]


def test_rsa_gets_a_digest_info_and_pss_the_bare_digest() -> None:
    digest = bytes(32)
    plain = sign_scheme(KeyType.RSA_2048, SignOptions(SHA256))
    assert plain.mechanism == CKM_RSA_PKCS
    assert len(plain.data(digest)) == 19 + 32
    assert plain.data(digest).endswith(digest)
    pss = sign_scheme(KeyType.RSA_2048, SignOptions(SHA256, pss=True))
    assert (pss.mechanism, pss.pss) == (CKM_RSA_PKCS_PSS, (0x250, 2, 32))
    assert pss.data(digest) == digest


@pytest.mark.parametrize("length", [0, 31, 33, 200])
def test_fault_52_digest_length_is_checked_before_the_token_sees_it(length: int) -> None:
    for key_type in KeyType:
        with pytest.raises(InvalidInputError):
            check_request(key_type, bytes(length), SignOptions(SHA256))


@pytest.mark.parametrize(("salt", "fits"), [(-2, False), (1, True), (222, True), (223, False)])
def test_fault_55_salt_lengths_that_cannot_be_are_refused(salt: int, *, fits: bool) -> None:
    options = SignOptions(SHA256, pss=True, salt_length=salt)
    if fits:
        check_request(KeyType.RSA_2048, bytes(32), options)
        assert sign_scheme(KeyType.RSA_2048, options).pss == (0x250, 2, salt)
        return
    with pytest.raises(InvalidInputError, match="salt"):
        check_request(KeyType.RSA_2048, bytes(32), options)


def test_fault_51_odd_ecdsa_outputs_are_refused() -> None:
    for raw in (
        b"",
        bytes(63),
        bytes(65),
        bytes(64),
        bytes(32) + b"\1" * 32,
        b"\1" * 32 + bytes(32),
    ):
        with pytest.raises(SpireHwError):
            signature_of(KeyType.EC_P256, raw)
    der = signature_of(KeyType.EC_P256, b"\0" * 31 + b"\1" + b"\xff" * 32)
    assert utils.decode_dss_signature(der) == (1, 2**256 - 1)
    with pytest.raises(SpireHwError):
        signature_of(KeyType.RSA_2048, bytes(255))


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384])
def test_fault_35_points_are_taken_wrapped_or_raw_by_their_length(key_type: KeyType) -> None:
    key = generate_private_key(key_type).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    raw = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    wrapped = bytes((0x04, len(raw))) + raw
    for point in (raw, wrapped):
        found = public_key_of(PublicMaterial(CKK_EC, EC_PARAMS[key_type], point))
        assert spki_der(found) == spki_der(key)
    compressed = key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    off_curve = raw[:-1] + bytes((raw[-1] ^ 1,))
    for point in (b"", compressed, raw[:-1], raw + b"\0", b"\x04\x41" + raw[:-1], off_curve):
        with pytest.raises(InvalidInputError, match="undecodable EC point"):
            public_key_of(PublicMaterial(CKK_EC, EC_PARAMS[key_type], point))
    with pytest.raises(InvalidInputError, match="parameters"):
        public_key_of(PublicMaterial(CKK_EC, b"\x13\x0aprime256v1", raw))


def test_rsa_keys_of_other_sizes_and_other_kinds_are_refused() -> None:
    key = generate_private_key(KeyType.RSA_2048).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    modulus = key.public_numbers().n.to_bytes(256)
    assert spki_der(
        public_key_of(PublicMaterial(CKK_RSA, modulus=modulus, exponent=b"\1\0\1"))
    ) == spki_der(key)
    with pytest.raises(InvalidInputError, match="RSA-1024"):
        public_key_of(PublicMaterial(CKK_RSA, modulus=b"\xff" * 128, exponent=b"\1\0\1"))
    for exponent, words in ((b"", "undecodable"), (b"\3", "exponent below 65537")):
        with pytest.raises(InvalidInputError, match=words):
            public_key_of(PublicMaterial(CKK_RSA, modulus=modulus, exponent=exponent))
    with pytest.raises(InvalidInputError):
        public_key_of(PublicMaterial(0x40))
