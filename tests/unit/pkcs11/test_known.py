from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils

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
from spire_hw.pkcs11.checker import Checker
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.known import KnownKey, KnownKeys, Signed
from spire_hw.pkcs11.wire import Kind, SignKey, SignRun, decode_results

OPTIONS = SignOptions(HashAlgorithm.SHA256)
AWAY = TokenError("token is away", reason="hsm.token_missing", operation="sign")
ENOUGH = 501


def run_of(key: PrivateKey, count: int) -> SignRun:
    digests = [hashlib.sha256(n.to_bytes(4)).digest() for n in range(count)]
    return SignRun(SignKey(b"id", spki_der(key.public_key())), OPTIONS, digests)


def outputs(key: PrivateKey, run: SignRun) -> list[bytes | TokenError]:
    """Return what a token would make of a run: r and s for ECDSA, RSA as it is."""
    made: list[bytes | TokenError] = []
    for digest in run.digests:
        signature = sign_digest(key, digest, run.options)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            half = (key.key_size + 7) // 8
            r, s = utils.decode_dss_signature(signature)
            signature = r.to_bytes(half) + s.to_bytes(half)
        made.append(signature)
    return made


def verified(known: KnownKey, run: SignRun, raws: list[bytes | TokenError]) -> None:
    """Check that good outputs pass as signatures and that the others are told."""
    for digest, result in zip(run.digests, known.verified(run, raws, quickly=True), strict=True):
        assert isinstance(result, bytes)
        verify_digest(known.public_key, digest, result, run.options)
    swapped = [*raws[1:], raws[0]]
    for result in known.verified(run, swapped, quickly=True):
        assert isinstance(result, TokenError)
        assert result.reason == "hsm.bad_signature"
    first = known.verified(run, [AWAY, b"", *raws[2:]], quickly=True)
    assert first[0] is AWAY
    assert isinstance(first[1], TokenError)
    assert all(isinstance(result, bytes) for result in first[2:])


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
def test_only_what_verifies_leaves_before_and_after_a_key_is_made_quick(key_type: KeyType) -> None:
    key = generate_private_key(key_type)
    known = KnownKeys().get(spki_der(key.public_key()))
    assert known.key_type is key_type
    run = run_of(key, 5)
    raws = outputs(key, run)
    verified(known, run, raws)
    known.speed_up()
    assert not known.is_quick
    for _ in range(ENOUGH // len(raws) + 1):
        known.verified(run, raws, quickly=True)
    known.speed_up()
    assert known.is_quick <= (key_type is KeyType.EC_P256)
    verified(known, run, raws)


def test_answers_leave_in_the_order_of_the_requests() -> None:
    slow, fast = (generate_private_key(t) for t in (KeyType.EC_P384, KeyType.EC_P256))
    keys = KnownKeys()
    runs = {key: run_of(key, 3) for key in (slow, fast)}
    for _ in range(ENOUGH):
        signed = Signed(runs[fast], keys.get(runs[fast].key.spki), outputs(fast, runs[fast]))
        assert len(signed.results(quickly=False)) == 3
    keys.get(runs[fast].key.spki).speed_up()
    sent: list[tuple[Kind, int, bytes]] = []
    checker = Checker(lambda *answer: sent.append(answer))
    order = [slow, fast, None, slow, fast, fast, None, slow]
    for number, key in enumerate(order):
        if key is None:
            checker.answer(Kind.OK, number, b"{}")
        else:
            run = runs[key]
            signed = Signed(run, keys.get(run.key.spki), outputs(key, run))
            checker.check(number, [signed, Signed.refused(run, AWAY)])
    checker.close()
    assert [number for _, number, _ in sent] == list(range(len(order)))
    for key, (kind, _, body) in zip(order, sent, strict=True):
        assert kind is Kind.OK
        if key is not None:
            results = decode_results(body, 6)
            assert [isinstance(r, bytes) for r in results] == [True] * 3 + [False] * 3
