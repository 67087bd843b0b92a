"""Are the server's addresses free? Asked before anything is made that a failed start would leave."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from spire_hw.errors import UnavailableError

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_server.config import ServerSettings


def check_addresses(settings: ServerSettings) -> None:
    """Look at every address the server is going to listen on; nothing stays open.

    Raises:
        UnavailableError: one is in use, or not of this machine.
    """
    _check_socket(settings.socket_path)
    _check_port(settings.bind_address, settings.bind_port, "bind_port")
    if settings.health is not None:
        _check_port(settings.health.bind_address, settings.health.bind_port, "bind_port of health")


def _check_port(address: str, port: int, key: str) -> None:
    if not port:
        return  # the kernel finds one
    try:
        found = socket.getaddrinfo(
            address or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, where = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as e:
        remedy = ""
        if e.errno == errno.EADDRINUSE:
            remedy = f"; stop the program that listens there or set another {key}"
        elif e.errno == errno.EADDRNOTAVAIL:
            remedy = "; this machine has no such address"
        raise UnavailableError(
            f"cannot listen on {address}:{port}: {e.strerror or e}{remedy}"
        ) from e


def _check_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:  # a full backlog: somebody is there
            pass
        except OSError:
            return  # nobody listens; whether the path can be used is seen when it is
    raise UnavailableError(f"another process listens on {path}; stop it or set another socket_path")
