"""The end of a socket pair that a helper process of ours serves, and what hardens that process.

Started as `python -P -m <module> <parent pid>` with the socket pair as standard input. Such a
process never outlives its host: the kernel kills it when the host dies. Other users cannot attach
to it and it leaves no core.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
from typing import TYPE_CHECKING, Final

from spire_hw.errors import EncodingError
from spire_hw.pkcs11.wire import HEADER, Kind, decode_header, encode_frame

if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4


class Channel:
    """One end of the socket pair."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def receive(self) -> tuple[Kind, int, bytes] | None:
        """Return the next request, None when the host has gone.

        Raises:
            EncodingError: the host talks nonsense.
        """
        header = self._exactly(HEADER.size)
        if header is None:
            return None
        length, kind, number = decode_header(header)
        body = self._exactly(length)
        return None if body is None else (kind, number, body)

    def _exactly(self, length: int) -> bytes | None:
        if length == 0:
            return b""
        piece = self._link.recv(length, socket.MSG_WAITALL)
        if len(piece) == length or not piece:
            return piece or None
        rest = self._exactly(length - len(piece))
        return None if rest is None else piece + rest

    def send(self, kind: Kind, number: int, body: bytes) -> None:
        """Answer a request."""
        self._link.sendall(encode_frame(kind, number, body))


def harden(parent: int) -> None:
    """Tie this process to its parent and close it to debuggers.

    Raises:
        SystemExit: the parent is gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_PDEATHSIG, signal.SIGKILL), (_PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
            raise SystemExit(f"prctl {option} failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise SystemExit(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run(answer: Callable[[Kind, bytes], tuple[Kind, bytes]]) -> None:
    """Be a helper process: answer requests until the host goes or talks nonsense."""
    harden(int(sys.argv[1]))
    with socket.socket(fileno=os.dup(0)) as link:
        channel = Channel(link)
        try:
            while (request := channel.receive()) is not None:
                kind, number, body = request
                channel.send(*_numbered(answer(kind, body), number))
        except (ConnectionError, EncodingError):
            return


def _numbered(answer: tuple[Kind, bytes], number: int) -> tuple[Kind, int, bytes]:
    return answer[0], number, answer[1]
