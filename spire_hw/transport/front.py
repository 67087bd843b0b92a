"""Sockets that callers connect to: TCP with optional client certificate, unix with peer credentials.

A front accepts, proves who is there, waits for the HTTP/2 preface and only then opens a connection
to the inner server. Whoever fails any of it costs a descriptor for a few seconds and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import ssl
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from typing_extensions import override

from spire_hw.aio.tasks import Tasks
from spire_hw.clock import Clock, SystemClock
from spire_hw.errors import (
    InvalidInputError,
    NotReadyError,
    SpireHwError,
    UnavailableError,
    VerificationError,
)
from spire_hw.hardening import check_directory
from spire_hw.log import Logger, get_logger
from spire_hw.transport.half import PREFACE, Half, keep_alive
from spire_hw.transport.peer import TcpPeer, UnixPeer, source_of
from spire_hw.transport.process import Process, peer_credentials
from spire_hw.transport.tls import (
    TlsContext,
    TlsHalf,
    TlsIdentity,
    build_context,
    handshake_threads,
    peer_chain,
    verify_peer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.spiffeid import SpiffeId, TrustDomain

_ACCEPT_BATCH: Final = 64
_EXHAUSTED: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_EXHAUSTED_PAUSE_S: Final = 0.2
_REAP_INTERVAL_S: Final = 5.0
_FDS_PER_CONNECTION: Final = 2  # its socket, and on unix the process at the other end
_FDS_FOR_THE_REST: Final = 256
_CLOSE_S: Final = 5.0
_MIN_CONNECTIONS: Final = 16
_SHARES: Final = 4
_MAX_UNIX_PATH: Final = 107
_MINUTE_S: Final = 60


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


TCP_LIMITS: Final = FrontLimits(max_age_s=5 * _MINUTE_S)
UNIX_LIMITS: Final = FrontLimits()


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


class TlsFront(Front):
    """TLS on a TCP port; who is let in is told by those who derive from it."""

    def __init__(
        self,
        address: str,
        port: int,
        *,
        identity: Callable[[], TlsIdentity],
        limits: FrontLimits = TCP_LIMITS,
        clock: Clock | None = None,
        log: Logger | None = None,
    ) -> None:
        """Describe the front.

        Args:
            address: IP address to listen on; "" and "::" mean all.
            port: 0 picks a free one, see `port`.
            identity: what to show now; asked at every connection.
            limits: see `FrontLimits`.
            clock: what time certificates are held against.
            log: where refusals go.
        """
        super().__init__(limits, log or get_logger("endpoints"))
        self.address = address
        self.port = port
        self._identity = identity
        self._clock = clock or SystemClock()
        self._pool = handshake_threads()

    @property
    @override
    def address_text(self) -> str:
        return f"{self.address}:{self.port}"

    @abstractmethod
    def _context(self) -> TlsContext:
        """Return the context of a new connection."""

    @abstractmethod
    def _admitted(self, peer: TcpPeer, chain: tuple[bytes, ...]) -> TcpPeer:
        """Return who is there.

        Args:
            peer: address and port, nobody proved yet.
            chain: DER certificates the peer showed, leaf first; empty when it showed none.

        Raises:
            VerificationError: that one may not come in.
        """

    @override
    async def _listen(self) -> list[socket.socket]:
        found = await asyncio.get_running_loop().getaddrinfo(
            self.address or None, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _name, where = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6 and self.address in {"", "::"}:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            keep_alive(listening)  # connections inherit it
            listening.bind(where)
            listening.listen(self.limits.backlog)
        except OSError:
            listening.close()
            raise
        self.port = listening.getsockname()[1]
        return [listening]

    @override
    def _caller_key(self, connection: socket.socket, address: object) -> object:
        return source_of(address_of(address)[0])

    @override
    async def _prove(self, connection: socket.socket, address: object, lease: Lease) -> None:
        outer = TlsHalf(
            self._context(),
            server_side=True,
            pool=self._pool,
            on_end=lambda: self._release(lease),
            begins=PREFACE,
        )
        lease.outer = outer
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self.limits.handshake_s):
            await loop.connect_accepted_socket(lambda: outer, connection)
            await outer.handshaken()
        if outer.tls.session_reused:
            raise VerificationError("TLS sessions are not resumed here")
        peer = self._admitted(TcpPeer(*address_of(address), None, ()), peer_chain(outer.tls))
        outer.resume()
        await self._attach(outer, peer)

    @override
    async def close(self) -> None:
        await super().close()
        self._pool.shutdown(wait=False, cancel_futures=True)


class TcpFront(TlsFront):
    """TLS on a TCP port: a client certificate is asked for, not required.

    A certificate that is shown has to hold against the bundle of its ID's own trust domain, and
    `admit` has to let that ID in; otherwise the connection ends. Contexts follow identity and
    bundles; connections that are open go on until their age.
    """

    def __init__(
        self,
        address: str,
        port: int,
        *,
        identity: Callable[[], TlsIdentity],
        bundles: Callable[[], Mapping[TrustDomain, Bundle]],
        admit: Callable[[SpiffeId], bool],
        limits: FrontLimits = TCP_LIMITS,
        clock: Clock | None = None,
        log: Logger | None = None,
    ) -> None:
        """Describe the front; see `TlsFront`.

        Args:
            address: IP address to listen on.
            port: 0 picks a free one.
            identity: what to show now.
            bundles: whom to believe now; asked at every connection.
            admit: whether a verified ID may connect (own members, listed foreign admins).
            limits: see `FrontLimits`.
            clock: what time certificates are held against.
            log: where refusals go.
        """
        super().__init__(address, port, identity=identity, limits=limits, clock=clock, log=log)
        self._bundles = bundles
        self._admit = admit
        self._built: tuple[TlsIdentity, dict[TrustDomain, object], TlsContext] | None = None

    @override
    def _context(self) -> TlsContext:
        identity, bundles = self._identity(), self._bundles()
        roots: dict[TrustDomain, object] = {t: b.x509_authorities for t, b in bundles.items()}
        built = self._built
        if built is None or built[0] != identity or built[1] != roots:
            context = build_context(
                server_side=True,
                verify=ssl.CERT_OPTIONAL,
                roots=[root.der for bundle in bundles.values() for root in bundle.x509_authorities],
                identity=identity,
            )
            built = self._built = (identity, roots, context)
        return built[2]

    @override
    def _admitted(self, peer: TcpPeer, chain: tuple[bytes, ...]) -> TcpPeer:
        if not chain:
            return peer
        svid = verify_peer(chain, self._bundles(), self._clock.now())
        if not self._admit(svid.spiffe_id):
            raise VerificationError(f"{svid.spiffe_id} is not admitted here")
        return replace(peer, spiffe_id=svid.spiffe_id, chain=svid.certificates)


def address_of(address: object) -> tuple[str, int]:
    """Return (address, port), an IPv4 address that came in over IPv6 as itself."""
    if not isinstance(address, tuple) or len(address) < 2:  # noqa: PLR2004 - address and port
        return "", 0
    text = str(address[0])
    if text.startswith("::ffff:") and "." in text:
        text = text.removeprefix("::ffff:")
    return text, int(address[1])


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


def _remedy(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "; stop the program that listens there or set another port"
    if error.errno == errno.EADDRNOTAVAIL:
        return "; this machine has no such address"
    return ""


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
