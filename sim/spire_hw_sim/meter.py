"""What benchmarks share: a real server as a process of its own, its CPU time, the OpenSSL limit.

A figure is CPU time, or a ratio to a limit measured in turns with it, so that other work on the
machine does not decide it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from spire_hw_sim.programs import Program, ProgramError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_READY: Final = re.compile(r'msg="server is ready" address="127\.0\.0\.1:(\d+)"')
_START_S: Final = 60.0
_LOOK_S: Final = 0.05
_LIBC: Final = ctypes.CDLL(None)


def tell(name: str, value: float) -> None:
    """Print one figure the way `python -m tests.bench` collects it."""
    sys.stdout.write(f"{name} {value:.4g}\n")
    sys.stdout.flush()


def cpu_s(pid: int) -> float:
    """Return the CPU seconds a process and its children have used.

    From the clocks the kernel schedules by: `psutil` counts in hundredths, which is too coarse for
    the difference of two near moments. Source: clock_getcpuclockid(3).
    """
    process = psutil.Process(pid)
    return sum(_own_cpu_s(p.pid) for p in (process, *process.children(recursive=True)))


def _own_cpu_s(pid: int) -> float:
    clock = ctypes.c_int()
    error = _LIBC.clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, os.strerror(error))
    return time.clock_gettime(clock.value)


class OpenSsl:
    """The limit: ECDSA P-256 verify and sign, one after the other, on one core."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._public = self._key.public_key()
        self._scheme = ec.ECDSA(utils.Prehashed(hashes.SHA256()))
        self._digest = hashlib.sha256(b"bench").digest()
        self._signature = self._key.sign(self._digest, self._scheme)

    def pair_s(self, count: int = 500) -> float:
        """Return the CPU seconds of one verify plus one sign, the mean of `count`."""
        start = time.process_time()
        for _ in range(count):
            self._public.verify(self._signature, self._digest, self._scheme)
            self._key.sign(self._digest, self._scheme)
        return (time.process_time() - start) / count


@dataclass(frozen=True, slots=True)
class MeteredServer:
    """A running server.

    Attributes:
        pid: of its process.
        port: where agents reach it.
        socket: where operators do.
    """

    pid: int
    port: int
    socket: Path

    def cpu_s(self) -> float:
        """Return the CPU seconds it has used."""
        return cpu_s(self.pid)


@contextmanager
def server_process(directory: Path, config: str) -> Iterator[MeteredServer]:
    """Run `spire-hw-server run` with a configuration of `servers.server_config`.

    Raises:
        ProgramError: it did not start.
    """
    path = directory / "server.conf"
    path.write_text(config)
    program = Program("spire-hw-server", ["run", "-config", path], directory / "server.log")
    try:
        yield MeteredServer(program.pid, _port(program), directory / "api.sock")
    finally:
        program.stop()


def _port(program: Program) -> int:
    """Wait for the line that says where the server listens."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and program.exit_status is None:
        found = _READY.search(program.log_text())
        if found is not None:
            return int(found[1])
        time.sleep(_LOOK_S)
    raise ProgramError(f"the server did not start:\n{program.log_text()}")
