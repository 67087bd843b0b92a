"""The file an external plugin is started from, checked so that what was checked is what runs.

With a checksum the file is opened once and copied, while it is hashed, into memory that is then
sealed: that copy is executed, at restarts too, whatever happens to the file meanwhile. Without one
the path is executed as it is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from spire_hw.errors import InvalidInputError, NotFoundError, UnavailableError

_CHUNK_BYTES: Final = 1 << 20
_MAX_BYTES: Final = 1 << 29
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_MFD_EXEC: Final = 0x0010  # Linux 6.3


@dataclass(slots=True)
class Program:
    """An external plugin's program; close it when it is not to be started again.

    Attributes:
        path: absolute path of the file.
        image: descriptor of the sealed copy, -1 when there was no checksum to hold it against.
        remark: what an operator should be warned of, "" when there is nothing.
    """

    path: Path
    image: int = -1
    remark: str = ""

    def close(self) -> None:
        """Let go of the copy."""
        if self.image >= 0:
            os.close(self.image)
            self.image = -1


def open_program(command: str, checksum: str) -> Program:
    """Find and check a program.

    Args:
        command: path; a relative one starts at the working directory, PATH is not searched.
        checksum: lower-case hex SHA-256 the file must have, "" for any.

    Raises:
        NotFoundError: no such file.
        InvalidInputError: not a regular file, not executable, another checksum, too large.
        UnavailableError: it cannot be read, or the system runs no programs from memory.
    """
    path = Path(command).absolute()
    try:
        # Non-blocking: opening a FIFO must not wait for a writer.
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as e:
        raise NotFoundError(f"plugin_cmd {path} does not exist") from e
    except OSError as e:
        raise UnavailableError(f"plugin_cmd {path} cannot be opened: {e.strerror}") from e
    try:
        found = os.fstat(source)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidInputError(f"plugin_cmd {path} is not a regular file")
        if not found.st_mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH):
            raise InvalidInputError(f"plugin_cmd {path} is not executable; chmod +x it")
        remark = _remark(path, found.st_mode)
        if not checksum:
            return Program(path, remark=remark or "no plugin_checksum is set")
        return Program(path, _sealed_copy(source, path, checksum), remark)
    finally:
        os.close(source)


def _remark(path: Path, mode: int) -> str:
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others than its owner may write to {path}"
    return ""


def _sealed_copy(source: int, path: Path, checksum: str) -> int:
    try:
        copy = _memory()
    except OSError as e:
        raise UnavailableError(
            f"plugin_cmd {path} cannot be copied into memory to be checked: {e.strerror}; does "
            "sysctl vm.memfd_noexec forbid it?"
        ) from e
    try:
        _check(_copy(source, copy, path), checksum, path)
        os.fchmod(copy, stat.S_IRUSR | stat.S_IXUSR)
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(copy)
        raise
    return copy


def _check(digest: str, checksum: str, path: Path) -> None:
    if not hmac.compare_digest(digest, checksum):
        raise InvalidInputError(
            f"plugin_cmd {path} has checksum {digest}, plugin_checksum says {checksum}; "
            "was the file replaced? It is not started"
        )


def _memory() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("plugin", flags | _MFD_EXEC)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        return os.memfd_create("plugin", flags)


def _copy(source: int, copy: int, path: Path) -> str:
    hashed = hashlib.sha256()
    total = 0
    try:
        while chunk := os.read(source, _CHUNK_BYTES):
            total += len(chunk)
            if total > _MAX_BYTES:
                raise InvalidInputError(f"plugin_cmd {path} is over {_MAX_BYTES >> 20} MiB")
            hashed.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[os.write(copy, view) :]
    except OSError as e:
        raise UnavailableError(f"plugin_cmd {path} cannot be copied: {e.strerror}") from e
    return hashed.hexdigest()
