"""Directories for the sockets and temporary files of external plugins, gone when they are.

One directory for each process of ours, open to its user alone, held by a lock as long as the
process lives; below it one for each run of a plugin. What a process that was killed left behind is
recognised by its free lock and removed by the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from spire_hw.errors import UnavailableError

_PREFIX: Final = "spire-hw-plugins-"
_LOCK: Final = "lock"


@dataclass(slots=True)
class Place:
    """The directory of this process; close it when all plugins are gone."""

    path: Path
    _lock: int

    @classmethod
    def open(cls, parent: str = "") -> Place:
        """Make the directory, after clearing away those of processes that were killed.

        Args:
            parent: where; the temporary directory without it.

        Raises:
            UnavailableError: that directory cannot be written.
        """
        parent = parent or tempfile.gettempdir()
        try:
            _clear_stale(Path(parent))
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UnavailableError(
                f"no directory for plugins can be made in {parent}: {e.strerror}; "
                "set TMPDIR to another one"
            ) from e
        return cls(path, lock)

    def make(self) -> Path:
        """Make a directory for one run of a plugin.

        Raises:
            UnavailableError: no room.
        """
        try:
            return Path(tempfile.mkdtemp(prefix="", dir=self.path))
        except OSError as e:
            raise UnavailableError(f"no directory can be made in {self.path}: {e.strerror}") from e

    def close(self) -> None:
        """Remove everything."""
        remove(self.path)
        os.close(self._lock)


def remove(directory: Path) -> None:
    """Remove a directory with whatever a plugin has put into it; links are not followed."""
    shutil.rmtree(directory, ignore_errors=True)


def _clear_stale(parent: Path) -> None:
    for found in parent.glob(f"{_PREFIX}*"):
        try:
            status = found.stat(follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            lock = os.open(found / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # being made or removed by its owner
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its owner lives
        else:
            remove(found)
        finally:
            os.close(lock)
