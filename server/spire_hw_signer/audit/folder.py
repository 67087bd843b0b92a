"""The files of an audit log: one writer, records only ever added, on the disk before it is said so.

Blocking; everything here runs in the log's own thread, others only read `name` and `room`. A write
that failed is cut off again before the next one, so that a file holds whole batches and nothing else.
What somebody else changes in the file that is being written is noticed at the next write. Where the
file system can, room for the records to come is taken ahead.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

from spire_hw.errors import NotReadyError, UnavailableError
from spire_hw_signer.audit.record import MAX_LINE_BYTES, is_file_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LOCK: Final = "lock"
_PIECE: Final = 1024 * 1024
_AHEAD: Final = 1024 * 1024
_KEEP_SIZE: Final = 1  # FALLOC_FL_KEEP_SIZE of fallocate(2)

_fallocate: Final = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class ForeignHandError(NotReadyError):
    """Somebody else changed the file that is being written."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file.

    Attributes:
        offset: of its first byte.
        text: without the line feed.
        whole: it ended with a line feed.
    """

    offset: int
    text: bytes
    whole: bool

    @property
    def size(self) -> int:
        """Return its bytes in the file."""
        return len(self.text) + self.whole


class Folder:
    """The directory of one log, held by one process at a time.

    Args:
        path: the directory; made with mode 0700 when it is not there.

    Attributes:
        name: of the file that is being written.
        size: of its records.
        room: bytes that the file system has set aside for more of them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = ""
        self.size = 0
        self.room = 0
        self._lock = -1
        self._file = -1
        self._torn = False  # something after `size` has to be cut off first
        self._named = True  # the name of the file is on the disk

    def hold(self) -> None:
        """Make the directory when it is missing, and be its only writer.

        Raises:
            NotReadyError: it cannot be used.
            UnavailableError: another process has it.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise NotReadyError(
                    f"audit log directory {self.path} has to belong to user id {os.geteuid()}"
                    f" alone: chown it, and chmod 0700 {self.path}"
                )
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock = os.open(self.path / _LOCK, flags, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self.release()
            raise UnavailableError(
                f"audit log {self.path} is in use by another process; a log has one writer"
            ) from e
        except OSError as e:
            self.release()
            raise NotReadyError(
                f"audit log directory {self.path} cannot be used: {e.strerror}"
            ) from e

    def release(self) -> None:
        """Let go of everything."""
        if self._file >= 0:
            self._give_back()
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    def names(self) -> list[str]:
        """Return the names of the log's files, oldest first.

        Raises:
            NotReadyError: the directory cannot be read.
        """
        return file_names(self.path)

    def resume(self, name: str, size: int) -> None:
        """Go on in a file.

        Args:
            name: the newest one.
            size: how much of it is whole; the rest is cut off before the next write.

        Raises:
            NotReadyError: it cannot be opened.
        """
        try:
            # It was closed already where the file after it was given up.
            (self.path / name).chmod(0o600)
            self._file = self._open(name, 0)
            self.name, self.size, self._named = name, size, False
            self._torn = os.fstat(self._file).st_size != size
        except OSError as e:
            raise NotReadyError(f"{self.path / name} cannot be opened: {e.strerror}") from e

    def append(self, name: str, data: bytes) -> None:
        """Add to the log; it is on the disk once this returns.

        Args:
            name: the file; a new one is made when it is not the one that is being written.
            data: whole lines.

        Raises:
            OSError: that is not possible now; nothing was added, and it may be tried again.
            ForeignHandError: the file is not as it was left.
        """
        if name != self.name:
            self._begin(name)
        if not self._named:
            sync_directory(self.path)
            self._named = True
        self._check()
        self._torn = True
        view = memoryview(data)
        while view:
            written = os.write(self._file, view)
            if not written:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            view = view[written:]
        self.size += len(data)
        self._torn = False
        self.room -= min(self.room, len(data))
        if self.room < _AHEAD // 2:
            self._set_aside()

    def _set_aside(self) -> None:
        """Have room for records to come, where the disk has it and its file system can."""
        if _fallocate(self._file, _KEEP_SIZE, self.size, _AHEAD) == 0:
            self.room = _AHEAD

    def _give_back(self) -> None:
        """Let go of room that is not needed any more; without it the file takes more of the disk."""
        if self.room and not self._torn:
            self.room = 0
            with suppress(OSError):
                # What somebody else added is for `log verify` to find.
                if os.fstat(self._file).st_size == self.size:
                    os.ftruncate(self._file, self.size)

    def _begin(self, name: str) -> None:
        made = self._open(name, os.O_CREAT | os.O_EXCL)
        if self._file >= 0:
            self._give_back()
        before, self._file, self.room = self._file, made, 0
        self.name, self.size, self._torn, self._named = name, 0, False, False
        if before >= 0:
            # Nobody writes it any more. On file systems without modes it stays as it is.
            with suppress(OSError):
                os.fchmod(before, 0o400)
            os.close(before)

    def _check(self) -> None:
        found = os.fstat(self._file)
        if self._torn and found.st_size >= self.size:
            self.room = 0  # what was set aside goes with what is cut off
            os.ftruncate(self._file, self.size)
            os.fsync(self._file)
        elif found.st_size != self.size:
            raise ForeignHandError(
                f"{self.path / self.name} has {found.st_size} bytes, {self.size} were written:"
                " somebody changed it; run `spire-hw-signer log verify` and restart the signer"
            )
        if not found.st_nlink:
            raise ForeignHandError(
                f"{self.path / self.name} was deleted while it was written; restart the signer"
            )

    def _open(self, name: str, extra: int) -> int:
        # With O_DSYNC one call writes and waits for the disk, so the thread asks for Python's lock
        # once a batch.
        flags = os.O_WRONLY | os.O_APPEND | os.O_DSYNC | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self.path / name, flags | extra, 0o600)


def file_names(path: Path) -> list[str]:
    """Return the names of a log's files, oldest first.

    Raises:
        NotReadyError: the directory cannot be read.
    """
    try:
        return sorted(one.name for one in path.iterdir() if is_file_name(one.name))
    except OSError as e:
        raise NotReadyError(f"audit log directory {path} cannot be read: {e.strerror}") from e


def read_lines(path: Path) -> Iterator[Line]:
    """Return the lines of a file; one that is too long for a record comes cut off and not whole.

    Raises:
        NotReadyError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            yield from _lines(stream)
    except OSError as e:
        raise NotReadyError(f"{path} cannot be read: {e.strerror}") from e


def _lines(stream: BinaryIO) -> Iterator[Line]:
    offset = 0
    while text := stream.readline(MAX_LINE_BYTES + 1):
        whole = text.endswith(b"\n")
        yield Line(offset, text.removesuffix(b"\n"), whole)
        offset += len(text)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, lower-case hexadecimal.

    Raises:
        NotReadyError: it cannot be read.
    """
    made = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while piece := stream.read(_PIECE):
                made.update(piece)
    except OSError as e:
        raise NotReadyError(f"{path} cannot be read: {e.strerror}") from e
    return made.hexdigest()


def sync_directory(path: Path) -> None:
    """Make sure that names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason_of(error: OSError | NotReadyError | UnavailableError) -> str:
    """Return in words why a log cannot be written."""
    if not isinstance(error, OSError):
        return error.message
    remedies = {
        errno.ENOSPC: "; make room on its file system",
        errno.EDQUOT: "; raise the quota of its user",
        errno.EROFS: "; mount its file system for writing",
        errno.EFBIG: "; raise the limit of the file size (ulimit -f)",
    }
    return f"{error.strerror or error}{remedies.get(error.errno or 0, '')}"
