"""Who is at the other end of an accepted connection, as the socket or the TLS handshake proved it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from cryptography import x509

    from spire_hw.spiffeid import SpiffeId

_IPV6_SITE_BITS: Final = 64


def source_of(address: str) -> str:
    """Return what callers at an IP address are counted by.

    That is the address itself, for IPv6 its /64: a single machine has all of them. Text that is
    no address stands for itself.
    """
    if ":" not in address:
        return address
    try:
        network = ipaddress.IPv6Network((address.partition("%")[0], _IPV6_SITE_BITS), strict=False)
    except ValueError:
        return address
    return str(network)


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

    @property
    def source(self) -> str:
        """Return what limits by address count this caller by; see `source_of`."""
        return source_of(self.address)


@dataclass(frozen=True, slots=True)
class UnixPeer:
    """A connection to a unix front."""

    process: CallerProcess


Peer = TcpPeer | UnixPeer
