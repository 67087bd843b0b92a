"""A program on a terminal of its own, and somebody who sits there."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import termios
import time
from typing import TYPE_CHECKING, Final, Self

from spire_hw_sim.programs import ProgramError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# What makes a terminal that of a session, and has signals do what they do under a shell, whoever ignores
# them here; the program itself follows.
_TAKE: Final = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "[signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)];"
    "os.execv(sys.argv[1], sys.argv[1:])"
)
_LOCAL_MODES: Final = 3


class Terminal:
    """Runs a program as a shell does: what it says is on the screen, its keys are the keyboard's."""

    def __init__(
        self, interpreter: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> None:
        """Start it.

        Args:
            interpreter: a Python that becomes the program.
            command: argument vector, the first an absolute path.
            env: added to this process's environment.
        """
        self.screen = ""
        self._keys, inside = pty.openpty()
        self._process = subprocess.Popen(
            [interpreter, "-c", _TAKE, *command],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        os.close(inside)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._keys)

    @property
    def pid(self) -> int:
        """Return the process id of the program."""
        return self._process.pid

    @property
    def shows_keys(self) -> bool:
        """Tell whether what is typed can be seen."""
        modes: int = termios.tcgetattr(self._keys)[_LOCAL_MODES]
        return bool(modes & termios.ECHO)

    def see(self, text: str, timeout_s: float = 30) -> None:
        """Wait until a text is on the screen.

        Raises:
            ProgramError: it does not appear.
        """
        deadline = time.monotonic() + timeout_s
        while text not in self.screen:
            if not self._look(deadline - time.monotonic()):
                raise ProgramError(f"{text!r} is not on the screen:\n{self.screen}")

    def type(self, keys: str) -> None:
        """Type; a line ends in a line feed, character 3 is Ctrl-C and 4 is Ctrl-D."""
        os.write(self._keys, keys.encode())

    def terminate(self) -> None:
        """End the program as an operator does."""
        self._process.send_signal(signal.SIGTERM)

    def end(self, timeout_s: float = 30) -> int:
        """Wait until the program ends, and return its exit status.

        Raises:
            ProgramError: it goes on.
        """
        deadline = time.monotonic() + timeout_s
        while self._look(deadline - time.monotonic()):
            pass
        try:
            return self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise ProgramError(f"the program goes on:\n{self.screen}") from None

    def _look(self, timeout_s: float) -> bool:
        """Read what is new on the screen; False when nothing comes, or nobody is left to write."""
        ready, _, _ = select.select([self._keys], [], [], max(0.0, timeout_s))
        if not ready:
            return False
        try:
            data = os.read(self._keys, 4096)
        except OSError:  # the program has closed the terminal
            return False
        self.screen += data.decode("utf-8", "replace")
        return bool(data)
