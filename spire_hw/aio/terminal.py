"""A secret that somebody enters at the terminal from which a program was started."""

from __future__ import annotations

import asyncio
import os
import termios
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from spire_hw.errors import NotReadyError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATH: Final = "/dev/tty"
_LINE_BYTES: Final = 4096  # a terminal hands on no longer ones
_LOCAL_MODES: Final = 3  # where `tcgetattr` has them


async def ask_hidden(prompt: str, limit_s: float) -> bytes:
    """Ask at the terminal, show nothing of the answer, and leave the terminal as it was.

    The loop goes on meanwhile, so Ctrl-C and signals end the program as ever.

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
                    answer = await _readable(terminal)
            except TimeoutError:
                raise NotReadyError(f"nobody answered at the terminal for {limit_s:g} s") from None
            finally:
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


async def _readable(terminal: int) -> bytes:
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
    hidden = list(before)
    hidden[_LOCAL_MODES] &= ~termios.ECHO
    hidden[_LOCAL_MODES] |= termios.ICANON
    termios.tcsetattr(terminal, termios.TCSAFLUSH, hidden)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
