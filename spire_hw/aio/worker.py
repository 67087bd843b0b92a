"""One thread for one device: commands queue up, bounded, each with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Any, Final, TypeVar

from spire_hw.errors import ErrorKind, LimitError, SpireHwError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
_STOP: Final = None


class Worker:
    """Runs functions one at a time in a thread of its own.

    A call past its deadline fails for its caller; when it had not started it never runs.
    """

    def __init__(self, name: str, *, queue_size: int = 256) -> None:
        self.name = name
        self._queue: queue.Queue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = (
            queue.Queue(queue_size)
        )
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[], T], *, timeout_s: float = 30.0) -> T:
        """Run a function in the worker's thread and return its result.

        Raises:
            LimitError: the queue is full.
            UnavailableError: the worker was closed.
            SpireHwError: DEADLINE_EXCEEDED after timeout_s seconds.
        """
        if self._closed:
            raise UnavailableError(f"{self.name} is closed")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((function, future))
        except queue.Full:
            raise LimitError(f"{self.name} is busy: its queue is full") from None
        try:
            # Not asyncio.timeout: in a task that was cancelled, and is tidying up, Python 3.11.2
            # makes another cancellation of it.
            await asyncio.wait({future}, timeout=timeout_s)
        finally:
            future.cancel()
        if future.cancelled():
            raise SpireHwError(
                f"{self.name} did not answer within {timeout_s:g} s",
                kind=ErrorKind.DEADLINE_EXCEEDED,
            )
        return future.result()

    def _loop(self) -> None:
        while (item := self._queue.get()) is not _STOP:
            run_for(*item)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Finish what is queued and end the thread; one that hangs is left behind.

        Args:
            timeout_s: how long to wait for it.
        """
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(queue.Full):  # behind a job that hangs; nothing will run any more
            await asyncio.to_thread(self._queue.put, _STOP, timeout=timeout_s)
            await asyncio.to_thread(self._thread.join, timeout_s)


def run_for(
    function: Callable[[], T],
    future: asyncio.Future[T],
    done: Callable[[T], None] | None = None,
) -> None:
    """Run a function in this thread and settle a future in the event loop it belongs to.

    Args:
        function: what runs, unless its caller went away before.
        future: what the caller waits for.
        done: called in the event loop with what the function returned, before the caller goes on
            and whether or not it still waits.
    """
    if future.cancelled():
        return
    result: Any = None
    error: BaseException | None = None
    try:
        result = function()
    except BaseException as e:  # noqa: BLE001 - handed to the caller as it is
        error = e
    settle_soon(future, result, error, done)


def settle_soon(
    future: asyncio.Future[T],
    result: T,
    error: BaseException | None = None,
    done: Callable[[T], None] | None = None,
) -> None:
    """Settle a future in the event loop it belongs to, from another thread.

    Args:
        future: what a caller waits for, or no longer.
        result: what it waits for, unless there is an error.
        error: what it gets instead.
        done: called with the result first, whether or not the caller still waits.
    """
    with contextlib.suppress(RuntimeError):  # the caller's loop is gone, nobody waits
        future.get_loop().call_soon_threadsafe(_settle, future, result, error, done)


def _settle(
    future: asyncio.Future[Any],
    result: Any,
    error: BaseException | None,
    done: Callable[[Any], None] | None,
) -> None:
    if error is None and done is not None:
        done(result)
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
