"""The wire between a program and a simulated TPM, with somebody on it: reads, answers, alters."""

from __future__ import annotations

import shutil
import socketserver
import struct
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from typing_extensions import override

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import TracebackType

    from spire_hw_sim.swtpm import Swtpm

_HEADER = 10


@dataclass(frozen=True, slots=True)
class Seen:
    """A command on the bus.

    Attributes:
        code: command code, such as 0x15D for TPM2_Sign.
        data: the whole command.
    """

    code: int
    data: bytes


class TpmBus:
    """Listens where a program expects the TPM and hands on to the real one.

    Attributes:
        commands: all commands so far, or since they were forgotten.
        answers: their answers as the TPM gave them.
        on_command: may answer in the TPM's place.
        on_answer: may alter an answer.
    """

    def __init__(self, tpm: Swtpm) -> None:
        self._tpm = tpm
        self.commands: list[Seen] = []
        self.answers: list[bytes] = []
        self.on_command: Callable[[Seen], bytes | None] = _let_through
        self.on_answer: Callable[[Seen, bytes], bytes] = _as_it_is
        self._folder = Path(tempfile.mkdtemp(prefix="tpmbus-"))
        path = self._folder / "tpm"
        (self._folder / "tpm.ctrl").symlink_to(tpm.control_path)
        self.tcti = f"swtpm:path={path}"
        self._server = _Server(str(path), _Handler)
        self._server.bus = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def forget(self) -> None:
        """Begin both lists anew."""
        self.commands.clear()
        self.answers.clear()

    def exchange(self, command: bytes) -> bytes:
        """Put one command through."""
        (code,) = struct.unpack_from(">I", command, 6)
        seen = Seen(code, command)
        self.commands.append(seen)
        answer = self.on_command(seen)
        if answer is None:
            answer = self._tpm.transmit(command)
        self.answers.append(answer)
        return self.on_answer(seen, answer)


def refusal(code: int) -> bytes:
    """Return the answer that carries only a response code."""
    return struct.pack(">HII", 0x8001, _HEADER, code)


def _let_through(_seen: Seen) -> bytes | None:
    return None


def _as_it_is(_seen: Seen, answer: bytes) -> bytes:
    return answer


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    bus: TpmBus


class _Handler(socketserver.BaseRequestHandler):
    server: _Server
    request: socket.socket

    @override
    def handle(self) -> None:
        """Serve one connection: commands until the program closes it."""
        while header := self._read(_HEADER):
            (size,) = struct.unpack_from(">I", header, 2)
            command = header + self._read(size - _HEADER)
            self.request.sendall(self.server.bus.exchange(command))

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.request.recv(size - len(data))
            if not part:
                return b""
            data += part
        return data
