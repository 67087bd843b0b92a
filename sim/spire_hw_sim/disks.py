"""File systems for tests: one that is small, one that takes nothing. They need the right to mount."""

from __future__ import annotations

import contextlib
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class CannotMountError(Exception):
    """This process may not mount anything."""


@contextmanager
def small_disk(place: Path, kib: int = 512) -> Iterator[Path]:
    """Mount an empty file system of so many KiB on a new directory.

    Raises:
        CannotMountError: that is not allowed here.
    """
    place.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={kib}k,mode=0700", "tmpfs", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Let nothing be written below a directory.

    Raises:
        CannotMountError: that is not allowed here.
    """
    _mount("--bind", str(place), str(place))
    try:
        _mount("-o", "remount,bind,ro", str(place))
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Use all room there is, to the last byte; return the file that does."""
    filler = disk / "filler"
    for size in (4096, 1):
        with filler.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
            while stream.write(b"x" * size):
                pass
    return filler


def _mount(*args: str) -> None:
    done = subprocess.run(["mount", *args], check=False, capture_output=True, text=True)
    if done.returncode:
        raise CannotMountError(done.stderr.strip())
