"""Lines into a pipe, socket or terminal whose reader may have stopped reading.

Serving matters more than its log: a full pipe holds up the writer once, for a moment; after that lines are
refused until the reader goes on. The descriptor itself stays blocking, for others may share it.
"""

from __future__ import annotations

import os
import select
import stat
from typing import Final

PATIENCE_MS: Final = 200
# What a pipe that polls as writable takes without blocking, pipe(7).
_CHUNK: Final = select.PIPE_BUF


def may_block(descriptor: int) -> bool:
    """Tell whether writing to a descriptor depends on somebody who reads."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


class LinePipe:
    """Writes whole lines or refuses them.

    Args:
        descriptor: stays the caller's, who closes it.
        patience_ms: how long a reader that has just stopped is waited for.
    """

    def __init__(self, descriptor: int, *, patience_ms: int = PATIENCE_MS) -> None:
        self._descriptor = descriptor
        self._patience_ms = patience_ms
        self._is_stuck = False
        self._is_torn = False
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write(self, line: bytes) -> bool:
        """Write a line and tell whether it went out.

        Raises:
            OSError: nobody reads any more.
        """
        data = memoryview(b"\n" + line if self._is_torn else line)
        while data:
            if not self._poll.poll(0 if self._is_stuck else self._patience_ms):
                self._is_stuck = True
                return False
            written = os.write(self._descriptor, data[:_CHUNK])
            data = data[written:]
            self._is_torn = bool(data)
        self._is_stuck = False
        return True
