"""The thread that writes for the event loop, one thing after the other.

Both wake each other through the kernel alone. The thread of an executor is woken by a lock of the
interpreter, which the loop still needs then, and wakes the loop while it needs it itself: that takes
as long as a fast disk does.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Hand:
    """A thread and the loop it works for; it is started once and closed once.

    Args:
        work: called in the thread with a file and what goes there; it does not raise.
        done: called in the loop with what `work` returned.
    """

    def __init__(self, work: Callable[[str, bytes], str], done: Callable[[str], None]) -> None:
        self._work = work
        self._done = done
        self._job: tuple[str, bytes] | None = None
        self._result = ""
        self._is_busy = False
        self._ended: asyncio.Future[None] | None = None  # set when it is to end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._go = self._back = -1

    def start(self) -> None:
        """Begin to work for the running loop."""
        self._loop = asyncio.get_running_loop()
        self._go = os.eventfd(0, os.EFD_CLOEXEC)
        self._back = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._loop.add_reader(self._back, self._heard)
        # A program that ends without closing the log leaves what a crash leaves, and does not wait.
        threading.Thread(target=self._run, name="audit log", daemon=True).start()

    def take(self, file: str, data: bytes) -> None:
        """Have something written; what was handed over before has been told to be done."""
        self._job = file, data
        self._is_busy = True
        os.eventfd_write(self._go, 1)

    async def close(self) -> None:
        """Let what is under way be done, and end the thread."""
        if self._loop is None:
            return
        self._ended = self._loop.create_future()
        if not self._is_busy:
            os.eventfd_write(self._go, 1)
        await self._ended

    def _run(self) -> None:
        while True:
            os.eventfd_read(self._go)
            job, self._job = self._job, None
            if job is not None:
                self._result = self._work(*job)
            os.eventfd_write(self._back, 1)
            if job is None:
                return

    def _heard(self) -> None:
        os.eventfd_read(self._back)
        if self._is_busy:
            self._is_busy = False
            self._done(self._result)
            if self._ended is not None:
                os.eventfd_write(self._go, 1)
        elif self._loop is not None and self._ended is not None:
            self._loop.remove_reader(self._back)
            os.close(self._go)
            os.close(self._back)
            self._loop = None
            if not self._ended.done():
                self._ended.set_result(None)
