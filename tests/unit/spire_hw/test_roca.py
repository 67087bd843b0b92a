from __future__ import annotations

import secrets

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from spire_hw.errors import WeakKeyError
from spire_hw.key import check_public_key
from spire_hw.roca import is_marked, primes
from spire_hw.tpm.public import build_rsa_key
from spire_hw_sim.weakkeys import roca_modulus


def test_primes_are_all_there() -> None:
    assert primes(30) == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]


def test_modulus_of_the_faulty_generator_is_marked() -> None:
    modulus = roca_modulus()
    assert modulus.bit_length() == 2048
    assert is_marked(modulus)
    with pytest.raises(WeakKeyError, match="CVE-2017-15361"):
        check_public_key(rsa.RSAPublicNumbers(65537, modulus).public_key())
    with pytest.raises(WeakKeyError, match="CVE-2017-15361"):
        build_rsa_key(modulus, 65537, "key")


def test_sound_modulus_is_not_marked() -> None:
    assert not is_marked(rsa.generate_private_key(65537, 2048).public_key().public_numbers().n)
    marked = sum(is_marked(secrets.randbits(2048) | 1) for _ in range(2000))
    assert marked == 0
