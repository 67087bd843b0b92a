"""State changes as syslog messages.

Spec: RFC 5424 (format), RFC 5426 (UDP), RFC 6587 section 3.4.1 (octet counting over TCP).
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import closing
from datetime import UTC
from typing import TYPE_CHECKING, Final

from spire_hw.errors import UnavailableError

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw_server.postureconfig import SyslogSettings

_TIMEOUT_S: Final = 10.0
_APP: Final = "spire-hw-server"
_MSGID: Final = "node-state"
_MAX_HOST: Final = 255
_NIL: Final = "-"
_FACILITIES: Final = 8
_NOTICE: Final = 5
# By state; all else is a notice.
_SEVERITIES: Final = {"banned": 2, "quarantined": 4, "stale": 4, "drifted": 4}
_BOM: Final = "\ufeff"


class Syslog:
    """One receiver."""

    name = "syslog"

    def __init__(self, settings: SyslogSettings) -> None:
        self._settings = settings

    async def start(self) -> None:
        """Do nothing: the receiver may come later."""

    async def send(self, event: dict[str, object]) -> None:
        """Send one event.

        Raises:
            UnavailableError: it may be tried again.
        """
        data = encode(event, self._settings.facility, socket.gethostname(), os.getpid())
        settings = self._settings
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


def encode(event: dict[str, object], facility: int, host: str, pid: int) -> bytes:
    """Return a message.

    Args:
        event: as `hooks` makes it.
        facility: number of RFC 5424.
        host: name of this machine.
        pid: of this process.
    """
    severity = _SEVERITIES.get(str(event["state"]), _NOTICE)
    shown = "".join(c for c in host if "!" <= c <= "~")[:_MAX_HOST] or _NIL
    head = f"<{facility * _FACILITIES + severity}>1 {event['time']} {shown} {_APP} {pid} {_MSGID} -"
    words = " ".join(f"{key}={_value(value)}" for key, value in event.items() if key != "time")
    return f"{head} {'' if words.isascii() else _BOM}{words}".encode()


def time_text(at: datetime) -> str:
    """Return a time as RFC 5424 and RFC 3339 write it."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _value(value: object) -> str:
    text = ",".join(value) if isinstance(value, (list, tuple)) else str(value)
    if text and all(c.isprintable() and c not in ' "=\\' for c in text):
        return text
    safe = "".join(c if c.isprintable() else "?" for c in text)
    return '"' + safe.replace("\\", "\\\\").replace('"', '\\"') + '"'


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
