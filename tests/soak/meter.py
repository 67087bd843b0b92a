"""What a process holds: bytes on its heap, descriptors, threads, tasks; and whether that grows.

Bytes are glibc's own count, so that OpenSSL's and SQLite's are in it as well as Python's, and one
small object for each repetition stands out. That takes an environment: `ENVIRONMENT` has Python take
all its memory from there, in one arena and without caches of threads.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import statistics
import threading
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from spire_hw.errors import SpireHwError

if TYPE_CHECKING:
    from collections.abc import Sequence

ENVIRONMENT: Final = {
    "PYTHONMALLOC": "malloc",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1",
}
# Less than the smallest object and the place where it is kept.
MOST_BYTES_EACH: Final = 16
MOST_BYTES: Final = 1 << 20
# By how much OpenSSL's pools differ from one look to the next, whatever is done in between.
NOISE_BYTES: Final = 2048
# Of descriptors, threads and tasks, for each repetition.
MOST_EACH: Final = 0.02
# More than asyncio keeps of timers that were cancelled.
_TIMERS: Final = 256


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _read_mallinfo() -> _Mallinfo:
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        raise SpireHwError("memory can be counted only in a process started with ENVIRONMENT")
    read = ctypes.CDLL(None).mallinfo2
    read.restype = _Mallinfo
    made: _Mallinfo = read()
    return made


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds at one moment.

    Attributes:
        heap: bytes in use.
        resident: bytes of memory it occupies.
        files: open descriptors.
        threads: running.
        tasks: of the running loop, 0 without one.
    """

    heap: int
    resident: int
    files: int
    threads: int
    tasks: int

    @classmethod
    def now(cls, tasks: int = 0) -> Held:
        """Read it, after garbage was collected."""
        gc.collect()
        found = _read_mallinfo()
        return cls(
            heap=found.uordblks + found.hblkhd,
            resident=psutil.Process().memory_info().rss,
            files=sum(1 for _ in Path("/proc/self/fd").iterdir()),
            threads=threading.active_count(),
            tasks=tasks,
        )

    @classmethod
    async def settled(cls, most_tasks: int | None = None, wait_s: float = 5) -> Held:
        """Read it in a loop, as soon as there are no more tasks than at first, or after a while."""
        end = asyncio.get_running_loop().time() + wait_s
        while True:
            tasks = len(asyncio.all_tasks())
            if most_tasks is None or tasks <= most_tasks:
                break
            if asyncio.get_running_loop().time() > end:
                break
            await asyncio.sleep(0.01)
        for _ in range(_TIMERS):  # asyncio lets go of cancelled timers when they are many
            asyncio.get_running_loop().call_later(wait_s, gc.collect).cancel()
        await asyncio.sleep(0)
        return cls.now(tasks)


@dataclass(frozen=True, slots=True)
class Growth:
    """How much more a process holds after many repetitions.

    Attributes:
        times: repetitions that were measured.
        heap: bytes more for each repetition, in the median slice.
        files: descriptors, likewise.
        threads: likewise.
        tasks: likewise.
        bytes: more in all.
        resident: bytes of memory more in all.
    """

    times: int
    heap: float
    files: float
    threads: float
    tasks: float
    bytes: int
    resident: int

    @classmethod
    def of(cls, moments: Sequence[Held], slice_times: int) -> Growth:
        """Compare moments that are each `slice_times` repetitions apart.

        The median of the slices leaves out what happens now and then: a cache that fills, a table
        that grows.
        """

        def rate(name: str, free: int = 0) -> float:
            more = statistics.median(
                getattr(b, name) - getattr(a, name) for a, b in pairwise(moments)
            )
            return max(more - free, 0) / slice_times

        rates = {name: rate(name) for name in ("files", "threads", "tasks")}
        first, last = moments[0], moments[-1]
        times = slice_times * (len(moments) - 1)
        more = last.resident - first.resident
        heap = rate("heap", NOISE_BYTES)
        return cls(times, heap=heap, bytes=last.heap - first.heap, resident=more, **rates)

    def faults(self) -> list[str]:
        """Return what grows that should not."""
        found = []
        if self.heap >= MOST_BYTES_EACH:
            found.append(f"{self.heap:.0f} bytes stay behind each time")
        if self.bytes > MOST_BYTES:
            found.append(f"{self.bytes} bytes stayed behind in all")
        counts = {"files": self.files, "threads": self.threads, "tasks": self.tasks}
        return found + [
            f"{each:.2f} {name} stay behind each time"
            for name, each in counts.items()
            if each > MOST_EACH
        ]
