"""Bytes between an outer socket and grpcio's private one, and who is on which.

The hinge: `context.peer()` of the inner server is the abstract name its client end was bound to.
`Callers` binds a name of its own for every accepted connection, so each call tells which
connection it came on. A name that is not in the registry is nobody.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import socket
import tempfile
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.errors import UnavailableError
from spire_hw.transport.half import PREFACE, Half
from spire_hw.transport.headers import HeaderWatch
from spire_hw.transport.process import is_own_process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.transport.peer import Peer

_DIAL_TRIES: Final = 200
_DIAL_PAUSE_S: Final = 0.01
_PREFIX: Final = "spire-hw-rpc-"


def join(one: Half, other: Half) -> None:
    """Relay between two halves from now on; HTTP/2 never half-closes, so they end together."""
    other.other = one  # already when early bytes make it ask for a pause
    one.lead(other)
    other.lead(one)


class PrivateDirectory:
    """A directory only this user may enter, for the sockets between grpcio and the relay.

    It is locked while in use, so that what a killed process left behind can be told from what
    another one, perhaps in another pid namespace, still needs.
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        _sweep(parent)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            self._lock = _lock(self.path)
            if self._lock is not None and self.path.exists():
                return

    def remove(self) -> None:
        """Delete it with what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(directory: Path) -> int | None:
    """Lock a directory; None when another holds it or it is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    except OSError:  # taken
        os.close(descriptor)
        return None
    os.close(descriptor)
    return None


def _sweep(parent: Path) -> None:
    """Delete what processes of ours that were killed left behind."""
    for entry in parent.glob(f"{_PREFIX}*"):
        descriptor = _lock(entry)
        if descriptor is not None:
            shutil.rmtree(entry, ignore_errors=True)
            os.close(descriptor)


class Callers:
    """The inner server's private socket, and what was proved about each connection to it."""

    def __init__(self) -> None:
        self._directory = PrivateDirectory()
        self._peers: dict[str, Peer] = {}
        self._numbers = count(1)
        self.path = str(self._directory.path / "rpc")

    @property
    def target(self) -> str:
        """Return the address the inner server listens on."""
        return f"unix:{self.path}"

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def of(self, name: str) -> Peer | None:
        """Return who is behind a `context.peer()`, None for a stranger."""
        return self._peers.get(name)

    async def attach(self, outer: Half, peer: Peer) -> None:
        """Open a connection to the inner server in the name of a peer and relay it.

        Raises:
            UnavailableError: the inner server does not answer, or is not this process.
        """
        name = f"spire-hw-{os.getpid()}-{id(self):x}-{next(self._numbers)}"
        key = f"unix-abstract:{name}"
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.bind("\0" + name)
            await _dial(connection, self.path)
            self._peers[key] = peer
            inner = Half(lambda: self._gone(key))
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: inner, sock=connection)
        except OSError as e:
            self._gone(key)
            connection.close()
            raise UnavailableError(f"the inner server is away: {e}") from e
        except BaseException:
            self._gone(key)
            connection.close()
            raise
        if outer.transport is None or outer.transport.is_closing():
            inner.abort()
            raise UnavailableError("the caller went away")
        outer.watch = HeaderWatch(len(PREFACE))
        join(outer, inner)

    def _gone(self, key: str) -> None:
        self._peers.pop(key, None)

    def close(self) -> None:
        """Remove the private directory; connections that live go on."""
        self._directory.remove()


async def _dial(connection: socket.socket, path: str) -> None:
    """Connect without waiting on the socket: a full backlog of a unix socket is EAGAIN, not progress."""
    for _ in range(_DIAL_TRIES):
        try:
            connection.connect(path)
        except BlockingIOError:
            await asyncio.sleep(_DIAL_PAUSE_S)
            continue
        if not is_own_process(connection):
            raise UnavailableError("the private socket is not ours")
        return
    raise UnavailableError("the inner server does not accept connections")
