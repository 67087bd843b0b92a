"""Something read from files that somebody else keeps up to date.

Read at start, where a fault stops the server, and looked at again once a minute while nodes
attest. Files that were spoilt meanwhile change nothing: what was read before stays.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from spire_hw.errors import NotReadyError, SpireHwError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from spire_hw.clock import Clock
    from spire_hw.log import Logger

T = TypeVar("T")
_LOOK_EVERY_S: Final = 60.0
# Of all readings of this process: who is configured anew has read something else.
_numbers = itertools.count(1)

# Path, inode, time of change in nanoseconds, size of every file.
_State = tuple[tuple[str, int, int, int], ...]


class Watched(Generic[T]):
    """A value and the files it comes from."""

    def __init__(
        self, what: str, files: Callable[[], Iterable[Path]], read: Callable[[], T]
    ) -> None:
        """Read it.

        Args:
            what: what it is and where, for messages.
            files: names the files it is read from at this moment.
            read: reads it, in a thread later on.

        Raises:
            NotReadyError: cannot be read.
            InvalidInputError: a file holds something else than it should.
        """
        self._what = what
        self._files = files
        self._read = read
        self._looked_at: float | None = None
        self._state = self._look()
        self._value = self._load()
        self._version = next(_numbers)

    @property
    def value(self) -> T:
        """Return it as it was last read."""
        return self._value

    @property
    def version(self) -> int:
        """Return the number of its last reading, larger than those of all readings before."""
        return self._version

    async def current(self, clock: Clock, log: Logger) -> T:
        """Return it, read again when files have changed since the last look."""
        now = clock.monotonic()
        if self._looked_at is None:
            self._looked_at = now
        if now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now  # whoever comes meanwhile goes on with what there is
            try:
                if await asyncio.to_thread(self._refresh):
                    log.info("Files have changed and were read again", what=self._what)
            except SpireHwError as e:
                log.warning("Cannot read files again; kept what they held", what=self._what, err=e)
        return self._value

    def _refresh(self) -> bool:
        state = self._look()
        if state == self._state:
            return False
        self._value = self._load()
        self._state = state
        self._version = next(_numbers)
        return True

    def _look(self) -> _State:
        try:
            seen = [(file, file.stat()) for file in self._files()]
        except OSError as e:
            raise self._unreadable(e) from e
        return tuple((str(file), s.st_ino, s.st_ctime_ns, s.st_size) for file, s in seen)

    def _load(self) -> T:
        try:
            return self._read()
        except OSError as e:
            raise self._unreadable(e) from e

    def _unreadable(self, e: OSError) -> NotReadyError:
        return NotReadyError(f"{self._what} cannot be read: {e.strerror}")
