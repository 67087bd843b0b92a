"""A secret that somebody enters at the terminal from which a program was started."""

from __future__ import annotations

import asyncio
import os
import signal
import termios
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import NotReadyError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATH: Final = "/dev/tty"
_LINE_BYTES: Final = 4096  # a terminal hands on no longer ones
# Where `tcgetattr` has them.
_INPUT_MODES: Final = 0
_LOCAL_MODES: Final = 3
_KEYS: Final = 6
_ENDS: Final = (signal.SIGTERM, signal.SIGHUP)


async def ask_hidden(prompt: str, limit_s: float) -> bytes:
    """Ask at the terminal, show nothing of the answer, and leave the terminal as it was.

    The loop goes on meanwhile, so Ctrl-C and signals end the program as ever. Ctrl-Z does not stop it: a
    shell that goes on with a stopped program shows again what is typed.

    Args:
        prompt: what is asked for, one line without its colon.
        limit_s: how long to wait for the answer.

    Returns:
        The line without its end, at most 4095 bytes.

    Raises:
        NotReadyError: there is no terminal, it is not the program's turn there, or nobody answered.
    """
    try:
        terminal = os.open(_PATH, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise NotReadyError("the program was not started from a terminal") from e
    try:
        # To change a terminal from the background would stop the program.
        if os.tcgetpgrp(terminal) != os.getpgrp():
            raise NotReadyError("the program runs in the background of its terminal")
        with _hidden(terminal):
            os.write(terminal, f"{prompt}: ".encode())
            try:
                async with asyncio.timeout(limit_s):
                    answer = await _line(terminal)
            except TimeoutError:
                raise NotReadyError(f"nobody answered at the terminal for {limit_s:g} s") from None
            finally:
                with suppress(OSError):  # a terminal that is gone needs no new line
                    os.write(terminal, b"\n")
    except OSError as e:
        raise NotReadyError(f"the terminal cannot be used: {e.strerror}") from e
    except termios.error as e:
        raise NotReadyError(f"the terminal cannot be used: {e.args[-1]}") from e
    finally:
        os.close(terminal)
    if not answer.endswith(b"\n"):
        raise NotReadyError("the terminal was closed")
    return answer[:-1]


async def _line(terminal: int) -> bytes:
    """Return a line once there is one, b"" at the end of input."""
    loop = asyncio.get_running_loop()
    while True:
        ready = asyncio.Event()
        loop.add_reader(terminal, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(terminal)
        try:
            return os.read(terminal, _LINE_BYTES)
        except BlockingIOError:  # somebody else took the line
            continue


@contextmanager
def _hidden(terminal: int) -> Iterator[None]:
    """Have the terminal show nothing that is entered; what was entered before is let go of."""
    before = termios.tcgetattr(terminal)
    hidden = termios.tcgetattr(terminal)
    hidden[_INPUT_MODES] &= ~termios.IXON
    hidden[_LOCAL_MODES] &= ~termios.ECHO
    hidden[_LOCAL_MODES] |= termios.ICANON
    for key in (termios.VSUSP, termios.VQUIT):
        hidden[_KEYS][key] = b"\0"
    termios.tcsetattr(terminal, termios.TCSAFLUSH, hidden)
    try:
        with _restored_by_signals(terminal, before):
            yield
    finally:
        _restore(terminal, before)


def _restore(terminal: int, modes: list[Any]) -> None:
    # Also from the background, where somebody may have put the program meanwhile.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        with suppress(termios.error):  # it is gone
            termios.tcsetattr(terminal, termios.TCSAFLUSH, modes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def _restored_by_signals(terminal: int, modes: list[Any]) -> Iterator[None]:
    """Have signals that end the program at once leave the terminal as it was."""
    loop = asyncio.get_running_loop()
    is_main = threading.current_thread() is threading.main_thread()
    deadly = [s for s in _ENDS if is_main and signal.getsignal(s) is signal.SIG_DFL]

    def end(number: signal.Signals) -> None:
        _restore(terminal, modes)
        loop.remove_signal_handler(number)
        signal.raise_signal(number)

    for number in deadly:
        loop.add_signal_handler(number, end, number)
    try:
        yield
    finally:
        for number in deadly:
            loop.remove_signal_handler(number)
