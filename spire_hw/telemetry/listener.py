"""Answers `GET` with the metrics, over HTTP/1.1 with or without TLS; one answer a connection.

A front of its own kind: bounded in connections, in what a caller may send and for how long.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from spire_hw.errors import NotReadyError, VerificationError
from spire_hw.files import parse_file
from spire_hw.keyfile import load_private_key
from spire_hw.telemetry.exposition import CONTENT_TYPE
from spire_hw.transport.front import FrontLimits
from spire_hw.transport.half import Half
from spire_hw.transport.peer import TcpPeer
from spire_hw.transport.tcpfront import TlsFront, address_of
from spire_hw.transport.tls import (
    NO_CHECK_TIME,
    TlsContext,
    TlsIdentity,
    build_context,
    verify_peer,
)
from spire_hw.x509.certificate import parse_pem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.spiffeid import TrustDomain
    from spire_hw.telemetry.config import TlsSettings
    from spire_hw.transport.front import Lease
    from spire_hw.transport.peer import UnixPeer

LIMITS: Final = FrontLimits(
    max_connections=32,
    max_per_caller=16,
    handshake_s=5.0,
    first_byte_s=5.0,
    max_age_s=20.0,
    backlog=32,
)
_MAX_HEAD_BYTES: Final = 8192
_MAX_PEM_BYTES: Final = 1 << 20
_BEGINS: Final = b"GET /"
_END: Final = b"\r\n\r\n"
# `localhost` has two addresses where the kernel may know one.
_NO_SUCH_ADDRESS: Final = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
_ALPN: Final = "http/1.1"


class MetricsListener(TlsFront):
    """Serves what `render` returns to whoever may read it."""

    begins = _BEGINS

    def __init__(
        self,
        host: str,
        port: int,
        render: Callable[[], bytes],
        *,
        tls: TlsSettings | None,
        identity: Callable[[], TlsIdentity],
        bundles: Callable[[], Mapping[TrustDomain, Bundle]],
        clock: Clock,
        log: Logger,
    ) -> None:
        """Describe it.

        Args:
            host: address or name to listen on.
            port: 0 picks a free one, see `port`.
            render: returns the metrics as text.
            tls: None for plain HTTP.
            identity: the host's own SVID, for TLS without files.
            bundles: whom to believe, for clients known by SPIFFE ID.
            clock: what time certificates are held against.
            log: where refusals go.
        """
        super().__init__(host, port, identity=identity, limits=LIMITS, clock=clock, log=log)
        self._render = render
        self._tls = tls
        self._bundles = bundles
        self._files: TlsIdentity | None = None

    @property
    def descriptors(self) -> int:
        """Return how many are opened for each connection besides its own."""
        return 0

    async def open(self) -> None:
        """Listen.

        Raises:
            NotReadyError: a file of the TLS settings cannot be read.
            InvalidInputError: it does not hold what it should.
            UnavailableError: the address is taken.
        """
        if self._tls is not None and self._tls.files is not None:
            self._files = await asyncio.to_thread(load_identity, *self._tls.files)
            self._context()
        await self.start(self)

    async def attach(self, outer: Half, peer: TcpPeer | UnixPeer) -> None:
        """Answer one request."""
        del peer
        outer.lead(_Exchange(outer, self._render))

    @override
    async def _listen(self) -> list[socket.socket]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(
            self.address, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        sockets: list[socket.socket] = []
        missing = OSError("the name has no address")
        try:
            for family, _kind, _protocol, _name, where in found:
                try:
                    sockets.append(self._bind(family, (where[0], self.port, *where[2:])))
                except OSError as e:
                    if e.errno not in _NO_SUCH_ADDRESS:
                        raise
                    missing = e
                    continue
                self.port = sockets[0].getsockname()[1]
            if not sockets:
                raise missing
        except OSError:
            for listening in sockets:
                listening.close()
            raise
        return sockets

    def _bind(self, family: int, where: tuple[object, ...]) -> socket.socket:
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind(where)
            listening.listen(self.limits.backlog)
        except OSError:
            listening.close()
            raise
        return listening

    @override
    async def _prove(self, connection: socket.socket, address: object, lease: Lease) -> None:
        if self._tls is not None:
            await super()._prove(connection, address, lease)
            return
        outer = Half(lambda: self._release(lease), begins=self.begins)
        lease.outer = outer
        await asyncio.get_running_loop().connect_accepted_socket(lambda: outer, connection)
        await self._attach(outer, TcpPeer(*address_of(address), None, ()))

    @override
    def _admitted(self, peer: TcpPeer, chain: tuple[bytes, ...]) -> TcpPeer:
        if self._tls is None or not self._tls.clients:
            return peer
        svid = verify_peer(chain, self._bundles(), self._clock.now())
        if svid.spiffe_id not in self._tls.clients:
            raise VerificationError(f"{svid.spiffe_id} may not read metrics")
        return peer

    @override
    def _context(self) -> TlsContext:
        """Return a context for one handshake: identity and bundles may be others the next time."""
        tls = self._tls
        if tls is None:
            raise NotReadyError("metrics are served without TLS")
        roots: list[bytes] = []
        if tls.client_ca is not None:
            roots = parse_file(tls.client_ca, _MAX_PEM_BYTES, parse_pem, "client_ca_file")
        elif tls.clients:
            roots = [r.der for b in self._bundles().values() for r in b.x509_authorities]
        identity = self._identity() if self._files is None else self._files
        made = build_context(
            server_side=True,
            verify=ssl.CERT_REQUIRED if roots or tls.clients else ssl.CERT_NONE,
            roots=roots,
            identity=identity,
            alpn=_ALPN,
        )
        if tls.client_ca is not None:
            # Clients of a foreign authority are held against OpenSSL's rules alone, time included.
            made.context.verify_flags &= ~NO_CHECK_TIME
        return made


class _Exchange:
    """Takes one request's head and answers it."""

    def __init__(self, outer: Half, render: Callable[[], bytes]) -> None:
        self._outer = outer
        self._render = render
        self._head = b""
        self._answered = False

    def send(self, data: bytes) -> None:
        if self._answered:
            return
        self._head += data
        if _END in self._head:
            self._answer("200 OK", self._render())
        elif len(self._head) > _MAX_HEAD_BYTES:
            self._answer("431 Request Header Fields Too Large", b"")

    def end(self) -> None:
        self._answered = True

    def pause(self) -> None:
        """Nothing more is written than one answer."""

    def resume(self) -> None:
        """As `pause`."""

    def _answer(self, status: str, body: bytes) -> None:
        self._answered = True
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self._outer.send(head.encode() + body)
        self._outer.end()


def load_identity(certificate: Path, key: Path) -> TlsIdentity:
    """Return the TLS identity of two PEM files.

    Raises:
        NotReadyError: a file cannot be read.
        InvalidInputError: it does not hold what it should.
    """
    chain = parse_file(certificate, _MAX_PEM_BYTES, parse_pem, "cert_file")
    return TlsIdentity(tuple(chain), private_key=load_private_key(key))
