"""Other places that get the checkpoints: a file on another mount, a syslog receiver.

A place that is away holds nothing up: checkpoints wait for it, the oldest go when there are too
many, and the last ones tell as much as all.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from spire_hw.aio.backoff import Backoff
from spire_hw.errors import EncodingError, NotReadyError, UnavailableError
from spire_hw.syslog import INFORMATIONAL, Message, send
from spire_hw_signer.audit.folder import read_lines
from spire_hw_signer.audit.record import Kind, parse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.syslog import SyslogSettings

MAX_WAITING: Final = 1000
_FIRST_S: Final = 1.0
_CAP_S: Final = 60.0


class Place(ABC):
    """One other place.

    Args:
        name: for operators.
        clock: time between tries.
        log: where trouble is told.
    """

    def __init__(self, name: str, *, clock: Clock, log: Logger) -> None:
        self.name = name
        self._clock = clock
        self._log = log
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._more = asyncio.Event()
        self._trouble = ""

    @property
    def trouble(self) -> str:
        """Return why checkpoints do not get there, "" while they do."""
        return self._trouble

    def push(self, line: bytes) -> None:
        """Send a checkpoint record's line, soon."""
        self._waiting.append(line)
        self._more.set()

    async def run(self) -> None:
        """Send; ends only when cancelled."""
        backoff = Backoff(_FIRST_S, _CAP_S)
        while True:
            await self._more.wait()
            try:
                await self.flush()
            except UnavailableError as e:
                if e.message != self._trouble:
                    self._log.error("Checkpoint not sent", place=self.name, error=e.message)
                self._trouble = e.message
                await self._clock.sleep(backoff.next_s())
            else:
                self._trouble = ""
                backoff.reset()

    async def flush(self) -> None:
        """Send what waits.

        Raises:
            UnavailableError: it cannot be sent now; it waits.
        """
        while self._waiting:
            line = self._waiting[0]
            await self._send(line)
            if self._waiting and self._waiting[0] is line:
                self._waiting.popleft()
        self._more.clear()

    @abstractmethod
    async def _send(self, line: bytes) -> None: ...

    async def last(self) -> Mapping[str, Any] | None:
        """Return the members of the last checkpoint that is there, None when it cannot be asked.

        Raises:
            NotReadyError: it should be there and cannot be read.
        """
        return None


class FilePlace(Place):
    """A file, on another mount than the log."""

    def __init__(self, path: Path, *, clock: Clock, log: Logger) -> None:
        super().__init__(str(path), clock=clock, log=log)
        self._path = path

    @override
    async def _send(self, line: bytes) -> None:
        try:
            await asyncio.to_thread(self._append, line)
        except OSError as e:
            raise UnavailableError(f"{self._path} cannot be written: {e.strerror}") from e

    def _append(self, line: bytes) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_DSYNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            # What was torn off by a crash stays, on a line of its own.
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            data = b"\n" + line + b"\n" if torn else line + b"\n"
            if os.write(descriptor, data) != len(data):
                os.ftruncate(descriptor, size)
                raise OSError(0, "no room for a whole line")
        finally:
            os.close(descriptor)

    @override
    async def last(self) -> Mapping[str, Any] | None:
        return await asyncio.to_thread(self._read_last)

    def _read_last(self) -> Mapping[str, Any] | None:
        if not self._path.exists():
            return None
        found = None
        for line in read_lines(self._path):
            if line.whole:
                found = line.text
        if found is None:
            return None
        try:
            record = parse(found)
        except EncodingError as e:
            raise NotReadyError(f"{self._path}: its last line: {e.message}") from e
        if record.kind is not Kind.CHECKPOINT:
            raise NotReadyError(f"{self._path}: its last line is no checkpoint")
        return record.body


class SyslogPlace(Place):
    """A syslog receiver; it cannot be asked what it has."""

    def __init__(self, settings: SyslogSettings, *, clock: Clock, log: Logger) -> None:
        super().__init__(f"syslog {settings.path or settings.host}", clock=clock, log=log)
        self._settings = settings

    @override
    async def _send(self, line: bytes) -> None:
        time = parse(line).time
        text = line.decode("ascii")
        message = Message("spire-hw-signer", "audit-checkpoint", INFORMATIONAL, time, text)
        await send(self._settings, message)
