"""The hand that writes a log: lines that came together go to the disk in one go.

A batch is the same to the byte however often it has to be tried: its lines have their place in the
chain already. While one is being written, those that come gather in the next.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import UnavailableError
from spire_hw_signer.audit.chain import LogHead
from spire_hw_signer.audit.folder import ForeignHandError, reason_of
from spire_hw_signer.audit.hand import Hand

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
        waiting: whoever waits: settled with "" once they are on the disk, or with the reason why
            they are not.
        closed: they are being written.
    """

    file: str
    head: LogHead = field(default_factory=LogHead)
    data: bytearray = field(default_factory=bytearray)
    waiting: list[asyncio.Future[str]] = field(default_factory=list)
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
        self._is_started = self._is_writing = self._is_due = False
        self._is_calm = True  # for the last that was written one caller waited
        self._flush: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = None
        self._begun_at = 0.0
        self._hand = Hand(self._write, self._wrote)
        self._tasks = Tasks(self._ended)

    @property
    def is_open(self) -> bool:
        """Tell whether lines that are added are written, now or once the disk takes them."""
        return self._is_started

    def start(self) -> None:
        """Begin to write."""
        self._hand.start()
        self._is_started = True

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
            self._flush = asyncio.get_running_loop().call_later(_FLUSH_S, self._begin)

    async def write(self) -> None:
        """Write what was added; it is on the disk once this returns.

        Raises:
            UnavailableError: it is not yet.
        """
        written = self.written()
        if written is not None and (reason := await written):
            raise self.unavailable(reason)

    def written(self) -> asyncio.Future[str] | None:
        """Have what was added written now.

        Returns:
            What is settled with "" once it is on the disk, or with the reason why it is not yet;
            None when there is nothing to write.
        """
        if not self._batches:
            return None
        loop = asyncio.get_running_loop()
        told: asyncio.Future[str] = loop.create_future()
        self._batches[-1].waiting.append(told)
        if self._is_writing or self._is_due:
            return told
        if self._is_calm:
            self._begin()
        else:  # others of this turn of the loop come along
            self._is_due = True
            loop.call_soon(self._begin)
        return told

    def has_room(self, file: str, size: int) -> bool:
        """Tell whether a file takes so many bytes more even if its disk becomes full meanwhile."""
        folder = self._folder
        needed = self.waiting_bytes + size
        return not self.trouble and folder.name == file and needed <= folder.room

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
        self._is_started = False
        for timer in (self._flush, self._late):
            if timer is not None:
                timer.cancel()
        await self._tasks.close()
        await self._hand.close()
        await asyncio.to_thread(self._folder.release)

    def _begin(self) -> None:
        """Have the first batch written, unless one is already.

        From here to `_wrote` there is one change of threads each way and nothing else: every signature
        waits for it.
        """
        self._is_due = False
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        if self._is_writing or not self._is_started or not self._batches:
            return
        batch = self._batches[0]
        batch.closed = self._is_writing = True
        self._is_calm = len(batch.waiting) <= 1
        loop = asyncio.get_running_loop()
        self._begun_at = loop.time()
        if self._late is None:
            self._late = loop.call_later(_COMMIT_S, self._look)
        self._hand.take(batch.file, bytes(batch.data))

    def _look(self) -> None:
        """See whether a write takes too long; one timer serves them all."""
        self._late = None
        if not self._is_writing or self.trouble:
            return
        loop = asyncio.get_running_loop()
        due = self._begun_at + _COMMIT_S
        if loop.time() < due:
            self._late = loop.call_at(due, self._look)
        else:
            self._fail(f"the disk does not answer within {_COMMIT_S:g} s")

    def _write(self, file: str, data: bytes) -> str:
        """Write lines, in the log's thread; return why that failed, "" when it did not."""
        try:
            self._folder.append(file, data)
        except (OSError, ForeignHandError) as e:
            return reason_of(e)
        except Exception as e:  # noqa: BLE001 - it is told, and nothing is signed
            return f"its writer failed: {type(e).__name__}"
        return ""

    def _wrote(self, reason: str) -> None:
        """Tell those who wait what became of the first batch, and go on."""
        if reason:
            self._fail(reason)
            self._tasks.start("audit log", self._again_soon())
            return
        self._is_writing = False
        self._written(self._batches.pop(0))
        self._begin()

    async def _again_soon(self) -> None:
        await self._clock.sleep(_RETRY_S)
        self._is_writing = False
        self._begin()

    def _fail(self, reason: str) -> None:
        if reason != self.trouble:
            self._log.error("Audit log unavailable: nothing is signed", error=reason)
        self.trouble = reason
        for batch in self._batches:
            _tell(batch, reason)

    def _written(self, batch: Batch) -> None:
        self.durable = batch.head
        self.waiting_bytes -= len(batch.data)
        _tell(batch, "")
        if self.trouble and not self._batches:
            trouble, self.trouble = self.trouble, ""
            self._again(trouble)

    def _ended(self, name: str, error: BaseException) -> None:
        self._log.error("Audit log writer failed", task=name, exc_info=error)
        self._fail(f"its writer failed: {type(error).__name__}")


def _tell(batch: Batch, reason: str) -> None:
    """Tell those who still wait for a batch."""
    waiting, batch.waiting = batch.waiting, []
    for told in waiting:
        if not told.done():
            told.set_result(reason)
