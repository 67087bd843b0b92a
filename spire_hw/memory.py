"""Memory that start-up left behind, given back to the system."""

from __future__ import annotations

import ctypes
import gc
from typing import Final

_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2


def limit_arenas() -> None:
    """Have threads share two heaps instead of each taking its own; before threads start.

    Source: mallopt(3). Where the C library has no such call nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


def settle() -> None:
    """Drop the garbage of start-up, return free pages, and take what is left out of collections.

    Source: malloc_trim(3).
    """
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
