"""Revocation lists in files that somebody else keeps up to date.

Read at start, where a fault stops the server, and looked at again once a minute while nodes
attest. A file that was spoilt meanwhile changes nothing: the lists that were read stay, until their
own time runs out.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError, NotReadyError, SpireHwError
from spire_hw.files import parse_file
from spire_hw.tpm.crl import MAX_CRL_BYTES, Revocations, parse_crl, split_crls

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.tpm.crl import Crl

_SUFFIXES: Final = frozenset({".crl", ".pem", ".der"})
_MAX_FILES: Final = 256
_LOOK_EVERY_S: Final = 60.0

# Name, time of change in nanoseconds, size of every file.
_State = tuple[tuple[str, int, int], ...]


class CrlFiles:
    """The lists of a file, or of a directory of files named .crl, .pem or .der."""

    def __init__(self, path: Path, *, required: bool) -> None:
        """Read the lists.

        Args:
            path: the file or directory.
            required: every certificate below a root needs a list that counts.

        Raises:
            NotReadyError: cannot be read.
            InvalidInputError: a file holds something other than revocation lists.
        """
        self._path = path
        self._required = required
        self._state = self._look()
        self._read_at: float | None = None
        self._current = Revocations(self._read(), required=required)

    @property
    def revocations(self) -> Revocations:
        """Return the lists as they were last read."""
        return self._current

    async def current(self, clock: Clock, log: Logger) -> Revocations:
        """Return the lists, read again when files have changed since the last look."""
        now = clock.monotonic()
        if self._read_at is None:
            self._read_at = now
        if now - self._read_at >= _LOOK_EVERY_S:
            self._read_at = now  # whoever comes meanwhile goes on with the lists there are
            try:
                await asyncio.to_thread(self._refresh)
            except SpireHwError as e:
                log.warning("Cannot read revocation lists again; kept those there are", err=e)
        return self._current

    def _refresh(self) -> None:
        state = self._look()
        if state != self._state:
            self._current = Revocations(self._read(), required=self._required)
            self._state = state

    def _files(self) -> list[Path]:
        if not self._path.is_dir():
            return [self._path]
        found = [name for name in sorted(self._path.iterdir()) if name.suffix.lower() in _SUFFIXES]
        if len(found) > _MAX_FILES:
            raise InvalidInputError(f"{self._path}: more than {_MAX_FILES} revocation lists")
        return found

    def _look(self) -> _State:
        try:
            seen = [(file, file.stat()) for file in self._files()]
        except OSError as e:
            raise self._unreadable(e) from e
        return tuple((file.name, stat.st_mtime_ns, stat.st_size) for file, stat in seen)

    def _read(self) -> list[Crl]:
        try:
            return [crl for file in self._files() for crl in _read_file(file)]
        except OSError as e:
            raise self._unreadable(e) from e

    def _unreadable(self, e: OSError) -> NotReadyError:
        return NotReadyError(f"cannot read revocation lists at {self._path}: {e.strerror}")


def _read_file(path: Path) -> list[Crl]:
    def parse(blob: bytes) -> list[Crl]:
        return [parse_crl(one) for one in split_crls(blob)]

    return parse_file(path, 2 * MAX_CRL_BYTES, parse)
