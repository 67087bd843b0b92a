"""Orders of operators: read, signed and verified strictly."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw_signer.audit.chain import LogHead
from spire_hw_signer.orders import (
    MAX_LIFE,
    Action,
    Operators,
    Order,
    OrderError,
    SignedOrder,
    check_name,
    parse_order,
    verify_order,
)

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
LOG = "ab" * 16
HASH = b"\x07" * 32
KEYS = {name: Ed25519PrivateKey.generate() for name in ("alice", "bob", "carol")}
OPERATORS = Operators({name: key.public_key() for name, key in KEYS.items()}, 2)
ORDER = Order(
    action=Action.KEY_RESTORE,
    target="example.org/s1/x509-CA-A@3",
    expires=NOW + timedelta(hours=1),
    log=LOG,
    head=LogHead(7, HASH),
    nonce="cd" * 16,
    comment="swapped by mistake",
)


def signed(order: Order = ORDER, *names: str) -> SignedOrder:
    made = SignedOrder(order)
    for name in names or ("alice", "bob"):
        made = made.sign(name, KEYS[name])
    return made


def check(made: SignedOrder, **changes: Any) -> tuple[str, ...]:
    given = {"now": NOW, "log": LOG, "hash_at": HASH, "is_used": False, **changes}
    return verify_order(made, given.pop("operators", OPERATORS), **given)


def test_enough_operators() -> None:
    assert check(signed()) == ("alice", "bob")
    assert check(signed(ORDER, "carol", "alice", "bob")) == ("alice", "bob", "carol")
    assert check(parse_order(signed().encode())) == ("alice", "bob")


@pytest.mark.parametrize(
    ("made", "changes", "code"),
    [
        (signed(ORDER, "alice"), {}, "too_few"),
        (SignedOrder(ORDER), {}, "too_few"),
        (SignedOrder(ORDER), {"operators": Operators()}, "too_few"),
        (signed().sign("mallory", Ed25519PrivateKey.generate()), {}, "unknown_operator"),
        (SignedOrder(ORDER).sign("alice", KEYS["bob"]).sign("bob", KEYS["bob"]), {}, "signature"),
        (signed(), {"log": "00" * 16}, "other_log"),
        (signed(), {"hash_at": b"\x08" * 32}, "other_head"),
        (signed(), {"hash_at": None}, "other_head"),
        (signed(), {"is_used": True}, "replayed"),
        (signed(), {"now": NOW + timedelta(hours=1)}, "expired"),
        (signed(), {"now": NOW - MAX_LIFE}, "too_long"),
    ],
)
def test_orders_that_are_refused(made: SignedOrder, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(OrderError) as e:
        check(made, **changes)
    assert e.value.code == code
    assert f"[{code}]" in e.value.message


def test_one_person_with_two_names_is_one() -> None:
    same = Operators({"alice": KEYS["alice"].public_key(), "al": KEYS["alice"].public_key()}, 2)
    made = SignedOrder(ORDER).sign("alice", KEYS["alice"]).sign("al", KEYS["alice"])
    with pytest.raises(OrderError) as e:
        check(made, operators=same)
    assert e.value.code == "too_few"


@pytest.mark.parametrize(
    "changed",
    [
        replace(ORDER, action=Action.KEY_DESTROY),
        replace(ORDER, target="example.org/s1/x509-CA-A@4"),
        replace(ORDER, expires=ORDER.expires + timedelta(seconds=1)),
        replace(ORDER, head=LogHead(8, HASH)),
        replace(ORDER, nonce="00" * 16),
        replace(ORDER, comment=""),
    ],
)
def test_a_signature_is_for_every_member(changed: Order) -> None:
    with pytest.raises(OrderError) as e:
        check(SignedOrder(changed, signed().signatures))
    assert e.value.code == "signature"


def test_nobody_signs_twice_or_without_a_name() -> None:
    with pytest.raises(InvalidInputError, match="has signed"):
        signed().sign("alice", KEYS["alice"])
    for wrong in ("", "a b", "-a", "ä", "a\n", "x" * 65):
        with pytest.raises(InvalidInputError, match="no name"):
            check_name(wrong)


def test_which_actions_need_an_order() -> None:
    assert OPERATORS.need_order(Action.KEY_DESTROY)
    assert not OPERATORS.need_order(Action.CLIENT_REVOKE)
    assert not any(Operators().need_order(action) for action in Action)


_TEXT = st.text(st.sampled_from(string.printable[:95] + "äß€"), max_size=200)


@given(
    action=st.sampled_from(list(Action)),
    target=_TEXT,
    comment=_TEXT,
    seq=st.integers(1, 2**63 - 1),
    head=st.binary(min_size=32, max_size=32),
    expires=st.datetimes(datetime(1000, 1, 1), datetime(9999, 12, 31)),  # noqa: DTZ001 - below
    names=st.sets(st.sampled_from(sorted(KEYS))),
)
def test_any_order_survives(
    *,
    action: Action,
    target: str,
    comment: str,
    seq: int,
    head: bytes,
    expires: datetime,
    names: set[str],
) -> None:
    order = Order(
        action, target, expires.replace(tzinfo=UTC), LOG, LogHead(seq, head), "0" * 32, comment
    )
    made = SignedOrder(order)
    for name in sorted(names):
        made = made.sign(name, KEYS[name])
    assert parse_order(made.encode()) == made


@given(st.binary(max_size=300))
def test_reading_is_total(data: bytes) -> None:
    with pytest.raises(EncodingError):
        parse_order(data)


@given(st.data())
def test_a_changed_file_is_refused_or_not_the_same(data: st.DataObject) -> None:
    whole = signed().encode()
    place = data.draw(st.integers(0, len(whole) - 2))
    other = data.draw(st.integers(0, 255).filter(lambda b: b != whole[place]))
    changed = whole[:place] + bytes([other]) + whole[place + 1 :]
    with pytest.raises((EncodingError, OrderError)):
        check(parse_order(changed))


def test_shapes_that_are_no_order() -> None:
    good = json.loads(signed().encode())

    def file(**order: Any) -> bytes:
        return spelled({"order": {**good["order"], **order}, "signatures": good["signatures"]})

    assert parse_order(file()) == signed()
    for bad in (
        file(seq=0),
        file(seq=True),
        file(seq=2**63),
        file(seq="7"),
        file(head="00"),
        file(log="AB" * 16),
        file(nonce=""),
        file(action="key.export"),
        file(expires="tomorrow"),
        file(target="a\nb"),
        file(target="x" * 513),
        file(target=None),
        file(more=1),
        spelled({"order": good["order"]}),
        spelled({"order": [], "signatures": {}}),
        spelled({**good, "signatures": []}),
        spelled({**good, "signatures": {"a b": "0" * 128}}),
        spelled({**good, "signatures": {"alice": "00"}}),
        spelled({**good, "signatures": {f"o{n}": "0" * 128 for n in range(65)}}),
        json.dumps(good).encode(),
        signed().encode() + b"\n",
        b"x" * 70_000,
    ):
        with pytest.raises(EncodingError):
            parse_order(bad)


def spelled(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
