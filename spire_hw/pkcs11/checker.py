"""Verifies what the token signed and sends all answers, in order; has a thread of its own for that.

A pipeline: while one signature is verified, the token makes the next. Both are C code that lets go
of the interpreter's lock (python-pkcs11 around C_Sign, `cryptography` around a verification), so
they use two cores. What was signed is handed over some at a time, since each handing over may cost
a change of threads. The checker's thread never calls the PKCS#11 module.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.pkcs11.known import Signed
from spire_hw.pkcs11.wire import Kind, encode_results

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from spire_hw.key import SignOptions
    from spire_hw.pkcs11.errors import TokenError
    from spire_hw.pkcs11.known import KnownKey, Refused

# Groups under way: more than a host sends, so that a quick token is held up only by a slow core.
MAX_GROUPS: Final = 64
_GROUP: Final = 8
# A slow token's signatures are verified one by one, so that the last of a batch waits for none.
_GROUP_S: Final = 0.001


def groups(
    key: KnownKey,
    options: SignOptions,
    digests: Sequence[bytes],
    raws: Iterable[bytes | TokenError],
) -> Iterator[Signed]:
    """Divide what a token signs into groups to verify, each as soon as it is complete.

    Args:
        key: the key to verify with.
        options: how the digests were to be signed.
        digests: what was to be signed.
        raws: output or error for each digest; asked for one after the other.
    """
    start, since = 0, time.monotonic()
    made: list[bytes | TokenError] = []
    for raw in raws:
        made.append(raw)
        if len(made) == _GROUP or time.monotonic() - since > _GROUP_S:
            end = start + len(made)
            yield Signed(key, options, digests[start:end], made)
            start, since, made = end, time.monotonic(), []
    if made:
        yield Signed(key, options, digests[start:], made)


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer to send; without a body it is what was verified since the answer before."""

    kind: Kind
    number: int
    body: bytes | None = None


class Checker:
    """Verifies and answers; used by one thread, closed by `close`."""

    def __init__(self, send: Callable[[Kind, int, bytes], None]) -> None:
        self._send = send
        self._queue: queue.Queue[Signed | Refused | _Answer | None] = queue.Queue(MAX_GROUPS)
        self._thread = threading.Thread(target=self._run, name="checker", daemon=True)
        self._thread.start()

    def check(self, some: Signed | Refused) -> None:
        """Have a part of a batch verified; waits while too much is under way."""
        self._queue.put(some)

    def answer_signed(self, number: int) -> None:
        """Answer the SIGN frame whose parts were given to `check` since the answer before."""
        self._queue.put(_Answer(Kind.OK, number))

    def answer(self, kind: Kind, number: int, body: bytes) -> None:
        """Send an answer after those before it."""
        self._queue.put(_Answer(kind, number, body))

    def close(self) -> None:
        """Send what is left and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        results: list[bytes | TokenError] = []
        is_there = True
        while (task := self._queue.get()) is not None:
            if not is_there:
                continue
            if not isinstance(task, _Answer):
                results += task.results()
                continue
            body = task.body
            if body is None:
                body, results = encode_results(results), []
            try:
                self._send(task.kind, task.number, body)
            except OSError:
                # The host has gone; the main thread learns it from the same socket.
                is_there = False
