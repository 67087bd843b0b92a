from __future__ import annotations

import asyncio
import threading

import pytest

from spire_hw.aio.worker import Worker
from spire_hw.errors import ErrorKind, LimitError, SpireHwError, UnavailableError

pytestmark = pytest.mark.asyncio


async def test_jobs_run_one_at_a_time_in_order() -> None:
    worker, seen = Worker("device"), list[int]()
    await asyncio.gather(*(worker.run(lambda n=n: seen.append(n)) for n in range(20)))  # type: ignore[misc]
    await worker.close()
    assert seen == list(range(20))
    with pytest.raises(UnavailableError, match="device is closed"):
        await worker.run(lambda: None)


async def test_a_worker_whose_job_hangs_refuses_more_and_can_be_left_behind() -> None:
    worker, started, go = Worker("device", queue_size=1), threading.Event(), threading.Event()

    def hang() -> None:
        started.set()
        go.wait()

    with pytest.raises(SpireHwError) as caught:
        await worker.run(hang, timeout_s=0.05)
    assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
    await asyncio.to_thread(started.wait)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(_refusal(worker))
        await asyncio.sleep(0)
        with pytest.raises(LimitError, match="queue is full"):
            await worker.run(lambda: None)
        await worker.close(0.0)
        assert await waiting is ErrorKind.DEADLINE_EXCEEDED
    go.set()


async def _refusal(worker: Worker) -> ErrorKind:
    with pytest.raises(SpireHwError) as caught:
        await worker.run(lambda: None, timeout_s=0.2)
    return caught.value.kind


async def test_a_deadline_is_one_in_a_task_that_tidies_up_after_its_cancellation() -> None:
    worker, started, go = Worker("device"), threading.Event(), threading.Event()
    ends: list[ErrorKind] = []

    def hang() -> None:
        started.set()
        go.wait()

    async def work() -> None:
        try:
            await worker.run(hang)
        finally:
            ends.append(await _refusal(worker))

    async with asyncio.TaskGroup() as group:
        task = group.create_task(work())
        await asyncio.to_thread(started.wait)
        task.cancel()
    assert ends == [ErrorKind.DEADLINE_EXCEEDED]
    go.set()
    await worker.close()
