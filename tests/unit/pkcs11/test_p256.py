from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils

from spire_hw.errors import NotReadyError
from spire_hw.key import HashAlgorithm, SignOptions, sign_digest
from spire_hw.pkcs11.p256 import P256Verifier

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
PRIME = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
SHA256 = SignOptions(HashAlgorithm.SHA256)


def verifier_of(key: ec.EllipticCurvePrivateKey) -> P256Verifier:
    """Return the verifier of a key, or skip where OpenSSL makes no tables."""
    try:
        return P256Verifier(key.public_key())
    except NotReadyError as e:
        pytest.skip(e.message)


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def verifier(key: ec.EllipticCurvePrivateKey) -> P256Verifier:
    return verifier_of(key)


def digest_of(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(4)).digest()


def raw_of(key: ec.EllipticCurvePrivateKey, digest: bytes) -> bytes:
    return raw(*utils.decode_dss_signature(sign_digest(key, digest, SHA256)))


def raw(r: int, s: int) -> bytes:
    return r.to_bytes(32) + s.to_bytes(32)


def test_signatures_hold_and_changed_ones_do_not(
    key: ec.EllipticCurvePrivateKey, verifier: P256Verifier
) -> None:
    digests = [digest_of(n) for n in range(100)]
    raws = [raw_of(key, digest) for digest in digests]
    assert verifier.holds(digests, raws) == [True] * 100
    assert not any(verifier.holds(digests[1:] + digests[:1], raws))
    for bit in range(512):
        at = bit // 8
        odd = raws[0][:at] + bytes((raws[0][at] ^ 1 << bit % 8,)) + raws[0][at + 1 :]
        assert verifier.holds(digests[:1], [odd]) == [False]


def test_one_bad_signature_does_not_spoil_its_neighbours(
    key: ec.EllipticCurvePrivateKey, verifier: P256Verifier
) -> None:
    digests = [digest_of(n) for n in range(9)]
    raws = [raw_of(key, digest) for digest in digests]
    bad = {1: b"", 3: raws[3][:63], 4: bytes(64), 6: raws[6] + b"\0", 8: raws[7]}
    mixed = [bad.get(n, good) for n, good in enumerate(raws)]
    assert verifier.holds(digests, mixed) == [n not in bad for n in range(9)]


def test_values_out_of_range_do_not_hold(
    key: ec.EllipticCurvePrivateKey, verifier: P256Verifier
) -> None:
    digest = digest_of(0)
    r, s = utils.decode_dss_signature(sign_digest(key, digest, SHA256))
    odd = [raw(0, s), raw(r, 0), raw(ORDER, s), raw(r, ORDER), raw(2**256 - 1, s)]
    if r + ORDER < 2**256:
        odd.append(raw(r + ORDER, s))
    assert not any(verifier.holds([digest] * len(odd), odd))
    # Both signs of s are signatures, as everywhere else.
    assert verifier.holds([digest], [raw(r, ORDER - s)]) == [True]


def test_another_key_s_signature_does_not_hold(verifier: P256Verifier) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    assert verifier.holds([digest_of(1)], [raw_of(other, digest_of(1))]) == [False]


@pytest.mark.parametrize("e", [0, ORDER, 1, ORDER + 5, 2**256 - 1])
def test_digests_at_the_edges_are_judged_like_everywhere_else(
    e: int, key: ec.EllipticCurvePrivateKey, verifier: P256Verifier
) -> None:
    digest = e.to_bytes(32)
    assert verifier.holds([digest], [raw_of(key, digest)]) == [True]
    assert verifier.holds([(e ^ 2).to_bytes(32)], [raw_of(key, digest)]) == [False]


def test_a_sum_at_infinity_does_not_hold() -> None:
    # With the private key 1 both multiplications have the same base: e = -r makes the sum vanish.
    verifier = verifier_of(ec.derive_private_key(1, ec.SECP256R1()))
    for r in (1, 5, ORDER - 1):
        assert verifier.holds([(ORDER - r).to_bytes(32)], [raw(r, 7)]) == [False]


def test_equal_terms_are_doubled() -> None:
    # u1 = u2: the points that are added are one and the same.
    key = ec.derive_private_key(1, ec.SECP256R1())
    nonce = 12345
    point = ec.derive_private_key(nonce, ec.SECP256R1()).public_key().public_numbers()
    r = point.x % ORDER
    s = 2 * r * pow(nonce, -1, ORDER) % ORDER
    assert verifier_of(key).holds([r.to_bytes(32)], [raw(r, s)]) == [True]


def test_a_coordinate_above_the_order_holds_with_its_remainder() -> None:
    # A point whose first coordinate is between order and prime; its r is that minus the order.
    x, y = next(
        (x, y)
        for x in range(ORDER, ORDER + 100)
        for y in (
            pow(
                x**3 - 3 * x + 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B,
                (PRIME + 1) // 4,
                PRIME,
            ),
        )
        if (
            y * y
            - (x**3 - 3 * x + 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B)
        )
        % PRIME
        == 0
    )
    r = x - ORDER
    point = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    # With the point itself as the key, e = 0 and s = r give u1 = 0, u2 = 1: the sum is the point.
    try:
        verifier = P256Verifier(point)
    except NotReadyError as e:
        pytest.skip(e.message)
    assert r > 0
    assert verifier.holds([bytes(32)], [raw(r, r)]) == [True]
    assert verifier.holds([bytes(32)], [raw(r + 1, r + 1)]) == [False]
