"""Signals that arrive while a program still loads."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType


def end_quietly(args: Sequence[str]) -> None:
    """Have SIGTERM and SIGINT end `run` with status 0 until its event loop takes them over.

    Nothing has been written or opened by then. Other commands keep what the shell expects.

    Args:
        args: the arguments without the program's name.
    """
    if list(args[:1]) == ["run"]:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    os._exit(0)  # an exception could end in whatever is being imported
