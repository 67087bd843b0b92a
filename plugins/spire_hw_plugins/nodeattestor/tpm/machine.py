"""What the kernel shows an agent about its machine: boot log, list of measured files.

The places are the operator's to set and never come over the wire.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.errors import LimitError, NotReadyError
from spire_hw.tpm import eventlog, imalist

if TYPE_CHECKING:
    from collections.abc import Iterator

BOOT_LOG: Final = Path("/sys/kernel/security/tpm0/binary_bios_measurements")
IMA_LOG: Final = Path("/sys/kernel/security/ima/ascii_runtime_measurements")


class NoLogError(NotReadyError):
    """The kernel keeps no such log on this machine."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where to look.

    Attributes:
        boot_log_path: firmware's log, in the TCG's format.
        ima_log_path: the kernel's list, in ASCII.
    """

    boot_log_path: Path = BOOT_LOG
    ima_log_path: Path = IMA_LOG

    def boot_log(self) -> bytes:
        """Return the whole boot log.

        Raises:
            NoLogError: there is none.
            NotReadyError: it cannot be read.
            LimitError: larger than any server takes.
        """
        return _read(self.boot_log_path, eventlog.MAX_BYTES, "log", "boot log")

    def ima_list(self) -> ImaList:
        """Return the list as it is now; the kernel goes on with it.

        Raises:
            NoLogError: there is none.
            NotReadyError: it cannot be read.
            LimitError: larger than any server takes.
        """
        raw = _read(self.ima_log_path, imalist.MAX_BYTES, "ima", "IMA list")
        return ImaList(raw[: raw.rfind(b"\n") + 1])

    def ima_entries(self) -> int | None:
        """Return how many entries the list has, None when it cannot be told."""
        try:
            text = (self.ima_log_path.parent / "runtime_measurements_count").read_text("ascii")
            return int(text) if text.strip().isdecimal() else None
        except (OSError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class ImaList:
    """A snapshot of the kernel's list, line by line."""

    raw: bytes

    def part(self, start: int, room: int) -> tuple[bytes, int]:
        """Return whole lines from one entry on, and how many entries are left after them.

        Args:
            start: number of the first entry, at most `len(self)`.
            room: bytes the part may have; one line is returned even if it has more.
        """
        begin = 0
        for _ in range(start):
            begin = self.raw.index(b"\n", begin) + 1
        if len(self.raw) - begin <= room:
            return self.raw[begin:], 0
        end = self.raw.rfind(b"\n", begin, begin + room) + 1
        if end <= begin:
            end = self.raw.index(b"\n", begin) + 1
        return self.raw[begin:end], self.raw.count(b"\n", end)

    def parts(self, start: int, room: int) -> Iterator[bytes]:
        """Yield everything from one entry on as `part` would; an empty part when nothing is left."""
        left = 1
        while left:
            lines, left = self.part(start, room)
            start += lines.count(b"\n")
            yield lines

    def __len__(self) -> int:
        """Return the number of entries."""
        return self.raw.count(b"\n")


def compress(data: bytes) -> bytes:
    """Return data as servers take it."""
    return zlib.compress(data)


def _read(path: Path, limit: int, stage: str, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)  # the kernel's files tell no size
    except FileNotFoundError as e:
        raise NoLogError(f"{stage}: this machine has no {what} at {path}") from e
    except OSError as e:
        raise NotReadyError(
            f"{stage}: the {what} at {path} cannot be read: {e.strerror}; the kernel shows it to "
            "root alone (CAP_DAC_READ_SEARCH is enough for the agent)"
        ) from e
    if len(data) > limit:
        raise LimitError(f"{stage}: larger than {limit} bytes")
    return data
