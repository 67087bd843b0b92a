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
import threading
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

from typing_extensions import override

from spire_hw.errors import InvalidInputError, LimitError, SpireHwError, UnavailableError
from spire_hw.transport.headers import HeaderWatch
from spire_hw.transport.process import is_own_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from spire_hw.transport.peer import Peer

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_READ_BYTES: Final = 64 * 1024
_LINGER_S: Final = 10.0
_DIAL_TRIES: Final = 200
_DIAL_PAUSE_S: Final = 0.01
_PREFIX: Final = "spire-hw-rpc-"


class _Scratch(threading.local):
    """One read buffer per thread: a loop fills and empties it in one go."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_READ_BYTES))


_scratch = _Scratch()


class _Gate:
    """Holds what a new connection sends until its beginning has been looked at."""

    __slots__ = ("data", "opened", "wanted")

    def __init__(self, wanted: bytes) -> None:
        self.wanted = wanted
        self.data = bytearray()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def push(self, data: bytes) -> bool:
        """Take bytes; True when no more should be read for now."""
        self.data += data
        if not self.opened.done():
            head = self.data[: len(self.wanted)]
            if head != self.wanted[: len(head)]:
                self._fail(InvalidInputError("the caller does not speak HTTP/2"))
            elif len(head) == len(self.wanted):
                self.opened.set_result(None)
        # To stop reading and begin again costs more than to hold what comes in a turn of the loop.
        return len(self.data) >= _READ_BYTES

    def lost(self) -> None:
        """Say that the connection went away."""
        if not self.opened.done():
            self._fail(UnavailableError("the connection ended before any call"))

    def _fail(self, error: SpireHwError) -> None:
        self.opened.set_exception(error)
        self.opened.exception()  # whoever waited may have gone: not worth a warning


class Sink(Protocol):
    """Where a half hands on what it receives: the other half of a relay, or an engine."""

    def send(self, data: bytes) -> None:
        """Take plain bytes that the half received."""
        ...

    def end(self) -> None:
        """Take note that the half is gone."""
        ...

    def pause(self) -> None:
        """Send no more: the half's peer does not read."""
        ...

    def resume(self) -> None:
        """Send on."""
        ...


class Half(asyncio.BufferedProtocol):
    """One proved connection: what it receives goes to its sink, what that says is sent.

    HTTP/2 never half-closes, so the end of one half is the end of both. Each half holds no more
    than its transport's write buffer; past its mark the other half stops reading.

    Attributes:
        watch: bounds the header blocks the peer sends; a connection that goes beyond is cut.
    """

    __slots__ = ("_gate", "_linger", "_view", "on_end", "other", "transport", "watch")

    def __init__(
        self, on_end: Callable[[], None] | None = None, *, begins: bytes | None = None
    ) -> None:
        """Make an end.

        Args:
            on_end: called once, when the connection is gone.
            begins: what the peer must send first; it is held back with a little of what follows
                until `join` or `lead`. None when the half is joined before it is connected.
        """
        self.transport: asyncio.Transport | None = None
        self.other: Sink | None = None
        self.on_end = on_end
        self._gate = None if begins is None else _Gate(begins)
        self.watch: HeaderWatch | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._view = _scratch.view

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    @override
    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    @override
    def buffer_updated(self, nbytes: int) -> None:
        self.received(bytes(self._view[:nbytes]))

    @override
    def eof_received(self) -> bool:
        self.end()
        return False

    @override
    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.pause()

    @override
    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.resume()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None  # nothing is left to close: no timer keeps this from being freed
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._gate is not None:
            self._gate.lost()
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()
        other, self.other = self.other, None
        if other is not None:
            other.end()

    async def begun(self) -> None:
        """Wait until the connection has shown how it begins.

        Raises:
            InvalidInputError: it begins otherwise.
            UnavailableError: it ended first.
        """
        if self._gate is not None:
            await self._gate.opened

    def lead(self, sink: Sink) -> None:
        """Hand everything to a sink from now on, early bytes first."""
        self.other = sink
        self._pass_on_early()
        self.resume()

    def join(self, other: Half) -> None:
        """Relay between this half and another from now on, early bytes first."""
        self.other, other.other = other, self
        self.resume()
        other.resume()
        for half in (self, other):
            half._pass_on_early()  # noqa: SLF001 - the other half of the same thing

    def _pass_on_early(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None and gate.data:
            self.received(bytes(gate.data))

    def received(self, data: bytes) -> None:
        """Take plain bytes from the peer."""
        if self.other is not None:
            if self.watch is not None:
                try:
                    self.watch.check(data)
                except (LimitError, InvalidInputError):
                    self.abort()
                    return
            self.other.send(data)
        elif self._gate is not None and self._gate.push(data):
            self.pause()

    @property
    def unsent(self) -> int:
        """Return how many bytes wait for the peer to read."""
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def send(self, data: bytes) -> None:
        """Send plain bytes to the peer."""
        if self.transport is not None:
            self.transport.write(data)

    def pause(self) -> None:
        """Stop reading."""
        if self.transport is not None:
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def end(self) -> None:
        """Close once what was written has gone out, or after a while if it does not."""
        if self.transport is None or self._linger is not None:
            return
        self.transport.close()
        self._linger = asyncio.get_running_loop().call_later(_LINGER_S, self.abort)

    def abort(self) -> None:
        """Close at once."""
        if self.transport is not None:
            self.transport.abort()


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel send at once, and notice a peer that is gone within a minute."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)


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
        outer.join(inner)

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
