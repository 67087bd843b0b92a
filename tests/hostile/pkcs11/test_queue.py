"""Fault 48: a slow token, and keys that want more of it than it has; who waits, who is refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.errors import ErrorKind, LimitError, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.log import get_logger
from spire_hw.pkcs11.pool.pool import Limits, Pool
from spire_hw.pkcs11.wire import SignItem
from spire_hw.telemetry.exposition import encode
from spire_hw.telemetry.naming import Selection
from spire_hw.telemetry.registry import Registry
from spire_hw_sim.pkcs11faults import Fault
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import TokenRig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
BULK = SignOptions(HashAlgorithm.SHA256)
URGENT = SignOptions(HashAlgorithm.SHA256, urgent=True)
DIGEST = bytes(range(32))
P256 = KeyType.EC_P256


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[TokenRig]:
    async with TokenRig(tmp_path, tampered=True) as made:
        yield made


@asynccontextmanager
async def pooled(
    manager: Pkcs11KeyManager, limits: Limits, metrics: Metrics
) -> AsyncIterator[tuple[Pool, SignItem]]:
    """Open the token of a key manager once more, with limits of its own, and a key to sign with."""
    assert manager._pool is not None
    assert manager._keyring is not None
    item = SignItem(manager._keyring.get("a").sign_key, DIGEST, BULK)
    pool = Pool(manager._pool._admin._opening, limits, get_logger("rig"), metrics)
    await pool.start()
    try:
        yield pool, item
    finally:
        await pool.close()


async def outcomes(pool: Pool, item: SignItem, count: int) -> Counter[str]:
    """Ask for some signatures at once; return how many ended how."""
    results = await asyncio.gather(*(pool.sign(item) for _ in range(count)), return_exceptions=True)
    ends: Counter[str] = Counter()
    for result in results:
        if isinstance(result, LimitError):
            assert "token signs" in result.message
        elif isinstance(result, BaseException) and not isinstance(result, SpireHwError):
            raise result
        ends[result.kind.name if isinstance(result, SpireHwError) else "SIGNED"] += 1
    return ends


@pytest.mark.asyncio
async def test_fault_48_a_flood_for_one_key_refuses_no_other_and_nothing_urgent(
    rig: TokenRig,
) -> None:
    manager = await rig.start(queue=64)
    for key_id in ("x509", "jwt"):
        await manager.generate_key(key_id, P256)
    rig.faults.set(Fault("C_Sign", sleep_s=0.05))
    refused: list[SpireHwError] = []
    is_full, is_over = asyncio.Event(), asyncio.Event()

    async def flood() -> None:
        while not is_over.is_set():
            try:
                await manager.sign_data("jwt", DIGEST, BULK)
            except SpireHwError as e:
                refused.append(e)
                is_full.set()
                await asyncio.sleep(0.02)

    async with asyncio.TaskGroup() as group:
        for _ in range(120):
            group.create_task(flood())
        await is_full.wait()
        # One after the other and many at once: there is room for each that comes.
        for options in (BULK, URGENT) * 3:
            await manager.sign_data("x509", DIGEST, options)
        await asyncio.gather(*(manager.sign_data("x509", DIGEST, BULK) for _ in range(20)))
        await asyncio.gather(*(manager.sign_data("x509", DIGEST, URGENT) for _ in range(20)))
        is_over.set()
    assert {e.kind for e in refused} == {ErrorKind.RESOURCE_EXHAUSTED}
    assert {e.message for e in refused} == {"signing queue full (64)"}


@pytest.mark.slow
@pytest.mark.asyncio
async def test_fault_48_what_a_slow_token_lets_in_it_signs_in_time(rig: TokenRig) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    limits = Limits(wait_s=10.0)
    async with pooled(manager, limits, Registry(Selection("x"))) as (pool, item):
        rig.faults.set(Fault("C_Sign", sleep_s=0.1))
        # At first nobody knows that it is slow: those for whom it is too slow are told soon.
        first = await outcomes(pool, item, 200)
        assert set(first) == {"SIGNED", "RESOURCE_EXHAUSTED"}
        assert 20 <= first["SIGNED"] <= 100
        # Then it is known, and nothing of what cannot be made in time gets as far as the device.
        calls = rig.faults.calls("C_Sign")
        then = await outcomes(pool, item, 200)
        assert set(then) == {"SIGNED", "RESOURCE_EXHAUSTED"}
        assert 20 <= then["SIGNED"] <= 90
        assert rig.faults.calls("C_Sign") - calls == then["SIGNED"]


@pytest.mark.asyncio
async def test_fault_48_a_token_that_becomes_slow_is_not_taken_for_one_that_hangs_for_long(
    rig: TokenRig,
) -> None:
    manager = await rig.start(sign_timeout="2s")
    await manager.generate_key("a", P256)
    for _ in range(8):
        await asyncio.gather(*(manager.sign_data("a", DIGEST, BULK) for _ in range(16)))
    rig.faults.set(Fault("C_Sign", sleep_s=0.25))

    async def burst(count: int) -> list[SpireHwError]:
        signing = (manager.sign_data("a", DIGEST, BULK) for _ in range(count))
        results = await asyncio.gather(*signing, return_exceptions=True)
        return [result for result in results if isinstance(result, SpireHwError)]

    # A batch that would have been made in no time takes longer than a batch may.
    failed = await burst(64)
    assert ErrorKind.DEADLINE_EXCEEDED in {e.kind for e in failed}
    assert await burst(16) == []


@pytest.mark.asyncio
async def test_fault_48_gauges_show_queue_and_workers(rig: TokenRig) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    registry = Registry(Selection("x"))

    def value(name: str) -> float:
        label = f'hsm="spire_{rig.serial}"'
        lines = encode(registry.read()).decode().splitlines()
        (line,) = [one for one in lines if one.startswith(f"x_hsm_{name}{{{label}}}")]
        return float(line.split()[-1])

    async def shows(name: str, least: float, most: float) -> None:
        async with asyncio.timeout(20):
            while not least <= value(name) <= most:  # noqa: ASYNC110 - told once a second
                await asyncio.sleep(0.05)

    async with pooled(manager, Limits(workers=2), registry) as (pool, item):
        await asyncio.sleep(0)
        assert (value("queue"), value("workers")) == (0, 2)
        rig.faults.set(Fault("C_Sign", sleep_s=0.1))
        burst = asyncio.gather(*(pool.sign(item) for _ in range(60)))
        await shows("queue", 1, 60)
        await burst
        await shows("queue", 0, 0)
    assert (value("queue"), value("workers")) == (0, 0)
