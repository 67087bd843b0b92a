"""The process of an external plugin: started clean, watched, ended with everything it started.

It gets a session of its own, /dev/null to read, two pipes to write into and no other descriptor of
ours. The kernel kills it when we end. What it leaves behind is found by its session and by a mark
in the environment, which children inherit.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import EncodingError, UnavailableError
from spire_hw.goplugin import launcher
from spire_hw.goplugin.handshake import MAX_LINE_BYTES
from spire_hw.goplugin.stderr import LineLog, LinePipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from spire_hw.goplugin.program import Program

MARK: Final = "SPIRE_HW_PLUGIN_MARK"
_PYTHON: Final = (sys.executable, "-I", "-S", launcher.__file__)
_ERRNO_BYTES: Final = 16
_MAX_ENVIRON_BYTES: Final = 1 << 20
_SESSION_FIELD: Final = 3  # of /proc/<pid>/stat, after the name
_SWEEPS: Final = 5
_DRAIN_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Start:
    """What a plugin process is started with.

    Attributes:
        program: the checked program.
        arguments: without the program's name.
        environment: all of it but the mark.
    """

    program: Program
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)


class PluginProcess:
    """A running plugin.

    Attributes:
        pid: its process id, which is its session and process group as well.
        gone: done once the process has ended; its result says how.
    """

    def __init__(self, process: subprocess.Popen[bytes], mark: str, lines: LineLog) -> None:
        self._process = process
        self._mark = mark
        self._loop = asyncio.get_running_loop()
        self._tasks = Tasks(self._cleaning_failed)
        self._lines = lines
        self._first: asyncio.Future[bytes] = self._loop.create_future()
        self._failure_pipe = -1
        self._pipes: list[LinePipe] = []
        self._cleaned: asyncio.Future[None] = self._loop.create_future()
        self.pid = process.pid
        self.gone: asyncio.Future[str] = self._loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(self._pidfd, self._ended)

    @classmethod
    async def start(cls, what: Start, lines: LineLog) -> PluginProcess:
        """Start a plugin; its standard error goes to `lines`.

        Must run in a thread that lives as long as the host: when the thread ends, the kernel
        kills the plugin.

        Raises:
            UnavailableError: no process could be made.
        """
        mark = secrets.token_hex(16)
        failure, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            process = _spawn(what, mark, theirs)
        except OSError as e:
            os.close(failure)
            raise UnavailableError(f"no process can be started: {e.strerror}") from e
        finally:
            os.close(theirs)
        made = cls(process, mark, lines)
        made._failure_pipe = failure
        try:
            await made._listen()
        except BaseException:
            await made.end()
            raise
        return made

    async def _listen(self) -> None:
        first = _FirstLine(self._first)
        for stream, take in (
            (self._process.stdout, first.take),
            (self._process.stderr, self._lines.write),
        ):
            assert stream is not None  # noqa: S101 - Popen was asked for both
            _, pipe = await self._loop.connect_read_pipe(_pipe_of(take), stream)
            self._pipes.append(pipe)
        self._pipes[0].ended.add_done_callback(first.ended)

    async def first_line(self, limit_s: float) -> bytes:
        """Return the first line of its standard output; the rest of that output is dropped.

        Raises:
            UnavailableError: it could not be executed, ended, or said nothing in time.
            EncodingError: the line is too long.
        """
        try:
            async with asyncio.timeout(limit_s):
                await self._first_or_end()
        except TimeoutError as e:
            raise UnavailableError(
                f"the program did not say within {limit_s:g} s where it listens; is it a plugin?"
                + self.said()
            ) from e
        if self._first.done():
            line = self._first.result()
            if len(line) > MAX_LINE_BYTES:
                raise EncodingError("plugin's first line", f"over {MAX_LINE_BYTES} bytes")
            if line:
                return line
        if not self.gone.done():
            await asyncio.wait({self.gone}, timeout=_DRAIN_S)
        if self.gone.done():
            await self._drained()
        raise UnavailableError(self._why_not_up())

    async def _first_or_end(self) -> None:
        """Wait for the first line, or for the end of a process that has not closed its output."""
        waiting: set[asyncio.Future[bytes] | asyncio.Future[str]] = {self._first, self.gone}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    def _why_not_up(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            number = int(os.read(self._failure_pipe, _ERRNO_BYTES))
            whose = " (a script's interpreter?)" if number == errno.ENOENT else ""
            return f"the program cannot be executed: {os.strerror(number)}{whose}"
        if not self.gone.done():
            return "the program closed its standard output without saying where it listens"
        return f"the program ended ({self.gone.result()}) before it was up" + self.said()

    def said(self) -> str:
        """Return `; it said: ...` with its last words, "" when there are none."""
        words = self._lines.last_words
        return f"; it said: {words}" if words else ""

    def kill(self) -> None:
        """End it and its process group at once."""
        if not self.gone.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            # The group is there only once the child has made its session. Not by `Popen`: it might
            # reap the process, and its number could be somebody else's then.
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def end(self, grace_s: float = 0.0) -> None:
        """Wait for its end, kill it when that takes too long, and clear away what it left."""
        if grace_s and not self.gone.done():
            await asyncio.wait({self.gone}, timeout=grace_s)
        self.kill()
        await asyncio.shield(self._cleaned)

    def owns(self, pid: int) -> bool:
        """Tell whether a process is the plugin or was started by it and stayed in its session."""
        if pid == self.pid:
            return not self.gone.done()
        return _session_of(pid) == self.pid

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # Not reaped yet: until then nobody else gets the number of process, group and session.
        how = _how_it_ended(self.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.gone.set_result(how)
        self._tasks.start(f"clear away plugin {self.pid}", self._clean())

    async def _clean(self) -> None:
        try:
            await asyncio.to_thread(_sweep, self.pid, self._mark)
            self._process.wait()
            await self._drained()
            for pipe in self._pipes:
                pipe.close()
            if self._failure_pipe >= 0:
                os.close(self._failure_pipe)
                self._failure_pipe = -1
        finally:
            self._cleaned.set_result(None)

    async def _drained(self) -> None:
        """Wait for what is still in the pipes of a process that has ended."""
        waiting = [pipe.ended for pipe in self._pipes if not pipe.ended.done()]
        if waiting:
            await asyncio.wait(waiting, timeout=_DRAIN_S)
        self._lines.tell_dropped()

    def _cleaning_failed(self, name: str, error: BaseException) -> None:
        self._lines.complain(name, error)


class _FirstLine:
    """Keeps the first line, drops the rest."""

    def __init__(self, future: asyncio.Future[bytes]) -> None:
        self._future = future

    def take(self, line: bytes) -> None:
        if not self._future.done():
            self._future.set_result(line)

    def ended(self, _: object) -> None:
        if not self._future.done():
            self._future.set_result(b"")


def _pipe_of(take: Callable[[bytes], None]) -> Callable[[], LinePipe]:
    return lambda: LinePipe(take)


def _spawn(what: Start, mark: str, failure: int) -> subprocess.Popen[bytes]:
    program = what.program
    kept = (failure,) if program.image < 0 else (failure, program.image)
    head = [*_PYTHON, str(os.getpid()), str(failure), str(program.image), str(program.path)]
    return subprocess.Popen(  # noqa: S603 - what the operator configured
        [*head, *what.arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**what.environment, MARK: mark},
        pass_fds=kept,
        start_new_session=True,
    )


def _how_it_ended(pid: int) -> str:
    """Say how a process ended, without reaping it."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # somebody else in this process has reaped it
        found = None
    if found is None:
        return "nobody knows how"
    word = "exit status" if found.si_code == os.CLD_EXITED else "signal"
    return f"{word} {found.si_status}"


# -- what a plugin leaves behind -------------------------------------------------------------


def _sweep(session: int, mark: str) -> None:
    """Kill every process of a session or with a mark; several times, for they may be forking."""
    wanted = f"{MARK}={mark}".encode()
    for _ in range(_SWEEPS):
        if not sum(_kill_if(pid, session, wanted) for pid in _pids()):
            return


def _pids() -> list[int]:
    own = os.getpid()
    names = (entry.name for entry in os.scandir("/proc"))
    return [pid for name in names if name.isdecimal() and (pid := int(name)) != own]


def _kill_if(pid: int, session: int, wanted: bytes) -> bool:
    """Kill a process that belongs to the plugin; tell whether it did."""
    if pid == session or not _belongs(pid, session, wanted):
        return False
    try:
        held = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Once more, now that the number cannot pass to another process.
        if not _belongs(pid, session, wanted):
            return False
        signal.pidfd_send_signal(held, signal.SIGKILL)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(held)


def _belongs(pid: int, session: int, wanted: bytes) -> bool:
    return _session_of(pid) == session or wanted in _environ_of(pid)


def _session_of(pid: int) -> int:
    """Return the session of a living process, 0 when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    fields = stat.rpartition(b")")[2].split()
    return 0 if fields[0] in {b"Z", b"X"} else int(fields[_SESSION_FIELD])


def _environ_of(pid: int) -> list[bytes]:
    try:
        with Path(f"/proc/{pid}/environ").open("rb") as stream:
            return stream.read(_MAX_ENVIRON_BYTES).split(b"\0")
    except OSError:
        return []
