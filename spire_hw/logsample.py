"""How often a line that others can cause at will is written: some at once, then the count."""

from __future__ import annotations

from collections.abc import Hashable  # noqa: TC003 - public signatures stay real
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from spire_hw.clock import Clock

_REST: Final = "the rest"


class Sampler:
    """Lets a number of lines through for each key and period; bounded in memory.

    Args:
        burst: lines of one key in one period.
        period_s: how long a period lasts, from its first line on.
        max_keys: keys beyond share one count.
    """

    def __init__(
        self, clock: Clock, *, burst: int = 10, period_s: float = 60.0, max_keys: int = 1024
    ) -> None:
        self._clock = clock
        self._burst = burst
        self._period_s = period_s
        self._max_keys = max_keys
        # key -> [start of the period, lines in it]
        self._seen: dict[Hashable, list[float]] = {}

    def admit(self, key: Hashable) -> int | None:
        """Return None when this line is to be left out, else how many were since the last one."""
        now = self._clock.monotonic()
        if key not in self._seen and len(self._seen) >= self._max_keys:
            self._drop_ended(now)
            if len(self._seen) >= self._max_keys:
                key = _REST
        period = self._seen.setdefault(key, [now, 0.0])
        left_out = 0
        if now - period[0] >= self._period_s:
            left_out = max(0, int(period[1]) - self._burst)
            period[:] = [now, 0.0]
        period[1] += 1
        return left_out if period[1] <= self._burst else None

    def _drop_ended(self, now: float) -> None:
        for key in [k for k, (start, _) in self._seen.items() if now - start >= self._period_s]:
            del self._seen[key]
