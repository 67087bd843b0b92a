"""The one thread that writes to a database with a single writer."""

from __future__ import annotations

import asyncio
import queue
import threading
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, TypeVar

from spire_hw.aio.worker import run_for, settle_soon
from spire_hw.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spire_hw_server.datastore.sql.group import Made
    from spire_hw_server.datastore.sql.transaction import Transaction

T = TypeVar("T")

_MOST_TOGETHER: Final = 16


@dataclass(frozen=True, slots=True)
class _Job:
    function: Callable[[], Any]
    future: asyncio.Future[Any]
    done: Callable[[Any], None]
    joint: Callable[[Transaction], Any] | None

    @property
    def is_joint(self) -> bool:
        return self.joint is not None


class Writer:
    """Runs functions one after the other; those that piled up meanwhile share a commit.

    A caller that goes away stops its function only while it waits in the queue. A function that
    failed among others, and all of them when their commit failed, run again alone: they may run
    more than once, and so each gets the retries, and the error, it would have got by itself.
    """

    def __init__(
        self,
        name: str,
        together: Callable[[Sequence[Callable[[Transaction], Any]]], list[Made | None]],
    ) -> None:
        """Start the thread.

        Args:
            name: of the thread.
            together: runs several in one transaction, as `run_together` does.
        """
        self._together = together
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def run(
        self,
        function: Callable[[], T],
        done: Callable[[T], None],
        joint: Callable[[Transaction], Any] | None = None,
    ) -> asyncio.Future[T]:
        """Run a function in the thread, and hand what it returned to `done` in the event loop.

        Args:
            function: what runs.
            done: called before the caller goes on, and whether or not it still waits.
            joint: the same in a transaction it shares with others; None where it shares none.

        Raises:
            UnavailableError: the writer was closed.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._closed:
                raise UnavailableError("the datastore is closed")
            self._jobs.put(_Job(function, future, done, joint))
        return future

    def close(self) -> None:
        """Run what waits and end the thread; blocks until then."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _loop(self) -> None:
        is_last = False
        while not is_last:
            waiting = [self._jobs.get()]
            more = min(self._jobs.qsize(), _MOST_TOGETHER - 1)
            waiting += [self._jobs.get() for _ in range(more)]
            jobs = [job for job in waiting if job is not None]
            is_last = len(jobs) < len(waiting)
            for is_joint, group in groupby(jobs, key=lambda job: job.is_joint):
                if is_joint:
                    self._run_together(list(group))
                else:
                    for job in group:
                        run_for(job.function, job.future, job.done)

    def _run_together(self, jobs: list[_Job]) -> None:
        jobs = [job for job in jobs if not job.future.cancelled()]
        made: list[Made | None] = [None] * len(jobs)
        if len(jobs) > 1:
            try:
                made = self._together([job.joint for job in jobs if job.joint is not None])
            except BaseException:  # noqa: BLE001 - nothing is stored; who fails alone is told
                made = [None] * len(jobs)
        for job, one in zip(jobs, made, strict=True):
            if one is not None:
                settle_soon(job.future, one, done=job.done)
        for job, one in zip(jobs, made, strict=True):
            if one is None:
                run_for(job.function, job.future, job.done)
