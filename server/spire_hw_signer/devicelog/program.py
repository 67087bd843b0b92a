"""Runs a program of the operator's that talks to the device: no shell, little around it, all bounded.

It gets a session of its own, a bare environment, the secret on standard input, two pipes to write
into and no other descriptor of ours. When it takes too long, prints too much or is not wanted any
more, it is killed with all of its process group.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import signal
import stat
import subprocess
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from spire_hw.errors import ConfigFault, InvalidInputError, NotReadyError
from spire_hw.files import read_bounded
from spire_hw_signer.devicelog.entries import DeviceLogError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from spire_hw_signer.devicelog.settings import DeviceLogSettings

PROGRAM: Final = "program"
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_ROOT: Final = 0
_MAX_SECRET: Final = 4096
_SECRET: Final = "secret_file"  # noqa: S105 - a key of the configuration
_PIECE: Final = 65_536
_MAX_WORDS: Final = 4096
_SHOWN: Final = 200
_TICK_S: Final = 0.1
_AFTER_END_S: Final = 1.0


def own_users(*more: int) -> frozenset[int]:
    """Return whose files are believed: root's, this process's user's, and those of others that are named."""
    return frozenset((_ROOT, os.geteuid(), *more))


def check_program(path: str, users: Collection[int]) -> None:
    """Make sure that nobody else could put another program in a program's place.

    Args:
        path: absolute.
        users: ids of those whom the file and the directories above it may belong to.

    Raises:
        InvalidInputError: somebody could, or it is no program.
        NotReadyError: there is none.
    """
    try:
        resolved = Path(path).resolve(strict=True)
        found = resolved.stat()
    except (OSError, RuntimeError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise NotReadyError(f"device_log: {path} cannot be run: {reason}") from e
    if not stat.S_ISREG(found.st_mode) or not found.st_mode & 0o111:
        raise InvalidInputError(f"device_log: {path} is not a program; chmod +x it if it is one")
    for place in dict.fromkeys((resolved, *resolved.parents, *Path(path).parents)):
        _check_place(place, f"device_log: {path} is not run", users)


def check_secret(path: Path, users: Collection[int]) -> None:
    """Make sure that only its owner reads a secret.

    Raises:
        InvalidInputError: others can, or it is somebody else's.
        NotReadyError: there is none.
    """
    what = f"device_log: {_SECRET} {path}"
    try:
        found = path.stat()
    except OSError as e:
        raise NotReadyError(f"{what} cannot be read: {e.strerror}") from e
    if not stat.S_ISREG(found.st_mode):
        raise InvalidInputError(f"{what} is not a regular file")
    if found.st_uid not in users:
        raise InvalidInputError(f"{what} belongs to user {found.st_uid}; chown it")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise InvalidInputError(f"{what} has mode {mode:04o}: chmod 0600 it, and change the secret")


def _check_place(place: Path, what: str, users: Collection[int]) -> None:
    try:
        found = place.stat()
    except OSError as e:
        raise NotReadyError(f"{what}: {place} cannot be looked at: {e.strerror}") from e
    if found.st_uid not in users:
        raise InvalidInputError(f"{what}: {place} belongs to user {found.st_uid}")
    is_shared = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & 0o022 and not is_shared:
        mode = stat.S_IMODE(found.st_mode)
        raise InvalidInputError(
            f"{what}: others may write to {place} (mode {mode:04o}); chmod go-w"
        )


def find_faults(settings: DeviceLogSettings, data_dir: Path) -> Iterator[ConfigFault]:
    """Find programs and a secret that the signer would not take.

    Args:
        settings: what names them.
        data_dir: of the signer; its owner is the user the signer runs as, where it is there already.
    """
    try:
        users = own_users(data_dir.stat().st_uid)
    except OSError:
        users = own_users()
    checks = [partial(check_program, command[0], users) for command in settings.programs]
    if settings.secret_file is not None:
        checks.append(partial(check_secret, settings.secret_file, users))
    for check in checks:
        try:
            check()
        except (InvalidInputError, NotReadyError) as e:
            yield ConfigFault(0, e.message)


async def run(
    command: Sequence[str], secret_file: Path | None, *, timeout_s: float, limit: int
) -> bytes:
    """Run a program to its end and return what it printed.

    Args:
        command: program and arguments.
        secret_file: given to it on standard input, None for nothing.
        timeout_s: it is killed after that.
        limit: bytes it may print.

    Raises:
        DeviceLogError: it may not be run, could not be, failed, took too long or printed too much.
    """
    unwanted = threading.Event()
    work = partial(_run, command, secret_file, timeout_s, limit, unwanted)
    running = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        unwanted.set()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()
        raise


def _run(
    command: Sequence[str],
    secret_file: Path | None,
    timeout_s: float,
    limit: int,
    unwanted: threading.Event,
) -> bytes:
    secret = b""
    try:
        check_program(command[0], own_users())
        if secret_file is not None:
            check_secret(secret_file, own_users())
            secret = read_bounded(secret_file, _MAX_SECRET, f"device_log: {_SECRET}")
    except (InvalidInputError, NotReadyError) as e:
        raise DeviceLogError(PROGRAM, e.message) from e
    try:
        process = subprocess.Popen(  # noqa: S603 - what the operator configured
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            cwd="/",
            umask=0o077,
            start_new_session=True,
        )
        with _Child(process, command[0], limit) as child:
            return child.hear(secret, timeout_s, unwanted)
    except OSError as e:
        raise DeviceLogError(PROGRAM, f"{command[0]} cannot be run: {e.strerror}") from e


class _Child:
    """A program that runs; it is gone at the end of the block."""

    def __init__(self, process: subprocess.Popen[bytes], name: str, limit: int) -> None:
        self._process = process
        self._name = name
        self._limit = limit
        self._output = bytearray()
        self._words = bytearray()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Not reaped yet: until then nobody else gets the number of process and group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._stack.close()
        # Only a program that took other rights is still there, and beyond our reach.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_AFTER_END_S)

    def hear(self, secret: bytes, timeout_s: float, unwanted: threading.Event) -> bytes:
        """Give it the secret, and return what it printed once it has ended well."""
        process = self._process
        assert process.stdin is not None  # noqa: S101 - Popen was asked for all three
        assert process.stdout is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        for stream in (process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)
            self._stack.enter_context(stream)
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(secret)  # shorter than a pipe is: it does not wait
        end = os.pidfd_open(process.pid)
        self._stack.callback(os.close, end)
        selector = self._stack.enter_context(selectors.DefaultSelector())
        selector.register(process.stdout, selectors.EVENT_READ, self._output)
        selector.register(process.stderr, selectors.EVENT_READ, self._words)
        selector.register(end, selectors.EVENT_READ, None)
        self._listen(selector, timeout_s, unwanted)
        status = self._status()
        if status:
            raise self._failed(f"failed ({status})")
        return bytes(self._output)

    def _listen(
        self, selector: selectors.BaseSelector, timeout_s: float, unwanted: threading.Event
    ) -> None:
        """Read until the program has ended and its pipes are closed."""
        late, why = time.monotonic() + timeout_s, f"did not end within {timeout_s:g} s"
        while selector.get_map():
            if unwanted.is_set():
                raise self._failed("was not wanted any more")
            if time.monotonic() >= late:
                raise self._failed(why)
            for key, _ in selector.select(_TICK_S):
                if key.data is None:
                    selector.unregister(key.fd)
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(self._process.pid, signal.SIGKILL)  # what it left behind
                    after = time.monotonic() + _AFTER_END_S
                    if after < late:
                        late, why = after, "left a process behind that holds its output"
                elif not self._take(key.fd, key.data):
                    selector.unregister(key.fileobj)

    def _take(self, descriptor: int, into: bytearray) -> bool:
        """Take what is there; tell whether there may be more."""
        try:
            piece = os.read(descriptor, _PIECE)
        except BlockingIOError:
            return True
        if into is self._words:
            into += piece[: _MAX_WORDS - len(into)]
        else:
            into += piece
            if len(into) > self._limit:
                raise self._failed(f"printed more than {self._limit} bytes")
        return bool(piece)

    def _status(self) -> str:
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        if found is None or (found.si_code == os.CLD_EXITED and not found.si_status):
            return ""
        word = "exit status" if found.si_code == os.CLD_EXITED else "signal"
        return f"{word} {found.si_status}"

    def _failed(self, how: str) -> DeviceLogError:
        words = " ".join(self._words.decode("ascii", "replace").split())
        shown = "".join(c if c.isprintable() else "?" for c in words)[-_SHOWN:]
        said = f"; it said: {shown}" if shown else ""
        return DeviceLogError(PROGRAM, f"{self._name} {how}{said}")
