from __future__ import annotations

import asyncio

import pytest

from spire_hw.aio.watch import Watch

pytestmark = pytest.mark.asyncio


async def test_every_reader_sees_a_change() -> None:
    watch = Watch(0)
    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(watch.wait(0)) for _ in range(3)]
        await asyncio.sleep(0)
        watch.set(1)
        watch.set(2)
    assert [reader.result() for reader in readers] == [(2, 2)] * 3
    assert await watch.wait(1) == (2, 2)


async def test_a_reader_that_goes_away_disturbs_nobody_and_leaves_nothing() -> None:
    watch = Watch("a")
    async with asyncio.TaskGroup() as group:
        gone, late, stays = (group.create_task(watch.wait(0)) for _ in range(3))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        assert len(watch._waiting) == 2
        late.cancel()  # in the same turn as the change
        watch.set("b")
    assert stays.result() == ("b", 1)
    assert gone.cancelled()
    assert late.cancelled()
    assert not watch._waiting


async def test_a_loop_over_it_skips_what_was_replaced() -> None:
    watch = Watch(1)
    seen = []
    async for value in watch:
        seen.append(value)
        if value == 4:
            break
        watch.set(value + 1)
        watch.set(value * 2)
    assert seen == [1, 2, 4]
