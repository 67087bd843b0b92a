"""Replaced key pairs wait here to be destroyed; none is dropped because a token was busy.

A pair that the token has refused to destroy a number of times is tried once a day from then on: it
may never go, and must neither fill the log nor keep the device busy.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.aio.backoff import Backoff
from spire_hw.errors import SpireHwError
from spire_hw.pkcs11.wire import Kind, pack_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.pkcs11.pool.pool import Pool

_DAY_S: Final = 86400.0
_FIRST_S: Final = 1.0
_CAP_S: Final = 60.0
# Where one pair waits alone, the last three pauses are the longest.
_TRIES: Final = 10


@dataclass(slots=True)
class _Waiting:
    """A pair.

    Attributes:
        label: its label.
        tries: how often the token refused to destroy it.
        due: when it may be tried, seconds of the clock that never go back.
    """

    label: str
    tries: int = 0
    due: float = 0.0


class Disposal:
    """Destroys pairs one after the other, private halves first."""

    def __init__(self, pool: Pool, clock: Clock, log: Logger) -> None:
        self._pool = pool
        self._clock = clock
        self._log = log
        self._waiting: dict[bytes, _Waiting] = {}
        self._pause = Backoff(_FIRST_S, _CAP_S, factor=2.0)
        self._turn = asyncio.Lock()
        self._woken = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()

    @property
    def waiting(self) -> int:
        """Return how many pairs are still to be destroyed."""
        return len(self._waiting)

    def add(self, pairs: Iterable[tuple[bytes, str]]) -> None:
        """Queue pairs, given as (CKA_ID, label)."""
        new = {i: label for i, label in pairs if i not in self._waiting}
        self._waiting |= {i: _Waiting(label) for i, label in new.items()}
        self._show()
        if new:
            self._emptied.clear()
            self._pause.reset()
            self._woken.set()

    async def wait_empty(self) -> None:
        """Return once nothing is left to be destroyed."""
        await self._emptied.wait()

    async def now(self) -> int:
        """Try once to destroy everything that waits; return how many pairs went."""
        before = len(self._waiting)
        for cka_id in list(self._waiting):
            await self._destroy(cka_id)
        return before - len(self._waiting)

    async def run(self) -> None:
        """Destroy what is queued, with growing pauses when the token refuses; never ends."""
        while True:
            self._woken.clear()
            pause: float | None = None
            if self._waiting:
                # What was refused least goes first: one pair that cannot go must not keep others.
                cka_id, pair = min(self._waiting.items(), key=lambda w: (w[1].due, w[1].tries))
                pause = pair.due - self._clock.monotonic()
                if pause <= 0:
                    if await self._destroy(cka_id):
                        self._pause.reset()
                        continue
                    pause = self._pause.next_s()
            await self._rest(pause)

    async def _rest(self, seconds: float | None) -> None:
        """Wait until something is added, no longer than some seconds."""
        timer = None if seconds is None else self._clock.call_after(seconds, self._woken.set)
        try:
            await self._woken.wait()
        finally:
            if timer is not None:
                timer.cancel()

    def _show(self) -> None:
        labels = {"hsm": self._pool.facts.device}
        self._pool.metrics.gauge(("hsm", "keys_awaiting_disposal"), len(self._waiting), labels)

    async def _destroy(self, cka_id: bytes) -> bool:
        """Return whether a pair is gone now."""
        async with self._turn:
            # Who cannot wait for its turn may have been there first.
            pair = self._waiting.get(cka_id)
            return pair is None or await self._ask(cka_id, pair)

    async def _ask(self, cka_id: bytes, pair: _Waiting) -> bool:
        pool = self._pool
        # A token that is away refuses nothing.
        is_there = pool.broken is None and pool.admin_problem is None
        try:
            await pool.ask(
                Kind.DESTROY,
                {"id": pack_bytes(cka_id), "label": pair.label},
                what="destroy key pair",
            )
        except SpireHwError as e:
            pair.tries += is_there
            self._refused(pair, e)
            return False
        self._waiting.pop(cka_id, None)
        self._show()
        if not self._waiting:
            self._emptied.set()
        self._log.info("hsm.key_destroyed", label=pair.label)
        return True

    def _refused(self, pair: _Waiting, error: SpireHwError) -> None:
        is_stuck = pair.tries >= _TRIES
        if is_stuck:
            pair.due = self._clock.monotonic() + _DAY_S
        self._log.warning(
            "hsm.disposal_failed",
            label=pair.label,
            error=error.message,
            waiting=len(self._waiting),
            again="in a day" if is_stuck else "soon",
        )
