"""Which process is at the other end of a unix socket, pinned so that a reused pid cannot pass for it.

Says nothing about what the process may do: attestors read it through this object.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import struct
from pathlib import PurePosixPath
from typing import Final

from spire_hw.errors import InvalidInputError, UnavailableError

_CREDENTIALS: Final = struct.Struct("=iII")
_SO_PEERPIDFD: Final = 77
_CLOSED: Final = -1
_STATUS_BYTES: Final = 64 << 10


def peer_credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Return (pid, uid, gid) of the other end as they were when it connected or listened.

    Source: unix(7), SO_PEERCRED.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def is_own_process(connection: socket.socket) -> bool:
    """Tell whether the other end of a private socket is this very process."""
    return peer_credentials(connection)[0] == os.getpid()


class Process:
    """The process that connected, held by a pidfd (implements `CallerProcess`).

    Everything is read through a descriptor of its /proc directory that is opened for the occasion
    and trusted only when the pidfd says afterwards that the process still lives.

    Attributes:
        pid: process id in our pid namespace.
        uid: effective user when it connected.
        gid: effective group when it connected.
    """

    __slots__ = ("_pidfd", "gid", "pid", "uid")

    def __init__(self, connection: socket.socket) -> None:
        """Pin the peer of a connection.

        Raises:
            UnavailableError: it has ended, or lives outside our pid namespace.
        """
        self._pidfd = _CLOSED
        self.pid, self.uid, self.gid = peer_credentials(connection)
        if self.pid <= 0:
            raise UnavailableError(
                "the caller is outside this pid namespace; share the host's pid namespace"
            )
        self._pidfd = _open_pidfd(connection, self.pid)
        if not self.alive():
            self.close()
            raise UnavailableError(f"the caller (pid {self.pid}) has ended")

    @classmethod
    def of(cls, pid: int) -> Process:
        """Pin a process that is known by its number alone; user and group are those it has now.

        That the number still means the same process is for whoever named it to see to.

        Raises:
            UnavailableError: there is no such process, or it ended.
        """
        made = cls.__new__(cls)
        made.pid, made._pidfd = pid, _CLOSED  # noqa: SLF001 - this class's own
        try:
            made._pidfd = os.pidfd_open(pid)  # noqa: SLF001
        except OSError as e:
            raise UnavailableError(f"there is no process {pid}") from e
        try:
            status = made.read_file("status", _STATUS_BYTES)
            made.uid, made.gid = (_effective(status, name) for name in (b"Uid", b"Gid"))
        except UnavailableError:
            made.close()
            raise
        return made

    def alive(self) -> bool:
        """Tell whether it is still the process that connected."""
        if self._pidfd == _CLOSED:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def read_link(self, name: str) -> str:
        """Return the target of a link in its /proc directory, such as `exe`.

        Raises:
            UnavailableError: the process has ended, or we may not read it.
        """
        directory = self._open_directory()
        try:
            target = os.readlink(_checked(name), dir_fd=directory)
        except OSError as e:
            raise self._unreadable(name, e) from e
        finally:
            os.close(directory)
        self._check_alive()
        return target

    def read_file(self, name: str, limit: int) -> bytes:
        """Return at most `limit` bytes of a file in its /proc directory, such as `status`.

        Raises:
            UnavailableError: the process has ended, or we may not read it.
        """
        descriptor = self.open_file(name)
        chunks: list[bytes] = []
        left = limit
        try:
            while left > 0 and (chunk := os.read(descriptor, left)):
                chunks.append(chunk)
                left -= len(chunk)
        except OSError as e:
            raise self._unreadable(name, e) from e
        finally:
            os.close(descriptor)
        self._check_alive()
        return b"".join(chunks)

    def open_file(self, name: str) -> int:
        """Open a file in its /proc directory (`exe` is the program) and return a descriptor.

        Raises:
            UnavailableError: the process has ended, or we may not read it.
        """
        directory = self._open_directory()
        try:
            descriptor = os.open(_checked(name), os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        except OSError as e:
            raise self._unreadable(name, e) from e
        finally:
            os.close(directory)
        try:
            self._check_alive()
        except UnavailableError:
            os.close(descriptor)
            raise
        return descriptor

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the process ends; this object's own."""
        return self._pidfd

    def close(self) -> None:
        """Let go of the process; it counts as ended from now on."""
        if self._pidfd != _CLOSED:
            os.close(self._pidfd)
            self._pidfd = _CLOSED

    def _open_directory(self) -> int:
        self._check_alive()
        try:
            directory = os.open(f"/proc/{self.pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise self._unreadable("", e) from e
        if not self.alive():
            os.close(directory)
            self._check_alive()
        return directory

    def _check_alive(self) -> None:
        if not self.alive():
            raise UnavailableError(f"the caller (pid {self.pid}) has ended")

    def _unreadable(self, name: str, cause: OSError) -> UnavailableError:
        return UnavailableError(f"cannot read /proc/{self.pid}/{name}: {cause.strerror}")


def _effective(status: bytes, name: bytes) -> int:
    """Return the effective id of a line such as `Uid: real effective saved file system`."""
    found = re.search(rb"^%b:\s+\d+\s+(\d+)" % name, status, re.MULTILINE)
    if found is None:
        raise UnavailableError("a status file of /proc is not readable")
    return int(found[1])


def _checked(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise InvalidInputError(f"{name!r} is not a name below a /proc directory")
    return name


def _open_pidfd(connection: socket.socket, pid: int) -> int:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as e:
        if e.errno != errno.ENOPROTOOPT:
            raise UnavailableError(f"the caller (pid {pid}) has ended") from e
    # Before Linux 6.5 a small window stays open between accept and this line.
    try:
        return os.pidfd_open(pid)
    except OSError as e:
        raise UnavailableError(f"the caller (pid {pid}) has ended") from e
