"""The fuzz targets work: without a fuzzer, over their own seeds, cut and bent."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from spire_hw.errors import SpireHwError
from tests.fuzz import targets
from tests.fuzz.targets import TARGETS
from tests.fuzz.worker import MOST_BYTES
from tests.fuzz.worst import WORST


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_our_own_errors(name: str) -> None:
    choose = random.Random(name)  # noqa: S311 - the same every time
    for seed in TARGETS[name].seeds:
        assert len(seed) <= TARGETS[name].longest
        targets.run(name, seed)
        for _ in range(20):
            bent = bytearray(seed)
            for _ in range(choose.randint(1, 3)):
                at = choose.randrange(len(bent) or 1)
                bent[at : at + choose.randint(0, 4)] = choose.randbytes(choose.randint(0, 4))
            targets.run(name, bytes(bent))
            targets.run(name, seed[: choose.randrange(len(seed))])


SOUND = [
    *("boot_log", "boot_events", "inflate", "crl", "cabinet", "signature_list"),
    *("signer_certificate", "signer_request", "signer_policy"),
]


@pytest.mark.parametrize("name", SOUND)
def test_seeds_go_all_the_way(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)


@pytest.mark.parametrize("name", WORST)
def test_the_worst_there_can_be_takes_less_than_64_mib(name: str) -> None:
    for make in WORST[name]:
        raw = make()
        tracemalloc.start()
        targets.run(name, raw)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MOST_BYTES, (make, peak)


def test_a_parser_that_breaks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(raw: bytes) -> None:
        if raw == b"ours":
            raise SpireHwError("of our own")
        raise IndexError(raw)

    monkeypatch.setitem(TARGETS, "broken", targets.Target(breaks, []))
    targets.run("broken", b"ours")
    with pytest.raises(IndexError):
        targets.run("broken", b"other")
