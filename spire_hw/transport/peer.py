"""Who is at the other end of an accepted connection, as the socket or the TLS handshake proved it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cryptography import x509

    from spire_hw.spiffeid import SpiffeId


class CallerProcess(Protocol):
    """A local process pinned so that a reused pid cannot be mistaken for it."""

    pid: int
    uid: int
    gid: int

    def alive(self) -> bool:
        """Tell whether it is still the process that connected."""
        ...

    def read_link(self, name: str) -> str:
        """Return the target of a link in its /proc directory, such as `exe`."""
        ...

    def read_file(self, name: str, limit: int) -> bytes:
        """Return at most `limit` bytes of a file in its /proc directory, such as `status`."""
        ...

    def open_file(self, name: str) -> int:
        """Open a file in its /proc directory (`exe` is the program) and return a descriptor."""
        ...


@dataclass(frozen=True, slots=True)
class TcpPeer:
    """A connection to the TCP front.

    Attributes:
        address: IP address, without port.
        port: its port.
        spiffe_id: verified ID of the client certificate, None when none was shown.
        chain: verified client chain, leaf first; empty when none was shown.
    """

    address: str
    port: int
    spiffe_id: SpiffeId | None
    chain: tuple[x509.Certificate, ...]


@dataclass(frozen=True, slots=True)
class UnixPeer:
    """A connection to a unix front."""

    process: CallerProcess


Peer = TcpPeer | UnixPeer
