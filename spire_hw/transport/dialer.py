"""Out to a server known by its SPIFFE ID, over TLS that is verified before a byte is handed on.

Our RPC engine takes the connection itself; grpcio has a private socket, and each connection it opens
there is relayed. Device keys sign in a thread; the loop never waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import ssl
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from spire_hw.aio.tasks import Tasks
from spire_hw.clock import Clock, SystemClock
from spire_hw.errors import (
    NotReadyError,
    SpireHwError,
    SvidError,
    UnavailableError,
    VerificationError,
)
from spire_hw.log import Logger, get_logger
from spire_hw.transport.half import Half, keep_alive
from spire_hw.transport.headers import HeaderWatch
from spire_hw.transport.process import is_own_process
from spire_hw.transport.relay import PrivateDirectory, join
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
    from collections.abc import Callable

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.spiffeid import SpiffeId

_BACKLOG: Final = 64
_CLOSE_S: Final = 5.0
_NO_CHAIN: Final[tuple[bytes, ...]] = ()


class Dialer:
    """A door to one server: a private socket whose every connection ends at that server.

    Attributes:
        last_error: why the latest connection could not be made, None when it could.
        server_chain: DER chain the server showed on the latest connection, empty before.
    """

    def __init__(
        self,
        address: str,
        port: int,
        *,
        server_id: SpiffeId | None,
        bundle: Callable[[], Bundle] | None,
        identity: TlsIdentity | None = None,
        on_chain: Callable[[tuple[bytes, ...]], None] | None = None,
        alpn: str = "h2",
        least: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
        local_address: str = "",
        connect_s: float = 15.0,
        handshake_s: float = 30.0,
        clock: Clock | None = None,
        log: Logger | None = None,
    ) -> None:
        """Describe the door.

        Args:
            address: host name or IP address; a name's addresses are tried in random order.
            port: of the server.
            server_id: who it has to be; None when it has no SPIFFE ID, and `on_chain` decides.
            bundle: whom to believe, asked at every connection. With None any certificate passes,
                and `on_chain` is told what was shown: it verifies it, or it is insecure bootstrap.
            identity: what we show; a new SVID wants a new dialer, as grpcio shares connections.
            on_chain: called with the DER chain of every handshake; may raise to refuse it.
            alpn: `h2`, or `http/1.1` for a bundle endpoint.
            least: oldest version of TLS that will do.
            local_address: IP address to call from, "" for the one the kernel chooses.
            connect_s: for one address.
            handshake_s: for TLS, the device's signature included.
            clock: what time certificates are held against.
            log: where failures go.
        """
        self.address = address
        self.port = port
        self.server_id = server_id
        self.last_error: SpireHwError | None = None
        self.server_chain = _NO_CHAIN
        self._bundle = bundle
        self._identity = identity
        self._on_chain = on_chain
        self._alpn = alpn
        self._least = least
        self._local_address = local_address
        self._connect_s = connect_s
        self._handshake_s = handshake_s
        self._clock = clock or SystemClock()
        self._log = log or get_logger("dialer")
        self._pool = handshake_threads()
        self._tasks = Tasks(self._task_failed)
        self._open: set[Half] = set()
        self._directory: PrivateDirectory | None = None
        self._server: asyncio.Server | None = None
        self._built: tuple[object, TlsContext] | None = None
        self._emptied: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def target(self) -> str:
        """Return the address to hand to grpcio.

        Raises:
            NotReadyError: not started.
        """
        return f"unix:{self.path}"

    @property
    def path(self) -> str:
        """Return the path of the private socket.

        Raises:
            NotReadyError: not started.
        """
        if self._directory is None:
            raise NotReadyError("the dialer was not started")
        return str(self._directory.path / "out")

    async def start(self) -> str:
        """Open the private socket and return its target; again just returns it.

        Raises:
            NotReadyError: it was closed.
        """
        if self._closed:
            raise NotReadyError("the dialer is closed")
        if self._directory is None:
            self._directory = PrivateDirectory()
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(
                lambda: _Inbound(self._arrived), self.path, backlog=_BACKLOG
            )
            os.chmod(self.path, 0o600)  # noqa: PTH101 - no I/O worth a thread
        return self.target

    async def open(self) -> TlsHalf:
        """Return a connection to the server, which was verified; nothing is read from it yet.

        Raises:
            SpireHwError: why there is none; also in `last_error`.
        """
        if self._closed:
            raise NotReadyError("the dialer is closed")
        try:
            outbound = await self._connect()
            if outbound.transport is None or outbound.transport.is_closing():
                raise UnavailableError("the server ended the connection at once")
        except SpireHwError as e:
            self._failed(e)
            raise
        self._open.add(outbound)
        outbound.on_end = lambda: self._ended(outbound)
        self.last_error = None
        return outbound

    async def close(self) -> None:
        """Cut every connection and remove the private socket."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        await self._tasks.close()
        for half in list(self._open):
            half.abort()
        if self._open:
            self._emptied = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self._emptied
        if self._directory is not None:
            self._directory.remove()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _task_failed(self, name: str, error: BaseException) -> None:
        self._log.error("Dialer task failed", task=name, error=str(error), exc_info=error)

    def _arrived(self, inbound: Half) -> None:
        self._open.add(inbound)
        inbound.on_end = lambda: self._gone(inbound)
        if self._closed:
            inbound.abort()
        else:
            self._tasks.start("dial", self._serve(inbound))

    def _gone(self, half: Half) -> None:
        self._open.discard(half)
        if not self._open and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    async def _serve(self, inbound: Half) -> None:
        try:
            await inbound.begun()
            outbound = await self.open()
        except SpireHwError:  # noted already
            inbound.abort()
            return
        except BaseException:
            inbound.abort()
            raise
        if inbound.transport is None or inbound.transport.is_closing():
            outbound.abort()
            return
        if self._alpn == "h2":
            outbound.watch = HeaderWatch()
        join(inbound, outbound)

    def _failed(self, error: SpireHwError) -> None:
        self.last_error = error
        self._log.debug(
            "Connection failed", address=f"{self.address}:{self.port}", reason=error.message
        )

    def _ended(self, outbound: TlsHalf) -> None:
        self._gone(outbound)
        if outbound.failure is not None:
            self._failed(UnavailableError(f"the server ended the connection: {outbound.failure}"))

    def _context(self) -> tuple[TlsContext, Bundle | None]:
        bundle = None if self._bundle is None else self._bundle()
        roots = None if bundle is None else bundle.x509_authorities
        if self._built is None or self._built[0] != roots:
            context = build_context(
                server_side=False,
                verify=ssl.CERT_NONE if roots is None else ssl.CERT_REQUIRED,
                roots=[root.der for root in roots or ()],
                identity=self._identity,
                alpn=self._alpn,
                least=self._least,
            )
            self._built = (roots, context)
        return self._built[1], bundle

    async def _connect(self) -> TlsHalf:
        context, bundle = self._context()
        addresses = await self._resolve()
        reasons: list[str] = []
        for family, where in addresses:
            connection = socket.socket(family, socket.SOCK_STREAM)
            try:
                connection.setblocking(False)
                keep_alive(connection)
                if self._local_address:
                    connection.bind((self._local_address, 0))
                async with asyncio.timeout(self._connect_s):
                    await asyncio.get_running_loop().sock_connect(connection, where)
            except (OSError, TimeoutError) as e:
                connection.close()
                why = os.strerror(e.errno) if e.errno else "no answer"
                reasons.append(f"{where[0]}: {why}")
                continue
            except BaseException:
                connection.close()
                raise
            return await self._secure(connection, context, bundle)
        raise UnavailableError(
            f"cannot connect to {self.address}:{self.port} ({'; '.join(reasons)})"
        )

    async def _resolve(self) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                self.address, self.port, type=socket.SOCK_STREAM
            )
        except OSError as e:
            raise UnavailableError(f"cannot resolve {self.address}: {e.strerror or e}") from e
        addresses: list[tuple[socket.AddressFamily, tuple[object, ...]]] = [
            (family, where) for family, _kind, _protocol, _name, where in found
        ]
        secrets.SystemRandom().shuffle(addresses)
        return addresses

    async def _secure(
        self, connection: socket.socket, context: TlsContext, bundle: Bundle | None
    ) -> TlsHalf:
        outbound = TlsHalf(context, server_side=False, pool=self._pool)
        try:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(self._handshake_s):
                await loop.create_connection(lambda: outbound, sock=connection)
                await outbound.handshaken()
            self._check(outbound, bundle)
        except TimeoutError as e:
            outbound.abort()
            raise UnavailableError(
                f"{self.address}:{self.port} did not finish the TLS handshake in time"
            ) from e
        except OSError as e:
            connection.close()
            raise UnavailableError(f"connection to {self.address}:{self.port} failed: {e}") from e
        except BaseException:
            outbound.abort()
            raise
        return outbound

    def _check(self, outbound: TlsHalf, bundle: Bundle | None) -> None:
        chain = peer_chain(outbound.tls)
        self.server_chain = chain
        if bundle is not None:
            try:
                svid = verify_peer(chain, {bundle.trust_domain: bundle}, self._clock.now())
            except SvidError as e:
                raise VerificationError(
                    f"{e.message}; the server should be {self.server_id}: check server_address "
                    "and trust_domain"
                ) from e
            if svid.spiffe_id != self.server_id:
                raise VerificationError(
                    f"the server is {svid.spiffe_id}, expected {self.server_id}"
                )
        if self._on_chain is not None:
            self._on_chain(chain)
        if outbound.tls.selected_alpn_protocol() not in {self._alpn, None}:
            raise VerificationError(f"the server does not speak {self._alpn}")


class _Inbound(Half):
    """A connection of grpcio's client, held back until the server is known to be right."""

    __slots__ = ("_arrived",)

    def __init__(self, arrived: Callable[[Half], None]) -> None:
        super().__init__(begins=b"")
        self._arrived = arrived

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if not is_own_process(connection):
            self.abort()
            return
        self._arrived(self)
