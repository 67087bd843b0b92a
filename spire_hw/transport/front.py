"""Sockets that callers connect to, whatever tells who the callers are.

A front accepts, proves who is there, waits for the HTTP/2 preface and only then opens a connection
to the inner server. Whoever fails any of it costs a descriptor for a few seconds and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import (
    NotReadyError,
    SpireHwError,
    UnavailableError,
    VerificationError,
)

if TYPE_CHECKING:
    import socket

    from spire_hw.log import Logger
    from spire_hw.transport.half import Half
    from spire_hw.transport.peer import TcpPeer, UnixPeer
    from spire_hw.transport.process import Process

_ACCEPT_BATCH: Final = 64
_EXHAUSTED: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_EXHAUSTED_PAUSE_S: Final = 0.2
_REAP_INTERVAL_S: Final = 5.0
_FDS_PER_CONNECTION: Final = 2  # its socket, and on unix the process at the other end
_FDS_FOR_THE_REST: Final = 256
_CLOSE_S: Final = 5.0
_MIN_CONNECTIONS: Final = 16
_SHARES: Final = 4


@dataclass(frozen=True, slots=True)
class FrontLimits:
    """What a front allows.

    Attributes:
        max_connections: at once; lowered to what the process's descriptor limit has room for.
        max_per_caller: at once from one IP address (IPv6: one /64), or from one user on a unix
            socket; a fourth of all at most where max_connections was lowered.
        handshake_s: for TLS, from accept to the last message.
        first_byte_s: from there to the HTTP/2 preface.
        max_age_s: after this a connection is cut, None for never. A backstop: the inner server
            asks clients to leave long before (`RpcLimits.max_connection_age_s`).
        backlog: of the listening socket.
    """

    max_connections: int = 10_000
    max_per_caller: int = 2_000
    handshake_s: float = 10.0
    first_byte_s: float = 10.0
    max_age_s: float | None = None
    backlog: int = 512


class Inner(Protocol):
    """What is behind a front: serves the connections it hands over."""

    @property
    def descriptors(self) -> int:
        """Return how many it opens for each connection."""
        ...

    async def attach(self, outer: Half, peer: TcpPeer | UnixPeer) -> None:
        """Serve a connection whose peer was proved.

        Raises:
            UnavailableError: that is not possible.
        """
        ...


@dataclass(slots=True, eq=False)
class Lease:
    """One connection's place among those a front allows."""

    key: object
    outer: Half | None = None
    process: Process | None = None
    accepted_at: float = 0.0


class Front(ABC):
    """A listening socket in front of an inner server; one start, one close."""

    def __init__(self, limits: FrontLimits, log: Logger) -> None:
        self.limits = limits
        self.log = log
        self._leases: dict[Lease, None] = {}
        self._per_caller: dict[object, int] = {}
        self._sockets: list[socket.socket] = []
        self._inner: Inner | None = None
        self._tasks = Tasks(self._task_failed)
        self._emptied: asyncio.Future[None] | None = None
        self._pause: asyncio.TimerHandle | None = None  # while there are no descriptors
        self._max_connections = limits.max_connections
        self._max_per_caller = limits.max_per_caller

    @property
    def connections(self) -> int:
        """Return how many connections are open, those still being proved included."""
        return len(self._leases)

    async def start(self, inner: Inner) -> None:
        """Listen, and hand what was proved to an inner server.

        Raises:
            NotReadyError: started before.
            UnavailableError: the address cannot be listened on.
        """
        if self._inner is not None:
            raise NotReadyError("this front was started before")
        self._inner = inner
        soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = max(
            _MIN_CONNECTIONS,
            (soft - _FDS_FOR_THE_REST) // (_FDS_PER_CONNECTION + inner.descriptors),
        )
        if room < self.limits.max_connections:
            self._max_connections = room
            self._max_per_caller = min(self.limits.max_per_caller, room // _SHARES)
        try:
            self._sockets = await self._listen()
        except OSError as e:
            raise UnavailableError(
                f"cannot listen on {self.address_text}: {e.strerror or e}{_remedy(e)}"
            ) from e
        for listening in self._sockets:
            listening.setblocking(False)
            self._watch(listening)
        if self.limits.max_age_s is not None:
            self._tasks.start(f"reap {self.address_text}", self._reap(self.limits.max_age_s))

    @property
    @abstractmethod
    def address_text(self) -> str:
        """Return where it listens, for people."""

    @abstractmethod
    async def _listen(self) -> list[socket.socket]: ...

    @abstractmethod
    def _caller_key(self, connection: socket.socket, address: object) -> object: ...

    @abstractmethod
    async def _prove(self, connection: socket.socket, address: object, lease: Lease) -> None:
        """Find out who is there and attach; raises when that is impossible."""

    async def stop_accepting(self) -> None:
        """Close the listening sockets; connections go on."""
        listening, self._sockets = self._sockets, []
        if self._pause is not None:
            self._pause.cancel()
        for one in listening:
            asyncio.get_running_loop().remove_reader(one)
            one.close()
        await self._tasks.close()

    async def close(self) -> None:
        """Close everything at once."""
        await self.stop_accepting()
        for lease in list(self._leases):
            if lease.outer is not None:
                lease.outer.abort()
        if self._leases:
            self._emptied = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self._emptied

    def _task_failed(self, name: str, error: BaseException) -> None:
        self.log.error("Front task failed", task=name, error=str(error), exc_info=error)

    def _watch(self, listening: socket.socket) -> None:
        asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        """Take who waits to be let in, some at a time: those who are in have their turn too."""
        for _ in range(_ACCEPT_BATCH):
            try:
                connection, address = listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as e:
                if listening.fileno() < 0:
                    return
                if e.errno in _EXHAUSTED:
                    self.log.exception("Out of descriptors, not accepting", error=str(e))
                    loop = asyncio.get_running_loop()
                    loop.remove_reader(listening)
                    self._pause = loop.call_later(_EXHAUSTED_PAUSE_S, self._watch, listening)
                    return
                continue  # that one connection went away while it waited
            self._take(connection, address)

    def _take(self, connection: socket.socket, address: object) -> None:
        try:
            connection.setblocking(False)
            key = self._caller_key(connection, address)
        except OSError:
            connection.close()
            return
        held = self._per_caller.get(key, 0)
        if len(self._leases) >= self._max_connections or held >= self._max_per_caller:
            self.log.debug("Too many connections", caller=str(key), open=len(self._leases))
            connection.close()
            return
        lease = Lease(key, accepted_at=asyncio.get_running_loop().time())
        self._leases[lease] = None
        self._per_caller[key] = held + 1
        task = self._tasks.spawn("connection", self._serve(connection, address, lease))
        # Not a `finally`: a task that is cancelled before its first step never gets to one.
        task.add_done_callback(lambda done: self._settle(done, connection, lease))

    def _release(self, lease: Lease) -> None:
        if self._leases.pop(lease, lease) is lease:
            return
        left = self._per_caller.get(lease.key, 0) - 1
        if left > 0:
            self._per_caller[lease.key] = left
        else:
            self._per_caller.pop(lease.key, None)
        if lease.process is not None:
            lease.process.close()
        lease.outer = None
        if not self._leases and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    async def _serve(self, connection: socket.socket, address: object, lease: Lease) -> bool:
        """Prove and attach; tell whether that worked."""
        try:
            await self._prove(connection, address, lease)
        except VerificationError as e:
            self.log.info("Caller refused", caller=str(lease.key), reason=e.message)
        except (SpireHwError, TimeoutError, OSError) as e:
            self.log.debug("Connection dropped", caller=str(lease.key), reason=str(e) or "too slow")
        else:
            return True
        return False

    def _settle(self, done: asyncio.Task[bool], connection: socket.socket, lease: Lease) -> None:
        """Close what did not get through."""
        if not done.cancelled() and done.exception() is None and done.result():
            return
        if lease.outer is not None and lease.outer.transport is not None:
            lease.outer.abort()
        else:
            connection.close()
            self._release(lease)

    async def _attach(self, outer: Half, peer: TcpPeer | UnixPeer) -> None:
        if self._inner is None:
            raise UnavailableError("the front is closed")
        if not outer.has_begun:
            async with asyncio.timeout(self.limits.first_byte_s):
                await outer.begun()
        await self._inner.attach(outer, peer)

    async def _reap(self, max_age_s: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(_REAP_INTERVAL_S, max_age_s / 4))
            oldest = loop.time() - max_age_s
            for lease in list(self._leases):  # in order of age
                if lease.accepted_at > oldest:
                    break
                if lease.outer is not None:
                    lease.outer.abort()


def _remedy(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "; stop the program that listens there or set another port"
    if error.errno == errno.EADDRNOTAVAIL:
        return "; this machine has no such address"
    return ""
