"""Which instance of a key counts over several tokens, and where a new one goes."""

from __future__ import annotations

import pytest

from spire_hw.key import KeyType, generate_private_key
from spire_hw.pkcs11.cluster.placement import (
    Held,
    Mode,
    Standing,
    current_keys,
    missing_copies,
    order_for_generation,
    stranded,
    superseded,
)
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.inventory.entry import Entry
from spire_hw.plugin.keymanager import DeviceHealth, KeyHealth, KeyInfo

GOOD, DEGRADED, DOWN = (DeviceHealth(h) for h in KeyHealth)


def held(key_id: str, rank: int) -> Held:
    public_key = generate_private_key(KeyType.EC_P256).public_key()
    info = KeyInfo.of(key_id, KeyType.EC_P256, public_key)
    return Held(Entry.of(info, b"id", "label", rank), rank)


def token(name: str, health: DeviceHealth = GOOD, **keys: Held) -> Standing:
    return Standing(name, health, {k.replace("_", "-"): v for k, v in keys.items()})


def test_the_younger_instance_counts_wherever_it_is() -> None:
    old, new = held("CA-A", 3), held("CA-A", 4)
    tokens = [token("one", CA_A=old), token("two", DOWN, CA_A=new)]
    keys = current_keys(tokens)
    assert keys["CA-A"].entry is new.entry
    assert keys["CA-A"].holders == ("two",)
    assert superseded(tokens, keys) == [("one", "CA-A")]


def test_equal_public_keys_are_one_key() -> None:
    one = held("CA-A", 3)
    tokens = [token("one", CA_A=one), token("two", CA_A=Held(one.entry, 1)), token("three")]
    keys = current_keys(tokens)
    assert keys["CA-A"].holders == ("one", "two")
    assert superseded(tokens, keys) == []
    assert missing_copies(tokens, keys) == {"CA-A": ("three",)}


def test_two_keys_in_one_place_are_not_chosen_between_unless_one_is_known() -> None:
    one, two = held("CA-A", 3), held("CA-A", 3)
    tokens = [token("one", CA_A=one), token("two", CA_A=two)]
    with pytest.raises(TokenError, match='different keys in generation 3 of "CA-A"'):
        current_keys(tokens)
    keys = current_keys(tokens, {"CA-A": two.entry.fingerprint})
    assert keys["CA-A"].holders == ("two",)
    assert superseded(tokens, keys) == [("one", "CA-A")]


def test_keys_are_stranded_only_while_another_token_is_there() -> None:
    a, b = held("CA-A", 1), held("CA-B", 1)
    lost = [token("one", DOWN, CA_A=a), token("two", CA_B=b)]
    assert stranded(lost, current_keys(lost)) == {"CA-A": ("one",)}
    both = [token("one", DOWN, CA_A=a), token("two", DOWN, CA_B=b)]
    assert stranded(both, current_keys(both)) == {}


@pytest.mark.parametrize(
    ("one", "two", "wanted"),
    [
        (GOOD, GOOD, ["two", "one"]),  # not beside the authority that signs
        (GOOD, DEGRADED, ["two", "one"]),
        (GOOD, DOWN, ["one"]),
        (DOWN, GOOD, ["two"]),
        (DOWN, DOWN, []),
    ],
)
def test_a_new_key_goes_away_from_the_one_that_signs(
    one: DeviceHealth, two: DeviceHealth, wanted: list[str]
) -> None:
    tokens = [token("one", one, CA_A=held("CA-A", 1)), token("two", two)]
    keys = current_keys(tokens)
    assert order_for_generation("CA-B", tokens, keys, Mode.SPREAD) == wanted


def test_without_a_sibling_the_healthiest_and_emptiest_is_first() -> None:
    tokens = [
        token("one", DEGRADED),
        token("two", GOOD, other=held("other", 1)),
        token("three", GOOD),
    ]
    keys = current_keys(tokens)
    assert order_for_generation("acme", tokens, keys, Mode.SPREAD) == ["three", "two", "one"]
    assert order_for_generation("acme", tokens, keys, Mode.SAME_KEYS) == ["two", "three", "one"]
