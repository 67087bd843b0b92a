"""TCP ports whose callers speak TLS: with a client certificate that is asked for, not required.

Fronts that know their callers in another way, or want other rules, derive from `TlsFront`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final

from typing_extensions import override

from spire_hw.clock import Clock, SystemClock
from spire_hw.errors import VerificationError
from spire_hw.log import Logger, get_logger
from spire_hw.transport.front import Front, FrontLimits, Lease
from spire_hw.transport.half import PREFACE, keep_alive
from spire_hw.transport.peer import TcpPeer, source_of
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

TCP_LIMITS: Final = FrontLimits(max_age_s=300.0)


class TlsFront(Front):
    """TLS on a TCP port; who is let in is told by those who derive from it.

    Attributes:
        begins: how what a caller sends has to begin.
    """

    begins: ClassVar[bytes] = PREFACE

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
        self._built: tuple[TlsIdentity, object, TlsContext] | None = None

    @property
    @override
    def address_text(self) -> str:
        return f"{self.address}:{self.port}"

    @abstractmethod
    def _context(self) -> TlsContext:
        """Return the context of a new connection."""

    def _keep(
        self, identity: TlsIdentity, trust: object, build: Callable[[], TlsContext]
    ) -> TlsContext:
        """Return the context that was built last, or a new one when identity or trust changed."""
        kept = self._built
        if kept is None or kept[0] != identity or kept[1] != trust:
            kept = self._built = (identity, trust, build())
        return kept[2]

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
            begins=self.begins,
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

    @override
    def _context(self) -> TlsContext:
        identity, bundles = self._identity(), self._bundles()
        roots: dict[TrustDomain, object] = {t: b.x509_authorities for t, b in bundles.items()}
        return self._keep(
            identity,
            roots,
            lambda: build_context(
                server_side=True,
                verify=ssl.CERT_OPTIONAL,
                roots=[root.der for bundle in bundles.values() for root in bundle.x509_authorities],
                identity=identity,
            ),
        )

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
