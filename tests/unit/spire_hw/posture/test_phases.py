from __future__ import annotations

import hashlib
from itertools import combinations

import pytest

from spire_hw.posture.phases import PHASES, passed


def _after(value: bytes, names: tuple[str, ...], bank: str = "sha256") -> bytes:
    for name in names:
        digest = hashlib.new(bank, name.encode()).digest()
        value = hashlib.new(bank, value + digest).digest()
    return value


@pytest.mark.parametrize("bank", ["sha1", "sha256", "sha384"])
def test_any_phases_in_their_order(bank: str) -> None:
    start = hashlib.new(bank, b"image").digest()
    for count in range(len(PHASES) + 1):
        for names in combinations(PHASES, count):
            assert passed(start, _after(start, names, bank), bank) == names


@pytest.mark.parametrize(
    "names",
    [("leave-initrd", "enter-initrd"), ("ready", "ready"), ("other",), ("ready", "other")],
)
def test_nothing_else(names: tuple[str, ...]) -> None:
    start = bytes(32)
    assert passed(start, _after(start, names), "sha256") is None


def test_not_backwards() -> None:
    later = _after(bytes(32), ("sysinit",))
    assert passed(later, bytes(32), "sha256") is None
