"""A server's `remote` KeyManager with its files, and a line to a signer that can be bad."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import subprocess
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Final, Self

from spire_hw.aio.tasks import Tasks
from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body
from spire_hw.errors import UnavailableError
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.keymanager.remote.manager import RemoteKeyManager
from spire_hw_sim.liarsigner import LiarSigner, write_client
from spire_hw_sim.pki import Authority
from spire_hw_sim.programs import ProgramError
from spire_hw_sim.site import free_port

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from spire_hw_sim.liarsigner import ClientFiles, Shelf
    from spire_hw_sim.signer import SignerRig

_CHUNK: Final = 64 * 1024
_BIND_PORT: Final = re.compile(r"bind_port\s*=\s*0")


class RemoteRig:
    """Signers that may lie and key managers before them; closes what it made.

    Attributes:
        authority: signed everybody's TLS certificate.
        files: the client's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority("infra.example")
        self.files: ClientFiles = write_client(self.authority, folder / "client")
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def signer(self, shelf: Shelf | None = None) -> LiarSigner:
        """Return a signer that listens."""
        made = LiarSigner(self.authority, shelf)
        await made.start()
        self._stack.push_async_callback(made.stop)
        return made

    async def line(self, port: int) -> BadLine:
        """Return a line to a port on this machine."""
        made = BadLine(port)
        await made.start()
        self._stack.push_async_callback(made.stop)
        return made

    def build(self, name: str = "server") -> RemoteKeyManager:
        """Return a key manager that is not configured; one name is one data directory."""
        directory = self.folder / name
        directory.mkdir(mode=0o700, exist_ok=True)
        made = RemoteKeyManager(
            HostInfo(
                side=Side.SERVER,
                trust_domain=TrustDomain.parse("example.org"),
                data_dir=directory,
                log=get_logger(name),
                clock=SystemClock(),
            )
        )
        self._stack.push_async_callback(made.close)
        return made

    async def manager(
        self, *addresses: str, name: str = "server", **settings: object
    ) -> RemoteKeyManager:
        """Return a key manager that has reached its signers."""
        made = self.build(name)
        await made.configure(self.config(*addresses, **settings))
        return made

    def config(self, *addresses: str, **settings: object) -> Body:
        """Return a configuration for signers at some addresses; None takes a setting out."""
        values = self.files.config(*addresses, **settings)
        return Body.from_dict({k: v for k, v in values.items() if v is not None})


class SignerProcess:
    """A signer in a process of its own, on one port through all its lives.

    Attributes:
        rig: its files.
        port: where it listens.
        runs: its process while there is one.
    """

    def __init__(self, rig: SignerRig) -> None:
        self.rig = rig
        self.port = free_port()
        self.runs: subprocess.Popen[bytes] | None = None
        config = rig.config_file.read_text()
        rig.config_file.write_text(_BIND_PORT.sub(f"bind_port = {self.port}", config))
        self.log = rig.folder / "signer.log"

    @property
    def address(self) -> str:
        """Return where it listens, as in a configuration."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin; it answers a while later."""
        with self.log.open("ab") as output:
            self.runs = subprocess.Popen(
                self.rig.command,
                env=dict(self.rig.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    async def answers(self) -> None:
        """Return when somebody listens.

        Raises:
            UnavailableError: nobody does.
        """
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError as e:
            raise UnavailableError(f"nobody listens on {self.address}") from e
        writer.close()

    def kill(self) -> None:
        """End it as a crash does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it as an operator does.

        Raises:
            ProgramError: it did not end well.
        """
        status = self._end(signal.SIGTERM)
        if status:
            raise ProgramError(f"signer ended with {status}: {self.log.read_text()[-2000:]}")

    def _end(self, number: signal.Signals) -> int:
        process, self.runs = self.runs, None
        if process is None:
            return 0
        process.send_signal(number)
        return process.wait(30)


class BadLine:
    """A TCP relay on loopback that delays, loses and cuts.

    A lost segment is sent again by TCP, so a loss is seen as a long pause of all that follows.

    Attributes:
        delay_s: each way.
        loss: share of chunks that come late by `late_s`.
        connections: how many were made.
    """

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self.loss = 0.0
        self.late_s = 0.2
        self.connections = 0
        self.port = 0
        self._target = port
        self._random = random.Random(7)  # noqa: S311 - the same losses in every run
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks = Tasks(self._failed)

    @property
    def address(self) -> str:
        """Return where it listens, as in a configuration."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; on the same port as before."""
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Cut everything and listen no more."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()
        await self._tasks.close()

    def aim(self, port: int) -> None:
        """Lead to another port from the next connection on."""
        self._target = port

    def cut(self) -> None:
        """Cut all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(far_writer)
        there = self._tasks.spawn("there", self._pump(reader, far_writer))
        back = self._tasks.spawn("back", self._pump(far_reader, writer))
        await asyncio.wait({there, back})
        self._writers -= {writer, far_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        due = 0.0
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                late = self.late_s if self._random.random() < self.loss else 0.0
                due = max(due, loop.time() + self.delay_s + late)
                loop.call_at(due, _write, writer, data)
        loop.call_at(max(due, loop.time()), writer.transport.abort)

    def _failed(self, name: str, error: BaseException) -> None:
        get_logger("line").error("task failed", task=name, exc_info=error)


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if not writer.transport.is_closing():
        writer.write(data)
