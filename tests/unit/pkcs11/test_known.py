from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils

from spire_hw.errors import InvalidInputError
from spire_hw.key import (
    HashAlgorithm,
    KeyType,
    PrivateKey,
    SignOptions,
    generate_private_key,
    sign_digest,
    spki_der,
    verify_digest,
)
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.known import KnownKey, KnownKeys, verified
from spire_hw.pkcs11.wire import SignKey, SignRun

if TYPE_CHECKING:
    from collections.abc import Sequence

SHA256 = SignOptions(HashAlgorithm.SHA256)
SHA512 = SignOptions(HashAlgorithm.SHA512)
PSS = SignOptions(HashAlgorithm.SHA256, pss=True)
AWAY = TokenError("token is away", reason="hsm.token_missing", operation="sign")


def known_of(key: PrivateKey) -> KnownKey:
    return KnownKeys().get(spki_der(key.public_key()))


def output(key: PrivateKey, digest: bytes, options: SignOptions) -> bytes:
    """Return what a token makes of a digest: r and s for ECDSA, RSA as it is."""
    signature = sign_digest(key, digest, options)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return signature
    half = key.key_size // 8
    return b"".join(n.to_bytes(half) for n in utils.decode_dss_signature(signature))


def checked(
    key: PrivateKey,
    options: SignOptions,
    digests: list[bytes],
    raws: Sequence[bytes | TokenError],
) -> list[bytes | TokenError]:
    run = SignRun(SignKey(b"id", spki_der(key.public_key())), options, digests)
    return verified(KnownKeys(), [run], raws)


def is_bad(result: bytes | TokenError) -> bool:
    return isinstance(result, TokenError) and result.reason == "hsm.bad_signature"


@pytest.mark.parametrize(
    ("key_type", "options"),
    [
        (KeyType.EC_P256, SHA256),
        (KeyType.EC_P256, SHA512),
        (KeyType.EC_P384, SHA256),
        (KeyType.EC_P384, SHA512),
        (KeyType.RSA_2048, SHA512),
        (KeyType.RSA_2048, PSS),
    ],
)
def test_only_what_verifies_leaves(key_type: KeyType, options: SignOptions) -> None:
    key = generate_private_key(key_type)
    assert known_of(key).key_type is key_type
    digests = [options.hash.digest(bytes([n])) for n in range(5)]
    raws = [output(key, digest, options) for digest in digests]
    results = checked(key, options, digests, raws)
    for digest, result in zip(digests, results, strict=True):
        assert isinstance(result, bytes)
        verify_digest(key.public_key(), digest, result, options)
    swapped = [*raws[1:], raws[0]]
    assert all(map(is_bad, checked(key, options, digests, swapped)))
    foreign = [output(generate_private_key(key_type), digests[0], options)]
    assert all(map(is_bad, checked(key, options, digests[:1], foreign)))


def test_one_bad_output_does_not_spoil_its_neighbours() -> None:
    key = generate_private_key(KeyType.EC_P256)
    digests = [hashlib.sha256(bytes([n])).digest() for n in range(9)]
    raws: list[bytes | TokenError] = [output(key, digest, SHA256) for digest in digests]
    raws[1], raws[3], raws[4], raws[6] = b"", bytes(63), bytes(64), b"\xff" * 64
    raws[7] = AWAY
    results = checked(key, SHA256, digests, raws)
    assert [n for n, result in enumerate(results) if is_bad(result)] == [1, 3, 4, 6]
    assert results[7] is AWAY
    assert all(isinstance(results[n], bytes) for n in (0, 2, 5, 8))


def test_no_bit_of_an_output_may_change() -> None:
    key = generate_private_key(KeyType.EC_P256)
    known = known_of(key)
    digest = bytes(range(32))
    raw = int.from_bytes(output(key, digest, SHA256))
    assert isinstance(known.checked(digest, raw.to_bytes(64), SHA256), bytes)
    for bit in range(512):
        assert is_bad(known.checked(digest, (raw ^ 1 << bit).to_bytes(64), SHA256))


def test_each_run_is_verified_with_its_own_key() -> None:
    keys = [generate_private_key(KeyType.EC_P256) for _ in range(2)]
    runs = [SignRun(SignKey(b"id", spki_der(k.public_key())), SHA256, [bytes(32)]) for k in keys]
    raws = [output(key, bytes(32), SHA256) for key in keys]
    assert not any(map(is_bad, verified(KnownKeys(), runs, raws)))
    assert all(map(is_bad, verified(KnownKeys(), runs, raws[::-1])))
    with pytest.raises(ValueError, match="not as many"):
        verified(KnownKeys(), runs, raws[:1])


def test_keys_are_parsed_once_and_only_some_are_kept() -> None:
    keys = KnownKeys()
    spkis = [spki_der(generate_private_key(KeyType.EC_P256).public_key()) for _ in range(100)]
    first = keys.get(spkis[0])
    assert keys.get(spkis[0]) is first
    for spki in spkis:
        assert spki_der(keys.get(spki).public_key) == spki
    again = keys.get(spkis[0])
    assert again is not first
    assert again.public_key == first.public_key


def test_keys_that_are_none_of_ours_are_refused() -> None:
    with pytest.raises(InvalidInputError):
        KnownKeys().get(b"no key")
    with pytest.raises(InvalidInputError):
        KnownKeys().get(spki_der(ec.generate_private_key(ec.SECP521R1()).public_key()))
