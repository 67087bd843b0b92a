"""One worker process as its host sees it: start it, ask it, notice its death, kill it.

Requests are answered in order. A worker that lets the oldest one wait past its limit is killed:
a C call that hangs cannot be interrupted in any other way.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from spire_hw.errors import EncodingError, ErrorKind
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.wire import HEADER, Kind, decode_error, decode_header, encode_frame

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_KILLED_S: Final = 5.0
WORKER: Final = (sys.executable, "-P", "-m", "spire_hw.pkcs11.device.worker")
VERIFIER: Final = (sys.executable, "-P", "-m", "spire_hw.pkcs11.pool.verifier")

# For one signature a token's library frees far more small pieces than glibc keeps at hand of each
# size: with more of them kept, one of SoftHSM takes a fifteenth less. Other C libraries ignore it.
ALLOCATION: Final = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=500"}


@dataclass(frozen=True, slots=True)
class Launch:
    """How workers are started.

    Attributes:
        environment: the worker's environment but for a setting of glibc's allocation, which it may
            hold as well; the PIN is never in it.
        command: program and arguments; the host's process id is added.
    """

    environment: Mapping[str, str] = field(repr=False)
    command: Sequence[str] = WORKER


@dataclass(slots=True)
class _Waiting:
    number: int
    future: asyncio.Future[bytes]
    limit_s: float
    what: str
    since: float


class WorkerProcess(asyncio.Protocol):
    """A running worker.

    Attributes:
        gone: done once the process has ended; its result says how.
        was_killed: whether it ended because we made it, not by itself.
    """

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self._process = process
        self._name = name
        self._loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[str] = self._loop.create_future()
        self._transport: asyncio.WriteTransport | None = None
        self._buffer = bytearray()
        self._waiting: deque[_Waiting] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._number = 0
        self._why: TokenError | None = None
        self.was_killed = False
        self._closing = False
        self._pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(self._pidfd, self._ended)

    @classmethod
    async def start(cls, launch: Launch, name: str) -> WorkerProcess:
        """Spawn a worker.

        Raises:
            TokenError: UNAVAILABLE, no process could be made.
        """
        ours, theirs = socket.socketpair()
        try:
            process = _spawn(launch, theirs)
        except OSError as e:
            ours.close()
            raise TokenError(
                f"hsm worker cannot be started: {e.strerror}",
                reason="hsm.worker_start",
                operation="start worker",
                cure=Cure.RESTART,
                kind=ErrorKind.UNAVAILABLE,
            ) from e
        finally:
            theirs.close()
        worker = cls(process, name)
        try:
            await worker._loop.create_connection(lambda: worker, sock=ours)
        except BaseException:
            await worker.end()
            raise
        return worker

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    @property
    def why(self) -> TokenError | None:
        """Return why nothing can be asked any more, None while it can."""
        return self._why

    @property
    def is_alive(self) -> bool:
        """Tell whether requests may be sent."""
        return self._why is None and not self.gone.done() and self._transport is not None

    @property
    def depth(self) -> int:
        """Return how many requests are unanswered."""
        return len(self._waiting)

    @property
    def waiting_s(self) -> float:
        """Return how many seconds the oldest request has been unanswered."""
        return self._loop.time() - self._waiting[0].since if self._waiting else 0.0

    def ask(self, kind: Kind, body: bytes, *, limit_s: float, what: str) -> asyncio.Future[bytes]:
        """Send a request; the future gives the body of the answer.

        Args:
            kind: request kind.
            body: its body.
            limit_s: seconds the worker may take once it gets to this request.
            what: name of the operation for messages.
        """
        future: asyncio.Future[bytes] = self._loop.create_future()
        if self._transport is None or not self.is_alive:
            future.set_exception(self._why or self._dead("hsm worker is gone", what))
            return future
        self._number = (self._number + 1) & 0xFFFFFFFF
        self._waiting.append(_Waiting(self._number, future, limit_s, what, self._loop.time()))
        if len(self._waiting) == 1:
            self._watch_oldest()
        self._transport.write(encode_frame(kind, self._number, body))
        return future

    def kill(self, why: TokenError | None = None) -> None:
        """End the process at once; unanswered requests fail."""
        if self._why is None:
            self._why = why or self._dead("hsm worker was stopped", "stop")
        if not self.gone.done():
            self.was_killed = True
            self._process.send_signal(signal.SIGKILL)
        self._fail_all(self._why)

    async def end(self) -> None:
        """Kill the worker and wait until nothing is left of it."""
        self.kill()
        # A killed process is gone in no time, unless the device holds it in an uninterruptible call.
        await asyncio.wait({self.gone}, timeout=_KILLED_S)

    async def close(self, grace_s: float = 5.0) -> None:
        """Let the worker finish what it does and end, then make sure it has."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()
        await asyncio.wait({self.gone}, timeout=grace_s)
        if not self.gone.done():
            await self.end()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        assert isinstance(transport, asyncio.WriteTransport)  # noqa: S101 - narrows the type
        self._transport = transport

    @override
    def data_received(self, data: bytes) -> None:
        """Take bytes from the worker apart into answers."""
        self._buffer += data
        try:
            while len(self._buffer) >= HEADER.size:
                length, kind, number = decode_header(bytes(self._buffer[: HEADER.size]))
                end = HEADER.size + length
                if len(self._buffer) < end:
                    return
                body = bytes(self._buffer[HEADER.size : end])
                del self._buffer[:end]
                self._answered(kind, number, body)
        except EncodingError as e:
            self.kill(self._dead(f"hsm worker talks nonsense: {e.message}", "answer"))

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the worker closed its end; it is dead or about to be."""
        self._transport = None
        if not self._closing and not self.gone.done():
            self._process.send_signal(signal.SIGKILL)

    def _answered(self, kind: Kind, number: int, body: bytes) -> None:
        if not self._waiting or self._waiting[0].number != number:
            raise EncodingError("worker frame", "answer to nothing asked")
        waiting = self._waiting.popleft()
        self._watch_oldest()
        if waiting.future.done():
            return
        if kind is Kind.OK:
            waiting.future.set_result(body)
        elif kind is Kind.FAILED:
            waiting.future.set_exception(decode_error(body))
        else:
            raise EncodingError("worker frame", f"{kind.name} is no answer")

    def _watch_oldest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._waiting:
            oldest = self._waiting[0]
            self._timer = self._loop.call_later(oldest.limit_s, self._overdue, oldest)

    def _overdue(self, oldest: _Waiting) -> None:
        if not oldest.future.done():
            oldest.future.set_exception(
                TokenError(
                    f"token did not {oldest.what} within {oldest.limit_s:g} s; worker replaced",
                    reason="hsm.worker_hung",
                    operation=oldest.what,
                    device=self._name,
                    kind=ErrorKind.DEADLINE_EXCEEDED,
                )
            )
        self.kill(self._dead("hsm worker hung and was killed", oldest.what))

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._process.wait()
        how = f"signal {-status}" if status < 0 else f"exit {status}"
        if self._transport is not None:
            self._transport.abort()
        if not self.gone.done():
            self.gone.set_result(how)
        if self._why is None:
            self._why = self._dead(f"hsm worker died ({how})", "run")
        self._fail_all(self._why)

    def _fail_all(self, why: TokenError) -> None:
        waiting, self._waiting = self._waiting, deque()
        self._watch_oldest()
        for item in waiting:
            if not item.future.done():
                item.future.set_exception(why)

    def _dead(self, message: str, what: str) -> TokenError:
        return TokenError(
            message,
            reason="hsm.worker_died",
            operation=what,
            device=self._name,
            cure=Cure.RESTART,
            kind=ErrorKind.UNAVAILABLE,
        )


def _spawn(launch: Launch, theirs: socket.socket) -> subprocess.Popen[bytes]:
    # A session of its own keeps the terminal's Ctrl-C away: the host ends its workers in order.
    return subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [*launch.command, str(os.getpid())],
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL,
        env={**ALLOCATION, **launch.environment},
        cwd="/",
        close_fds=True,
        start_new_session=True,
    )
