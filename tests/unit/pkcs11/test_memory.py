"""What a token says of its memory: when it is believed, and what follows."""

from __future__ import annotations

import pytest

from spire_hw.key import KeyType
from spire_hw.pkcs11.memory import Memory

UNKNOWN = (1 << 64) - 1


@pytest.mark.parametrize(
    ("total", "free", "known"),
    [
        (4096, 17, 17),
        (4096, 4096, 4096),
        (4096, 0, 0),
        (UNKNOWN, 17, 17),
        (0, 0, None),
        (0, 17, None),
        (4096, 4097, None),
        (4096, UNKNOWN, None),
        (UNKNOWN, UNKNOWN, None),
        (0xFFFF_FFFF, 0xFFFF_FFFF, None),
    ],
)
def test_what_cannot_be_true_is_not_known(total: int, free: int, known: int | None) -> None:
    assert Memory.of(public=(total, free), private=(UNKNOWN, UNKNOWN)) == Memory(None, known)
    assert Memory.of(public=(UNKNOWN, UNKNOWN), private=(total, free)) == Memory(known, None)


@pytest.mark.parametrize("odd", [None, [], "private", {}, {"private": "9", "public": -1}])
def test_what_does_not_decode_is_not_known(odd: object) -> None:
    assert Memory.read(odd) == Memory()
    assert Memory.read({"private": True, "public": 1 << 40}) == Memory()


def test_what_is_known_survives_the_way_between_processes() -> None:
    for memory in (Memory(), Memory(0, 5), Memory(7), Memory(public=9)):
        assert Memory.read(memory.fields) == memory
    assert Memory(7, 9).words == "7 bytes of private memory, 9 bytes of public memory"


def test_a_pair_whose_numbers_alone_are_longer_finds_no_room() -> None:
    assert not Memory().lacks_room()
    assert Memory(31, 4096).lacks_room()
    assert Memory(4096, 31).lacks_room()
    assert not Memory(32, 32).lacks_room()
    assert Memory(511, 4096).lacks_room(4096)
    assert not Memory(512, 512).lacks_room(4096)


def test_room_is_short_by_the_largest_pair_that_may_be_made() -> None:
    assert not Memory().is_short(list(KeyType))
    assert not Memory(2000, 2000).is_short([KeyType.EC_P256])
    assert Memory(2000, 2000).is_short([KeyType.EC_P256, KeyType.RSA_2048])
    assert Memory(100_000, 900).is_short([KeyType.EC_P256])
    assert Memory(100).is_short([])
    assert not Memory(100_000).is_short(list(KeyType))
