from __future__ import annotations

import asyncio

import pytest

from spire_hw.pkcs11.pool.breaker import Breaker


async def is_held(breaker: Breaker, name: str) -> bool:
    """Tell whether a worker would have to wait, by asking."""
    try:
        async with asyncio.timeout(0.02):
            await breaker.permit(name)
    except TimeoutError:
        return True
    return False


@pytest.mark.asyncio
async def test_a_closed_one_holds_nobody() -> None:
    breaker = Breaker(30.0)
    assert not breaker.is_open
    assert not breaker.must_wait("a")
    assert not await is_held(breaker, "a")


@pytest.mark.asyncio
async def test_one_worker_tries_at_once_and_then_waits_with_the_others() -> None:
    breaker = Breaker(30.0)
    breaker.failed("a")
    assert breaker.is_open
    assert not await is_held(breaker, "a")
    assert await is_held(breaker, "b")
    breaker.failed("b")
    assert breaker.must_wait("b")
    assert not breaker.must_wait("a")
    breaker.failed("a")
    assert breaker.must_wait("a")
    assert await is_held(breaker, "a")


@pytest.mark.asyncio
async def test_the_next_try_comes_after_the_pause() -> None:
    breaker = Breaker(0.05)
    breaker.failed("a")
    await breaker.permit("a")
    breaker.failed("a")
    start = asyncio.get_running_loop().time()
    await breaker.permit("a")
    assert asyncio.get_running_loop().time() - start >= 0.05


@pytest.mark.asyncio
async def test_a_signature_lets_everybody_go_on() -> None:
    breaker = Breaker(30.0)
    breaker.failed("a")
    await breaker.permit("a")
    breaker.failed("a")
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        waiting = [group.create_task(breaker.permit(name)) for name in ("a", "b", "c")]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        breaker.signed()
    assert not breaker.is_open
    breaker.signed()
    assert not breaker.is_open
