"""The one thread that writes to a database with a single writer."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from spire_hw.aio.worker import run_for
from spire_hw.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
_Job = tuple["Callable[[], Any]", "asyncio.Future[Any]", "Callable[[Any], None]"]


class Writer:
    """Runs functions one after the other; an event loop is woken once for each.

    A caller that goes away stops its function only while it waits in the queue.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def run(self, function: Callable[[], T], done: Callable[[T], None]) -> asyncio.Future[T]:
        """Run a function in the thread, and hand what it returned to `done` in the event loop.

        Args:
            function: what runs.
            done: called before the caller goes on, and whether or not it still waits.

        Raises:
            UnavailableError: the writer was closed.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._closed:
                raise UnavailableError("the datastore is closed")
            self._jobs.put((function, future, done))
        return future

    def close(self) -> None:
        """Run what waits and end the thread; blocks until then."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            run_for(*job)
