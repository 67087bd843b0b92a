"""Messages to a syslog receiver: where it is, how a message looks, how it gets there.

Spec: RFC 5424 (format), RFC 5426 (UDP), RFC 6587 section 3.4.1 (octet counting over TCP).
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from spire_hw.errors import InvalidInputError, UnavailableError

if TYPE_CHECKING:
    from datetime import datetime

# RFC 5424, section 6.2.1.
FACILITIES: Final = {"user": 1, "daemon": 3, "auth": 4, "authpriv": 10} | {
    f"local{n}": 16 + n for n in range(8)
}
CRITICAL: Final = 2
WARNING: Final = 4
NOTICE: Final = 5
INFORMATIONAL: Final = 6

_PORTS: Final = {"udp": 514, "tcp": 601}
_TIMEOUT_S: Final = 10.0
_MAX_HOST: Final = 255
_NIL: Final = "-"
_SEVERITIES: Final = 8
_BOM: Final = "\ufeff"


@dataclass(frozen=True, slots=True)
class SyslogSettings:
    """Where messages go.

    Attributes:
        transport: `unix`, `udp` or `tcp`.
        host: name or address; "" for `unix`.
        port: 0 for `unix`.
        path: of the socket; "" but for `unix`.
        facility: number of RFC 5424.
    """

    transport: str
    host: str = ""
    port: int = 0
    path: str = ""
    facility: int = FACILITIES["auth"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        app: name of the program.
        kind: what it is about, the MSGID.
        severity: number of RFC 5424.
        time: RFC 3339.
        text: one line.
    """

    app: str
    kind: str
    severity: int
    time: str
    text: str

    def encode(self, facility: int, host: str, pid: int) -> bytes:
        """Return it as it is sent.

        Args:
            facility: number of RFC 5424.
            host: name of this machine.
            pid: of this process.
        """
        shown = "".join(c for c in host if "!" <= c <= "~")[:_MAX_HOST] or _NIL
        priority = facility * _SEVERITIES + self.severity
        head = f"<{priority}>1 {self.time} {shown} {self.app} {pid} {self.kind} -"
        return f"{head} {'' if self.text.isascii() else _BOM}{self.text}".encode()


def parse_address(text: str) -> SyslogSettings:
    """Read `unix:///path`, `udp://host[:port]` or `tcp://host[:port]`.

    Raises:
        InvalidInputError: it is something else.
    """
    wanted = "expected unix:///path, udp://host[:port] or tcp://host[:port]"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError as e:
        raise InvalidInputError(f"{wanted}: {e}") from e
    if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
        return SyslogSettings("unix", path=parts.path)
    if parts.scheme in _PORTS and host and parts.path in {"", "/"} and port != 0:
        return SyslogSettings(parts.scheme, host, port or _PORTS[parts.scheme])
    raise InvalidInputError(wanted)


def parse_facility(text: str) -> int:
    """Return the number of a facility.

    Raises:
        InvalidInputError: it is not known; the message lists those that are.
    """
    if text not in FACILITIES:
        raise InvalidInputError(f'"{text}" is none of {", ".join(FACILITIES)}')
    return FACILITIES[text]


def time_text(at: datetime) -> str:
    """Return a time as RFC 5424 and RFC 3339 write it."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def send(settings: SyslogSettings, message: Message) -> None:
    """Send one message.

    Raises:
        UnavailableError: it may be tried again.
    """
    data = message.encode(settings.facility, socket.gethostname(), os.getpid())
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            if settings.transport == "tcp":
                await _send_tcp(settings.host, settings.port, data)
            elif settings.transport == "udp":
                await _send_udp(settings.host, settings.port, data)
            else:
                await _send_unix(settings.path, data)
    except (OSError, TimeoutError) as e:
        raise UnavailableError(str(e) or f"no answer within {_TIMEOUT_S:g} s") from e


async def _send_tcp(host: str, port: int, data: bytes) -> None:
    _, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"%d %s" % (len(data), data))
        await writer.drain()
    finally:
        writer.close()
        await writer.wait_closed()


async def _send_udp(host: str, port: int, data: bytes) -> None:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with closing(socket.socket(family, kind, protocol)) as sender:
        sender.setblocking(False)
        await loop.sock_sendto(sender, data, address)


async def _send_unix(path: str, data: bytes) -> None:
    loop = asyncio.get_running_loop()
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sender:
        sender.setblocking(False)
        await loop.sock_connect(sender, path)
        await loop.sock_sendall(sender, data)
