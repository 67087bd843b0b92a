"""`p11-kit server` in front of a SoftHSM store: a token that is reached through a socket."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

if TYPE_CHECKING:
    from spire_hw_sim.softhsm import SoftHsm

_CLIENTS: Final = (
    "/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so",
    "/usr/lib/aarch64-linux-gnu/pkcs11/p11-kit-client.so",
    "/usr/lib64/pkcs11/p11-kit-client.so",
)
_STOP_S: Final = 5.0


class P11KitServer:
    """Lets other processes use the tokens of a store.

    Attributes:
        socket: path of its socket.
    """

    def __init__(self, hsm: SoftHsm, socket: Path, *, write_protected: bool = False) -> None:
        self._hsm = hsm
        self.socket = socket
        self._uri = "pkcs11:" + ("?write-protected=yes" if write_protected else "")
        self._process: subprocess.Popen[bytes] | None = None
        self._children: dict[int, psutil.Process] = {}

    @staticmethod
    def find_client() -> str | None:
        """Return the path of the client module, None when p11-kit is not installed."""
        if shutil.which("p11-kit") is None:
            return None
        return next((path for path in _CLIENTS if Path(path).exists()), None)

    @property
    def environment(self) -> dict[str, str]:
        """Return what the loader of the client module needs in its environment."""
        return {"P11_KIT_SERVER_ADDRESS": f"unix:path={self.socket}"}

    def start(self) -> None:
        """Start it and wait until it listens."""
        self.socket.unlink(missing_ok=True)
        command = ["p11-kit", "server", "-f", "-n", str(self.socket)]
        command += ["--provider", self._hsm.module, self._uri]
        # It prints its address once it listens, and a closed output kills it.
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **self._hsm.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None  # noqa: S101 - narrows the type
        while b"PID=" not in (line := self._process.stdout.readline()):
            if not line:
                raise FileNotFoundError(f"p11-kit server does not listen on {self.socket}")

    def connections(self) -> list[psutil.Process]:
        """Return the processes that serve one connection each."""
        if self._process is not None:
            parent = psutil.Process(self._process.pid)
            self._children |= {child.pid: child for child in parent.children()}
        return [child for child in self._children.values() if child.is_running()]

    def cut(self) -> None:
        """End every connection, and let new ones in."""
        for child in self.connections():
            child.kill()

    def freeze(self) -> None:
        """Let every connection and the listener hang."""
        for child in self.connections():
            child.suspend()
        self._running().send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._running().send_signal(signal.SIGCONT)
        for child in self.connections():
            child.resume()

    def stop(self) -> None:
        """End listener and connections; the socket is gone."""
        if self._process is None:
            return
        self.cut()
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        self._process.wait(_STOP_S)
        assert self._process.stdout is not None  # noqa: S101 - narrows the type
        self._process.stdout.close()
        self._process = None
        psutil.wait_procs(list(self._children.values()), timeout=_STOP_S)
        self._children.clear()
        self.socket.unlink(missing_ok=True)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise FileNotFoundError("p11-kit server is not running")
        return self._process
