from __future__ import annotations

import pytest

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.tpm import wire
from spire_hw.tpm.credential import kdfa, kdfe, make_credential, seal
from spire_hw.tpm.public import parse_public
from spire_hw_sim.softtpm import SoftTpm, encode_public, make_ak, make_ek, make_key

SEED = bytes(range(32))
NAME = b"\x00\x0b" + bytes(range(0x20, 0x40))
SECRET = b"0123456789abcdef0123456789abcdef"


def test_storage_and_integrity_keys_match_the_known_answers() -> None:
    assert kdfa("sha256", SEED, "STORAGE", NAME, b"", bits=128).hex() == (
        "44d0c54553f7cd6bf17d99c547ec79d6"
    )
    assert kdfa("sha256", SEED, "INTEGRITY", b"", b"", bits=256).hex() == (
        "bacf689f634ece301e1f1b15b072d9c87db6a69585db42b1a0cb8f73ebe2692e"
    )


def test_sealed_secret_matches_the_known_answer() -> None:
    blob = seal(wire.ALG_SHA256, 128, SEED, NAME, SECRET)
    mac = "6c844d3f9f31793c607e88cbf40beb185b7f3789b73e7809ebbc7e59bc39e28a"
    identity = "ba9ebb07f74fe38c194e13cdef3ef5c3c1818e2fa897a1c83db804fa7a7a88d50fb7"
    assert blob.hex() == "0020" + mac + identity


def test_ecdh_derivation_matches_the_known_answer() -> None:
    derived = kdfe("sha256", SEED, "IDENTITY", b"\x11" * 32, b"\x22" * 32, bits=256)
    assert derived.hex() == "cbce7a80e1b35da754dc24ec97f8c9ef9281bf9944c930765256ae6ea7d59f0e"


def test_derivations_beyond_one_digest_extend_shorter_ones() -> None:
    long = kdfa("sha256", SEED, "STORAGE", NAME, b"", bits=512)
    assert len(long) == 64
    assert len(kdfe("sha256", SEED, "IDENTITY", b"", b"", bits=512)) == 64


@pytest.mark.parametrize(
    ("label", "credential", "encrypted"),
    [
        ("L-1", 68, 256),
        ("L-2", 68, 68),
        ("H-1", 68, 256),
        ("H-2", 68, 68),
        ("H-3", 84, 100),
        ("H-6", 84, 384),
    ],
)
def test_credential_has_the_size_a_tpm_expects_and_opens(
    label: str, credential: int, encrypted: int
) -> None:
    tpm = SoftTpm(ek=make_ek(label), ak=make_ak())
    made = make_credential(tpm.ek.public, tpm.ak.name, SECRET)
    assert int.from_bytes(made.id_object[:2], "big") == len(made.id_object) - 2 == credential
    size = int.from_bytes(made.encrypted_secret[:2], "big")
    assert size == len(made.encrypted_secret) - 2 == encrypted
    assert tpm.activate(made.id_object, made.encrypted_secret) == SECRET


def test_two_credentials_for_one_secret_differ() -> None:
    ek = parse_public(make_ek("L-2").public)
    first, second = (make_credential(ek, NAME, SECRET) for _ in range(2))
    assert first.id_object != second.id_object
    assert first.encrypted_secret != second.encrypted_secret


@pytest.mark.parametrize("size", [0, 33, 64])
def test_secret_must_fit_the_name_algorithm(size: int) -> None:
    with pytest.raises(InvalidInputError, match="does not fit"):
        make_credential(make_ek("L-2").public, NAME, bytes(size))


def test_only_restricted_decryption_keys_are_taken() -> None:
    key = make_key("secp256r1")
    for public in (
        make_ak().public,
        encode_public(key, 0x000200B2, aes_bits=128),
        encode_public(key, 0x000300B2),
        encode_public(key, 0x000300B2, aes_bits=128, name_alg=wire.ALG_SHA1),
    ):
        with pytest.raises(InvalidInputError, match="not a restricted decryption key"):
            make_credential(public, NAME, SECRET)


def test_other_ciphers_are_refused() -> None:
    public = encode_public(make_key("secp256r1"), 0x000300B2, aes_bits=192)
    with pytest.raises(InvalidInputError, match="AES-128 or AES-256"):
        make_credential(public, NAME, SECRET)


def test_area_that_does_not_parse_is_an_encoding_error() -> None:
    with pytest.raises(EncodingError):
        make_credential(make_ek("L-2").public[:-1], NAME, SECRET)
