"""One exchange in time: every round of it within one limit, and ended when it has to make room."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from spire_hw.errors import ErrorKind, LimitError, SpireHwError
from spire_hw_plugins.nodeattestor.tpm.rounds import MAX_ROUNDS
from spire_hw_plugins.nodeattestor.tpm.statements import refusal

if TYPE_CHECKING:
    from spire_hw.clock import Clock
    from spire_hw.plugin.nodeattestor import Challenge
    from spire_hw_plugins.nodeattestor.tpm.exchanges import Place


class Talk:
    """The node's end of an exchange.

    Args:
        challenge: one round trip.
        place: what the exchange holds.
        clock: the limit is measured by its monotonic time.
        limit_s: for all rounds together.
    """

    def __init__(self, challenge: Challenge, place: Place, clock: Clock, limit_s: float) -> None:
        self._challenge = challenge
        self._place = place
        self._clock = clock
        self._limit_s = limit_s
        self._end: float | None = None
        self._rounds = 0

    async def ask(self, message: bytes) -> bytes:
        """Send a challenge and return the answer, if it comes in time.

        Raises:
            LimitError: another exchange took the place, or there were too many rounds.
            AttestationError: `challenge_timeout`.
            SpireHwError: the stream ended.
        """
        self._rounds += 1
        if self._rounds > MAX_ROUNDS:
            raise LimitError(f"ima: list needs more than {MAX_ROUNDS} rounds")
        now = self._clock.monotonic()
        if self._end is None:
            self._end = now + self._limit_s
        answer = await self._answer(message, self._end - now)
        self._place.check()
        if isinstance(answer, SpireHwError):
            raise answer
        if answer is None or self._clock.monotonic() > self._end:
            text = f"challenge: not answered in {self._limit_s:g} s"
            raise refusal("challenge_timeout", text, ErrorKind.DEADLINE_EXCEEDED)
        return answer

    async def _answer(self, message: bytes, left_s: float) -> bytes | SpireHwError | None:
        scope = asyncio.timeout(None)

        def end() -> None:
            if not scope.expired():
                scope.reschedule(asyncio.get_running_loop().time())

        timer = self._clock.call_after(left_s, end)
        try:
            async with scope:
                with self._place.interrupted_by(end):
                    return await self._challenge(message)
        except SpireHwError as e:
            return e
        except TimeoutError:
            if not scope.expired():
                raise
            return None
        finally:
            timer.cancel()
