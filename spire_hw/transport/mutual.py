"""A TCP front whose callers have to prove themselves: TLS 1.3, a client certificate required.

Whom to believe is a list of pinned authorities; a caller is known by the SHA-256 of its certificate,
and by its SPIFFE ID where it has one. What it may do is decided for every call elsewhere.
"""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from spire_hw.errors import ChainError, SpireHwError, SvidError, UnavailableError, VerificationError
from spire_hw.svid.x509svid import spiffe_id_of
from spire_hw.transport.front import FrontLimits, Lease
from spire_hw.transport.peer import TcpPeer, source_of
from spire_hw.transport.tcpfront import TlsFront, address_of
from spire_hw.transport.tls import TlsContext, TlsIdentity, build_context
from spire_hw.x509.certificate import encode_der, load_certificate
from spire_hw.x509.chain import verify_chain

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from cryptography import x509

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.spiffeid import SpiffeId

MUTUAL_LIMITS: Final = FrontLimits(
    max_connections=512, max_per_caller=64, handshake_s=5.0, first_byte_s=5.0, max_age_s=300.0
)
_MAX_FAILURES: Final = 30  # of one source in a minute; then it is not listened to
_MAX_SOURCES: Final = 4096
_MINUTE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class MutualPeer(TcpPeer):
    """A caller that proved itself.

    Attributes:
        fingerprint: lower-case hex SHA-256 of its certificate.
    """

    fingerprint: str


class ExpiredPeerError(ChainError):
    """A caller proved itself with a certificate that holds but for its time, which is over.

    Attributes:
        peer: whose certificate it is.
    """

    def __init__(self, message: str, peer: MutualPeer) -> None:
        super().__init__(message)
        self.peer = peer


@dataclass(frozen=True, slots=True)
class Pins:
    """Whom a front believes.

    Attributes:
        authorities: certificates of which one has to have signed a caller's.
        version: changes whenever they do.
    """

    authorities: tuple[x509.Certificate, ...]
    version: int = 0


class MutualFront(TlsFront):
    """TLS 1.3 on a TCP port for callers with a certificate of a pinned authority."""

    def __init__(
        self,
        address: str,
        port: int,
        *,
        identity: Callable[[], TlsIdentity],
        pins: Callable[[], Pins],
        refused: Callable[[str, SpireHwError], None],
        limits: FrontLimits = MUTUAL_LIMITS,
        clock: Clock | None = None,
        log: Logger | None = None,
    ) -> None:
        """Describe the front; see `TlsFront`.

        Args:
            address: IP address to listen on.
            port: 0 picks a free one.
            identity: what to show now.
            pins: whom to believe now; asked at every connection.
            refused: told the address and the reason of each caller that did not prove itself.
            limits: see `FrontLimits`.
            clock: what time certificates are held against.
            log: where refusals go.
        """
        super().__init__(address, port, identity=identity, limits=limits, clock=clock, log=log)
        self._pins = pins
        self._refused = refused
        self._failures: dict[str, int] = {}
        self._since = self._clock.monotonic()

    @override
    def _context(self) -> TlsContext:
        identity, pins = self._identity(), self._pins()
        return self._keep(
            identity,
            pins,
            lambda: build_context(
                server_side=True,
                verify=ssl.CERT_REQUIRED,
                roots=[encode_der(c) for c in pins.authorities],
                identity=identity,
                least=ssl.TLSVersion.TLSv1_3,
            ),
        )

    @override
    async def _prove(self, connection: socket.socket, address: object, lease: Lease) -> None:
        ip = address_of(address)[0]
        if self._failed_much(source_of(ip)):
            raise UnavailableError("too many callers from there did not prove themselves")
        try:
            await super()._prove(connection, address, lease)
        except (SpireHwError, TimeoutError) as e:
            self._note_failure(source_of(ip))
            self._refused(ip, e if isinstance(e, SpireHwError) else UnavailableError("too slow"))
            raise

    @override
    def _admitted(self, peer: TcpPeer, chain: tuple[bytes, ...]) -> TcpPeer:
        if not chain:
            raise VerificationError("a client certificate is required")
        certificates = tuple(load_certificate(data) for data in chain)
        leaf, *others = certificates
        fingerprint = hashlib.sha256(chain[0]).hexdigest()
        proved = MutualPeer(peer.address, peer.port, _id_of(leaf), certificates, fingerprint)
        authorities, now, end = (
            self._pins().authorities,
            self._clock.now(),
            leaf.not_valid_after_utc,
        )
        try:
            verify_chain(leaf, others, authorities, now)
        except ChainError as e:
            if now > end:
                verify_chain(leaf, others, authorities, end)
                raise ExpiredPeerError(e.message, proved) from e
            raise
        return proved

    def _failed_much(self, source: str) -> bool:
        now = self._clock.monotonic()
        if now - self._since >= _MINUTE_S:
            self._failures, self._since = {}, now
        return self._failures.get(source, 0) >= _MAX_FAILURES

    def _note_failure(self, source: str) -> None:
        if source in self._failures or len(self._failures) < _MAX_SOURCES:
            self._failures[source] = self._failures.get(source, 0) + 1


def _id_of(leaf: x509.Certificate) -> SpiffeId | None:
    try:
        return spiffe_id_of(leaf)
    except SvidError:
        return None
