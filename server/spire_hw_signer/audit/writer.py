"""The hand that writes a log: lines that came together go to the disk in one go.

A batch is the same to the byte however often it has to be tried: its lines have their place in the
chain already. While one is being written, those that come gather in the next.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import UnavailableError
from spire_hw_signer.audit.chain import LogHead
from spire_hw_signer.audit.folder import ForeignHandError, reason_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw_signer.audit.folder import Folder

_FLUSH_S: Final = 0.02
_RETRY_S: Final = 1.0
_COMMIT_S: Final = 10.0
_MAX_BATCH: Final = 4 * 1024 * 1024


@dataclass(slots=True)
class Batch:
    """Lines that are written in one go.

    Attributes:
        file: the file they go to.
        head: the end of the log with them.
        data: the lines.
        done: settled with "" once they are on the disk, or with the reason why they are not.
        closed: they are being written.
    """

    file: str
    head: LogHead = field(default_factory=LogHead)
    data: bytearray = field(default_factory=bytearray)
    done: asyncio.Future[str] | None = None
    closed: bool = False


class Writer:
    """Writes the lines of one log, in order, from one thread.

    Args:
        folder: where to.
        clock: time between tries.
        log: where trouble with the disk is told.
        again: called when the disk takes lines again, with the reason why it did not.
    """

    def __init__(
        self, folder: Folder, *, clock: Clock, log: Logger, again: Callable[[str], None]
    ) -> None:
        self.durable = LogHead()
        self.trouble = ""
        self.waiting_bytes = 0
        self._folder = folder
        self._clock = clock
        self._log = log
        self._again = again
        self._batches: list[Batch] = []
        self._more = asyncio.Event()
        self._flush: asyncio.TimerHandle | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="audit log")
        self._tasks = Tasks(self._ended)

    def start(self) -> None:
        """Begin to write."""
        self._tasks.start("audit log", self._run())

    def add(self, file: str, line: bytes, head: LogHead) -> None:
        """Take a line.

        Args:
            file: name of the file it goes to.
            line: without its line feed.
            head: the end of the log with it.
        """
        last = self._batches[-1] if self._batches else None
        if last is None or last.closed or last.file != file or len(last.data) > _MAX_BATCH:
            last = Batch(file)
            self._batches.append(last)
        last.data += line
        last.data += b"\n"
        last.head = head
        self.waiting_bytes += len(line) + 1

    def write_soon(self) -> None:
        """Write what was added in a moment, unless somebody waits for it first."""
        if self._flush is None and self._batches:
            self._flush = asyncio.get_running_loop().call_later(_FLUSH_S, self._more.set)

    async def write(self) -> None:
        """Write what was added; it is on the disk once this returns.

        Raises:
            UnavailableError: it is not yet.
        """
        if not self._batches:
            return
        batch = self._batches[-1]
        if batch.done is None:
            batch.done = asyncio.get_running_loop().create_future()
        self._more.set()
        reason = await asyncio.shield(batch.done)
        if reason:
            raise self.unavailable(reason)

    def unavailable(self, reason: str) -> UnavailableError:
        """Return the error of whoever needs the log while it cannot be written."""
        return UnavailableError(f"audit log unavailable: {reason}")

    async def close(self) -> None:
        """Write what waits, as far as the disk takes it, and let go of the files."""
        try:
            if not self.trouble:
                await self.write()
        except UnavailableError as e:
            self._log.error("Audit log lacks its last records", error=e.message)
        self.trouble = "it is closed"
        if self._flush is not None:
            self._flush.cancel()
        await self._tasks.close()
        await asyncio.get_running_loop().run_in_executor(self.thread, self._folder.release)
        self.thread.shutdown(wait=False)

    async def _run(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            if self._flush is not None:
                self._flush.cancel()
                self._flush = None
            while self._batches:
                if await self._commit(self._batches[0]):
                    self._written(self._batches.pop(0))
                else:
                    await self._clock.sleep(_RETRY_S)

    async def _commit(self, batch: Batch) -> bool:
        """Write a batch; tell those who wait when that fails or takes too long."""
        batch.closed = True
        data = bytes(batch.data)
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self.thread, self._folder.append, batch.file, data)
        if not (await asyncio.wait({future}, timeout=_COMMIT_S))[0]:
            self._fail(f"the disk does not answer within {_COMMIT_S:g} s")
        try:
            await future
        except (OSError, ForeignHandError) as e:
            self._fail(reason_of(e))
            return False
        return True

    def _fail(self, reason: str) -> None:
        if reason != self.trouble:
            self._log.error("Audit log unavailable: nothing is signed", error=reason)
        self.trouble = reason
        for batch in self._batches:
            if batch.done is not None:
                batch.done.set_result(reason)
                batch.done = None

    def _written(self, batch: Batch) -> None:
        self.durable = batch.head
        self.waiting_bytes -= len(batch.data)
        if batch.done is not None:
            batch.done.set_result("")
        if self.trouble and not self._batches:
            trouble, self.trouble = self.trouble, ""
            self._again(trouble)

    def _ended(self, name: str, error: BaseException) -> None:
        self._log.error("Audit log writer ended", task=name, exc_info=error)
        self._fail(f"its writer ended: {type(error).__name__}")
