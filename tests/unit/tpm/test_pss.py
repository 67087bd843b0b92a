from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils

from spire_hw.errors import SpireHwError
from spire_hw.key import HashAlgorithm, SignOptions
from spire_hw.tpm import keys, wire
from spire_hw.tpm.pss import pss_salt_bytes
from spire_hw_sim.softtpm import SVID_KEY_ATTRIBUTES, encode_public, rsa_key

DIGEST = HashAlgorithm.SHA256.digest(b"data")
PREHASHED = utils.Prehashed(hashes.SHA256())


def signed(key: rsa.RSAPrivateKey, salt: int) -> bytes:
    return key.sign(DIGEST, padding.PSS(padding.MGF1(hashes.SHA256()), salt), PREHASHED)


@pytest.mark.parametrize("salt", [0, 20, 32, 222])
def test_the_salt_of_a_signature_is_told(salt: int) -> None:
    key = rsa_key(2048)
    assert pss_salt_bytes(key.public_key(), signed(key, salt), HashAlgorithm.SHA256) == salt


def test_what_is_no_pss_signature_has_no_salt() -> None:
    key = rsa_key(2048)
    plain = key.sign(b"data", padding.PKCS1v15(), hashes.SHA256())
    for signature in (plain, bytes(256), b"\xff" * 256, b""):
        assert pss_salt_bytes(key.public_key(), signature, HashAlgorithm.SHA256) is None


def test_a_tpm_that_makes_long_salts_is_told_apart_from_one_that_lies() -> None:
    key = rsa_key(2048)
    public = wire.sized(encode_public(key, SVID_KEY_ATTRIBUTES))
    blob = keys.KeyBlob.parse(public, wire.sized(b"wrapped"))
    options = SignOptions(HashAlgorithm.SHA256, pss=True)
    keys.verify_own(blob, DIGEST, signed(key, 32), options)
    with pytest.raises(SpireHwError, match=r"PSS salts of 222 bytes.*32 are needed"):
        keys.verify_own(blob, DIGEST, signed(key, 222), options)
    for signature in (signed(rsa_key(2048, 1), 32), bytes(256)):
        with pytest.raises(SpireHwError, match="does not verify"):
            keys.verify_own(blob, DIGEST, signature, options)
