"""A unix socket whose callers are known by process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Final

from typing_extensions import override

from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw.hardening import check_directory
from spire_hw.log import Logger, get_logger
from spire_hw.transport.front import Front, FrontLimits, Lease
from spire_hw.transport.half import PREFACE, Half
from spire_hw.transport.peer import UnixPeer
from spire_hw.transport.process import Process, peer_credentials

UNIX_LIMITS: Final = FrontLimits()
_MAX_UNIX_PATH: Final = 107


class UnixFront(Front):
    """A unix socket whose callers are known by process (`UnixPeer`)."""

    def __init__(
        self,
        path: str | Path,
        mode: int,
        *,
        directory_mode: int | None = None,
        limits: FrontLimits = UNIX_LIMITS,
        log: Logger | None = None,
    ) -> None:
        """Describe the front.

        Args:
            path: where the socket goes; a stale one is replaced, a live one is not.
            mode: permission bits of the socket, whatever the umask.
            directory_mode: permission bits of its directory when we have to make it; None when
                it has to exist.
            limits: see `FrontLimits`.
            log: where refusals go.
        """
        super().__init__(limits, log or get_logger("endpoints"))
        self.path = Path(path).absolute()
        self.mode = mode
        self._directory_mode = directory_mode
        self._inode: tuple[int, int] | None = None

    @property
    @override
    def address_text(self) -> str:
        return str(self.path)

    @override
    async def _listen(self) -> list[socket.socket]:
        if len(os.fsencode(self.path)) > _MAX_UNIX_PATH:
            raise InvalidInputError(f"socket path {self.path} is over {_MAX_UNIX_PATH} bytes")
        if self._directory_mode is not None and not self.path.parent.is_dir():
            _make_way(self.path.parent.parent)
            self.path.parent.mkdir(mode=0o700)
            self.path.parent.chmod(self._directory_mode)
        remark = check_directory(self.path.parent)
        if remark is not None:
            self.log.warning(
                "Socket is not safe from other users", path=str(self.path), remark=remark
            )
        _check_replaceable(self.path)
        listening = _bind(self.path, self.mode, self.limits.backlog)
        found = self.path.stat(follow_symlinks=False)
        self._inode = (found.st_dev, found.st_ino)
        return [listening]

    @override
    def _caller_key(self, connection: socket.socket, address: object) -> object:
        return _uid(connection)

    @override
    async def _prove(self, connection: socket.socket, address: object, lease: Lease) -> None:
        lease.process = process = Process(connection)
        outer = Half(lambda: self._release(lease), begins=PREFACE)
        lease.outer = outer
        await asyncio.get_running_loop().connect_accepted_socket(lambda: outer, connection)
        await self._attach(outer, UnixPeer(process))

    @override
    async def stop_accepting(self) -> None:
        await super().stop_accepting()
        inode, self._inode = self._inode, None
        if inode is None:
            return
        with contextlib.suppress(FileNotFoundError):
            found = self.path.stat(follow_symlinks=False)
            if (found.st_dev, found.st_ino) == inode:  # not that of a successor
                self.path.unlink()


def _uid(connection: socket.socket) -> int:
    return peer_credentials(connection)[1]


def _make_way(directory: Path) -> None:
    """Make a directory and those above it so that everybody can pass, whatever the umask."""
    if directory.is_dir():
        return
    _make_way(directory.parent)
    try:
        directory.mkdir(mode=0o755)
    except FileExistsError:  # the other program was faster
        return
    directory.chmod(0o755)


def _check_replaceable(path: Path) -> None:
    """Refuse to take a path that is somebody else's.

    Raises:
        UnavailableError: a process listens there, or it is not a socket.
    """
    try:
        found = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise UnavailableError(f"{path} exists and is not a socket; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except BlockingIOError:  # a full backlog: somebody is there
            pass
    raise UnavailableError(f"another process listens on {path}; stop it or set another socket_path")


def _bind(path: Path, mode: int, backlog: int) -> socket.socket:
    """Listen on a path; nobody can connect before it has its permissions."""
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        path.chmod(mode)
        listening.listen(backlog)
    except OSError:
        listening.close()
        raise
    return listening
