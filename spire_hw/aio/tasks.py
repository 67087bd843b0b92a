"""Named tasks that cannot vanish: the only place that calls create_task."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


class Tasks:
    """A set of background tasks with one owner.

    The first task that fails is remembered and handed to `on_failure`; `close` cancels the rest
    and waits for all of them.
    """

    def __init__(self, on_failure: Callable[[str, BaseException], None]) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_failure = on_failure

    def start(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine in the background under a name."""
        self.spawn(name, coroutine)  # type: ignore[unused-awaitable]  # kept in the set

    def spawn(self, name: str, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine in the background and return its task."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._on_failure(task.get_name(), error)

    async def close(self, patience_s: float | None = None) -> list[str]:
        """Cancel what still runs and wait until it is gone; return the names of what stays.

        Args:
            patience_s: how long to wait for tasks that hold on, None for ever.
        """
        waiting = [t for t in self._tasks if t is not asyncio.current_task()]
        for task in waiting:
            task.cancel()
        if not waiting:
            return []
        _done, left = await asyncio.wait(waiting, timeout=patience_s)
        return [task.get_name() for task in left]
