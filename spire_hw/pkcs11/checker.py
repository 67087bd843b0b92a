"""Verifies what the token signed and sends all answers, in order; has a thread of its own for that.

Signing and verifying are both C code that lets go of the interpreter, so the token is asked for the
next batch while the last one is verified. The thread never calls the PKCS#11 module. Signatures of
a key with a table are verified where they were made: two threads would lose more time in getting
out of each other's way.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from spire_hw.pkcs11.wire import Kind, encode_results

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spire_hw.pkcs11.known import Signed


@dataclass(frozen=True, slots=True)
class _Batch:
    number: int
    signed: Sequence[Signed]

    def body(self, *, quickly: bool) -> bytes:
        results = (one.results(quickly=quickly) for one in self.signed)
        return encode_results([*chain.from_iterable(results)])


@dataclass(frozen=True, slots=True)
class _Answer:
    kind: Kind
    number: int
    body: bytes


class Checker:
    """Verifies and answers; used by one thread, closed by `close`."""

    def __init__(self, send: Callable[[Kind, int, bytes], None]) -> None:
        self._send = send
        self._queue: queue.Queue[_Batch | _Answer | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="checker", daemon=True)
        self._thread.start()

    def answer(self, kind: Kind, number: int, body: bytes) -> None:
        """Send an answer after those before it.

        Raises:
            OSError: the host has gone.
        """
        if self._queue.unfinished_tasks:
            self._queue.put(_Answer(kind, number, body))
        else:
            self._send(kind, number, body)

    def check(self, number: int, signed: Sequence[Signed]) -> None:
        """Verify what the token made of a SIGN frame and answer it; raises as `answer` does."""
        batch = _Batch(number, signed)
        if all(one.is_quick for one in signed):
            self.answer(Kind.OK, number, batch.body(quickly=True))
        else:
            self._queue.put(batch)

    def close(self) -> None:
        """Send what is left and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (task := self._queue.get()) is not None:
                if isinstance(task, _Answer):
                    self._send(task.kind, task.number, task.body)
                else:
                    self._send(Kind.OK, task.number, task.body(quickly=False))
                    for one in task.signed:
                        one.afterwards()
                self._queue.task_done()
        except OSError:
            # The host has gone; the main thread learns it from the same socket.
            return
