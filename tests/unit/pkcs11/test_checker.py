from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import utils

from spire_hw.key import (
    HashAlgorithm,
    KeyType,
    SignOptions,
    generate_private_key,
    sign_digest,
    spki_der,
    verify_digest,
)
from spire_hw.pkcs11.checker import MAX_GROUPS, Checker, groups
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.known import KnownKeys, Refused, Signed
from spire_hw.pkcs11.wire import Kind, decode_results

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTIONS = SignOptions(HashAlgorithm.SHA256)
AWAY = TokenError("token is away", reason="hsm.token_missing", operation="sign")
PRIVATE = generate_private_key(KeyType.EC_P256)
KEY = KnownKeys().get(spki_der(PRIVATE.public_key()))
DIGESTS = [hashlib.sha256(bytes([n])).digest() for n in range(60)]


def made(digest: bytes) -> bytes:
    """Return what a token makes of a digest."""
    r, s = utils.decode_dss_signature(sign_digest(PRIVATE, digest, OPTIONS))
    return r.to_bytes(32) + s.to_bytes(32)


RAWS = [made(digest) for digest in DIGESTS]


class Host:
    """Takes the answers; holds the checker up until it is let go, or has gone itself."""

    def __init__(self, *, holds: bool = False, gone: bool = False) -> None:
        self.answers: list[tuple[Kind, int, bytes]] = []
        self.tries = 0
        self.asked = threading.Event()
        self.let_go = threading.Event()
        self._gone = gone
        if not holds:
            self.let_go.set()

    def send(self, kind: Kind, number: int, body: bytes) -> None:
        self.tries += 1
        self.asked.set()
        assert self.let_go.wait(60)
        if self._gone:
            raise BrokenPipeError
        self.answers.append((kind, number, body))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 60])
def test_groups_are_complete_in_order_and_handed_over_before_more_is_signed(count: int) -> None:
    asked = []

    def token() -> Iterator[bytes]:
        for raw in RAWS[:count]:
            asked.append(raw)
            yield raw

    digests: list[bytes] = []
    raws: list[bytes | TokenError] = []
    for group in groups(KEY, OPTIONS, DIGESTS[:count], token()):
        assert 1 <= len(group.raws) <= 8
        assert len(group.raws) == len(group.digests)
        digests += group.digests
        raws += group.raws
        assert len(asked) == len(raws)
    assert digests == DIGESTS[:count]
    assert raws == RAWS[:count]


def test_what_a_slow_token_signs_is_verified_one_by_one() -> None:
    def token() -> Iterator[bytes]:
        for raw in RAWS[:4]:
            threading.Event().wait(0.005)
            yield raw

    sizes = [len(group.raws) for group in groups(KEY, OPTIONS, DIGESTS[:4], token())]
    assert sizes == [1] * 4


def test_answers_leave_in_the_order_of_the_requests() -> None:
    host = Host()
    checker = Checker(host.send)
    for number in range(9):
        if number % 3 == 2:
            checker.answer(Kind.FAILED, number, b"{}")
            continue
        for group in groups(KEY, OPTIONS, DIGESTS[: 10 + number], RAWS[: 10 + number]):
            checker.check(group)
        checker.check(Refused(AWAY, 2))
        checker.answer_signed(number)
    checker.close()
    assert [number for _, number, _ in host.answers] == list(range(9))
    for kind, number, body in host.answers:
        if number % 3 == 2:
            assert (kind, body) == (Kind.FAILED, b"{}")
            continue
        results = decode_results(body, 12 + number)
        for digest, result in zip(DIGESTS, results[:-2], strict=False):
            assert isinstance(result, bytes)
            verify_digest(KEY.public_key, digest, result, OPTIONS)
        assert [isinstance(r, TokenError) and r.reason for r in results[-2:]] == [AWAY.reason] * 2


def test_a_signature_that_does_not_hold_is_an_error_in_its_place_and_in_its_own_batch() -> None:
    host = Host()
    checker = Checker(host.send)
    wrong = [*RAWS[:3], RAWS[0], *RAWS[4:8]]
    for number, raws in enumerate((RAWS[:8], wrong, RAWS[:8])):
        checker.check(Signed(KEY, OPTIONS, DIGESTS[:8], raws))
        checker.answer_signed(number)
    checker.close()
    bad = [
        (number, place, result.reason)
        for _, number, body in host.answers
        for place, result in enumerate(decode_results(body, 8))
        if isinstance(result, TokenError)
    ]
    assert bad == [(1, 3, "hsm.bad_signature")]
    assert RAWS[0] not in host.answers[1][2]


def test_who_signs_waits_while_too_much_is_under_way() -> None:
    host = Host(holds=True)
    checker = Checker(host.send)
    checker.answer(Kind.OK, 0, b"{}")
    assert host.asked.wait(60)
    for number in range(1, 1 + MAX_GROUPS // 2):
        checker.check(Signed(KEY, OPTIONS, DIGESTS[:1], RAWS[:1]))
        checker.answer_signed(number)
    more = threading.Thread(target=checker.check, args=(Refused(AWAY, 1),))
    more.start()
    more.join(0.2)
    assert more.is_alive()
    host.let_go.set()
    more.join(60)
    checker.answer_signed(1 + MAX_GROUPS // 2)
    checker.close()
    first, *signed, last = host.answers
    assert first == (Kind.OK, 0, b"{}")
    assert len(signed) == MAX_GROUPS // 2
    assert all(isinstance(decode_results(body, 1)[0], bytes) for _, _, body in signed)
    assert isinstance(decode_results(last[2], 1)[0], TokenError)


def test_a_host_that_has_gone_holds_nobody_up() -> None:
    host = Host(gone=True)
    checker = Checker(host.send)
    for number in range(2 * MAX_GROUPS):
        checker.check(Signed(KEY, OPTIONS, DIGESTS[:1], RAWS[:1]))
        checker.answer_signed(number)
    checker.close()
    assert host.tries == 1
