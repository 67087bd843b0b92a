"""What every Prometheus client tells about its process, read from /proc when asked.

Source: prometheus.io, "Writing client libraries", process metrics; proc(5).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.telemetry.registry import Kind, Reading

if TYPE_CHECKING:
    from collections.abc import Iterator

_SELF: Final = Path("/proc/self")
# Fields of /proc/self/stat behind the command, which may hold spaces.
_UTIME, _STIME, _START, _VSIZE, _RSS = 11, 12, 19, 20, 21


def read_process() -> Iterator[Reading]:
    """Return processor time, memory, descriptors and start of this process."""
    fields = (_SELF / "stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    booted = _boot_time()
    busy = (int(fields[_UTIME]) + int(fields[_STIME])) / ticks
    yield _one("process_cpu_seconds_total", Kind.COUNTER, busy)
    yield _one("process_open_fds", Kind.GAUGE, len(list((_SELF / "fd").iterdir())) - 1)
    resident = int(fields[_RSS]) * os.sysconf("SC_PAGE_SIZE")
    yield _one("process_resident_memory_bytes", Kind.GAUGE, resident)
    yield _one("process_start_time_seconds", Kind.GAUGE, booted + int(fields[_START]) / ticks)
    yield _one("process_virtual_memory_bytes", Kind.GAUGE, int(fields[_VSIZE]))


def _boot_time() -> float:
    with Path("/proc/stat").open() as lines:
        return next((float(x.split()[1]) for x in lines if x.startswith("btime ")), 0.0)


def _one(name: str, kind: Kind, value: float) -> Reading:
    return Reading(name, kind, (((), float(value)),))
