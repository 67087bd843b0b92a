"""Has signatures verified that a token's workers sent: here when they are few, else by processes.

A verification takes longer than a fast token's signature, so a busy token's are left to processes of
their own: the host's loop must not stand still for them. Those processes are none of those which
hold the token's library. The first one is started when it is needed first, another one when batches
keep finding all of them at work: with few cores that is what keeps each of them busy.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import SpireHwError
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.known import KnownKeys
from spire_hw.pkcs11.pool.process import VERIFIER, WorkerProcess
from spire_hw.pkcs11.pool.verifier import verified_body
from spire_hw.pkcs11.wire import Kind, encode_verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.log import Logger
    from spire_hw.pkcs11.pool.process import Launch

# So many are verified on the spot: less than handing them over costs a host that has time.
_FEW: Final = 2
_LIMIT_S: Final = 10.0
_START_EVERY_S: Final = 5.0
# Batches that found no process idle, less those that did, before another one is started.
_OFTEN: Final = 8
_CLOSE_S: Final = 5.0


class Verifying:
    """Verifies for the workers of one token.

    Args:
        launch: how those are started; their environment is the processes', too.
        most: how many processes there may be.
    """

    def __init__(self, launch: Launch, most: int, log: Logger) -> None:
        self._launch = replace(launch, command=VERIFIER)
        self._most = most
        self._log = log
        self._processes: list[WorkerProcess] = []
        self._waits = 0
        self._tasks = Tasks(self._on_failure)
        self._next_start = 0.0
        self._is_closed = False
        # Of the loop's thread, and of the one thread that steps in for the processes.
        self._keys, self._thread_keys = KnownKeys(), KnownKeys()
        self._stepping_in = asyncio.Lock()

    @property
    def pids(self) -> list[int]:
        """Return the ids of the processes there are."""
        return [process.pid for process in self._processes]

    def verify(
        self,
        items: bytes,
        results: bytes,
        count: int,
        done: Callable[[bytes | SpireHwError], None],
    ) -> None:
        """Verify what a token made.

        Args:
            items: body of the SIGN frame.
            results: body of the answer to it; hostile.
            count: how many signatures were asked for.
            done: gets the body of results that may leave, or an error; later or at once.
        """
        body = encode_verify(items, results)
        if count <= _FEW:
            done(_here(self._keys, body))
            return
        alive = [process for process in self._processes if process.is_alive]
        if not alive:
            self._start()
            self._step_in(body, done)
            return
        process = min(alive, key=lambda p: p.depth)
        self._waits = max(0, self._waits + (1 if process.depth else -1))
        if self._waits >= _OFTEN and len(alive) < self._most:
            self._start()
        answer = process.ask(Kind.VERIFY, body, limit_s=_LIMIT_S, what="verify")
        answer.add_done_callback(lambda a: self._answered(a, body, done))

    def _answered(
        self,
        answer: asyncio.Future[bytes],
        body: bytes,
        done: Callable[[bytes | SpireHwError], None],
    ) -> None:
        error = answer.exception()
        if error is None:
            done(answer.result())
        elif isinstance(error, TokenError) and error.reason == "hsm.odd":
            done(error)
        else:
            # The process has gone; what it was to verify is none the worse for it.
            self._step_in(body, done)

    def _step_in(self, body: bytes, done: Callable[[bytes | SpireHwError], None]) -> None:
        if self._is_closed:
            done(_here(self._keys, body))
        else:
            self._tasks.start("hsm-verify", self._in_thread(body, done))

    async def _in_thread(self, body: bytes, done: Callable[[bytes | SpireHwError], None]) -> None:
        async with self._stepping_in:
            result = await asyncio.to_thread(_here, self._thread_keys, body)
        done(result)

    def _start(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_start and not self._is_closed:
            self._next_start = now + _START_EVERY_S
            self._waits = 0
            self._tasks.start("hsm-verifier", self._start_process())

    async def _start_process(self) -> None:
        process = await WorkerProcess.start(self._launch, "verifier")
        self._processes = [*(p for p in self._processes if p.is_alive), process]

    async def close(self) -> None:
        """End the processes; what is verified after that is verified here."""
        self._is_closed = True
        await self._tasks.close()
        await asyncio.gather(*(process.close(_CLOSE_S) for process in self._processes))

    def _on_failure(self, name: str, error: BaseException) -> None:
        self._log.error("hsm.verifier_failed", task=name, error=str(error))


def _here(keys: KnownKeys, body: bytes) -> bytes | SpireHwError:
    try:
        return verified_body(keys, body)
    except SpireHwError as e:
        return e
