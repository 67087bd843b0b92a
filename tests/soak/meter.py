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
# Queues of bounded length fill and empty meanwhile: this is held against the least there is.
MOST_BYTES: Final = 1 << 20
# What pools of OpenSSL and SQLite take once, however often something is done.
POOLS_BYTES: Final = 192 << 10
# By how much pools differ from one look to another: sqlite3 keeps 200 references to closed cursors.
NOISE_BYTES: Final = 16_384
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
        heap: bytes more for each repetition.
        files: descriptors, likewise.
        threads: likewise.
        tasks: likewise.
        bytes: more in all.
        floor: likewise, the least of the second half against the least of the first.
        resident: bytes of memory more in all.
    """

    times: int
    heap: float
    files: float
    threads: float
    tasks: float
    bytes: int
    floor: int
    resident: int

    @classmethod
    def of(cls, moments: Sequence[Held], slice_times: int) -> Growth:
        """Compare moments that are each `slice_times` repetitions apart.

        What is given back now and then, as lists of cursors and of cancelled timers are, does not
        count: the least that is held in the first half is compared with the least in the second.
        Nor does what comes once: the median of the slices is the other bound.
        """
        half = len(moments) // 2
        apart = (len(moments) - half) * slice_times

        def rate(name: str, noise: int = 0) -> float:
            held: list[int] = [getattr(moment, name) for moment in moments]
            usual = statistics.median(b - a for a, b in pairwise(held)) / slice_times
            least = (min(held[-half:]) - min(held[:half]) - noise) / apart
            return max(min(usual, least), 0)

        first, last = moments[0], moments[-1]
        return cls(
            times=slice_times * (len(moments) - 1),
            heap=rate("heap", NOISE_BYTES),
            files=rate("files"),
            threads=rate("threads"),
            tasks=rate("tasks"),
            bytes=last.heap - first.heap,
            floor=min(m.heap for m in moments[-half:]) - min(m.heap for m in moments[:half]),
            resident=last.resident - first.resident,
        )

    def faults(self) -> list[str]:
        """Return what grows that should not."""
        found = []
        if self.heap >= MOST_BYTES_EACH and self.bytes > POOLS_BYTES:
            found.append(f"{self.heap:.0f} bytes stay behind each time")
        if self.floor > MOST_BYTES:
            found.append(f"{self.floor} bytes stayed behind in all")
        counts = {"files": self.files, "threads": self.threads, "tasks": self.tasks}
        return found + [
            f"{each:.2f} {name} stay behind each time"
            for name, each in counts.items()
            if each > MOST_EACH
        ]
