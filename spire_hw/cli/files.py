"""Files that commands are given: to read, `-` for standard input; to write."""

from __future__ import annotations

import sys
from pathlib import Path

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.files import NotWrittenError, read_bounded


def read_input(name: str, limit: int) -> bytes:
    """Return what a file, a pipe or standard input (`-`) holds.

    Args:
        name: as it was given on the command line.
        limit: bytes it may have.

    Raises:
        NotReadyError: it cannot be read.
        InvalidInputError: it is larger.
    """
    if name != "-":
        return read_bounded(Path(name), limit, pipes=True)
    try:
        content = sys.stdin.buffer.read(limit + 1)
    except OSError as e:
        raise NotReadyError(f"standard input cannot be read: {e.strerror}") from e
    if len(content) > limit:
        raise InvalidInputError(f"standard input is larger than {limit} bytes")
    return content


def write_output(name: str, content: bytes) -> None:
    """Write what a command made to a file or a pipe such as /dev/stdout; permissions by the umask.

    Raises:
        NotWrittenError: it cannot be written.
    """
    try:
        Path(name).write_bytes(content)
    except OSError as e:
        raise NotWrittenError(f"{name} cannot be written: {e.strerror}") from e
