"""Runs the real programs (`spire-hw-server`, `spire-hw-agent`) as children, for demo and tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_MODULES = {
    "spire-hw-server": "spire_hw_server",
    "spire-hw-agent": "spire_hw_agent",
    "spire-hw-signer": "spire_hw_signer",
}


class ProgramError(Exception):
    """A program that failed or did not get ready; the message holds the end of its output."""


def command_line(program: str, *arguments: str | Path) -> list[str]:
    """Return the argument vector that runs a program.

    Args:
        program: the name of one of ours, run with this interpreter, or the path of any other.
        arguments: of its command line.
    """
    start = [program] if "/" in program else [sys.executable, "-m", _MODULES[program]]
    return [*start, *map(str, arguments)]


def run(
    program: str,
    *arguments: str | Path,
    timeout_s: float = 60,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a command of ours to its end and return what it printed.

    Raises:
        ProgramError: exit status other than 0.
    """
    done = try_run(program, *arguments, timeout_s=timeout_s, env=env)
    if done.returncode:
        shown = " ".join([program, *map(str, arguments)])
        raise ProgramError(f"{shown}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def try_run(
    program: str,
    *arguments: str | Path,
    timeout_s: float = 60,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command of ours to its end, whatever its exit status."""
    return subprocess.run(
        command_line(program, *arguments),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, **(env or {})},
    )


class Program:
    """One of our programs running in the background with its log in a file."""

    def __init__(
        self,
        program: str,
        arguments: Sequence[str | Path],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """Start it.

        Args:
            program: its name.
            arguments: of its command line.
            log: takes its output, appended.
            env: added to this process's environment.
            prefix: a command that becomes the program, such as `prlimit --fsize=0`.
        """
        self.name = program
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [*prefix, *command_line(program, *arguments)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._process.poll()

    def log_text(self) -> str:
        """Return everything it logged so far."""
        return self.log.read_text(errors="replace")

    def wait_until_healthy(self, *healthcheck: str | Path, timeout_s: float = 30) -> None:
        """Wait until its `healthcheck` succeeds.

        Raises:
            ProgramError: it ended or did not become healthy in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.exit_status is not None:
                raise ProgramError(
                    f"{self.name} ended with status {self.exit_status}:\n{self._tail()}"
                )
            if try_run(self.name, "healthcheck", *healthcheck).returncode == 0:
                return
        raise ProgramError(f"{self.name} is not healthy after {timeout_s:g} s:\n{self._tail()}")

    def wait_for_exit(self, timeout_s: float = 30) -> int:
        """Wait until it ends by itself and return its status.

        Raises:
            ProgramError: it goes on.
        """
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ProgramError(
                f"{self.name} still runs after {timeout_s:g} s:\n{self._tail()}"
            ) from None

    def stop(self, timeout_s: float = 20) -> int:
        """Ask it to stop and return its exit status; kill it when it does not."""
        if self.exit_status is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._process.wait()

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        if self.exit_status is None:
            self._process.kill()
            self._process.wait()

    def _tail(self, lines: int = 20) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])


@contextmanager
def running(
    program: str, arguments: Sequence[str | Path], log: Path, *healthcheck: str | Path
) -> Iterator[Program]:
    """Run a program that is healthy from the first moment on, and stop it in the end.

    Args:
        program: its name.
        arguments: of its command line.
        log: takes its output, appended.
        healthcheck: arguments of its `healthcheck`.

    Raises:
        ProgramError: it ended or did not become healthy in time.
    """
    started = Program(program, arguments, log)
    try:
        started.wait_until_healthy(*healthcheck)
        yield started
    finally:
        started.stop()
