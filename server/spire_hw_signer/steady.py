"""Time that cannot be turned back or forward while the signer runs.

Intervals and budgets of keys are counted in it, for they go on over restarts; rates and replays go by
the monotonic clock itself. The wall clock is only read at the start and when an operator says that it
is right; how far it has moved away since tells whether ends of certificates can be judged at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from spire_hw.clock import Clock

MAX_SKEW_S: Final = 300.0


class SteadyTime:
    """Unix seconds by the monotonic clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._base = 0.0
        self.anchor()

    def anchor(self, not_before: float = 0.0) -> None:
        """Take the wall clock for right, from now on.

        Args:
            not_before: Unix seconds that have passed already, whatever the wall clock says.
        """
        wall = self._clock.now().timestamp()
        self._base = max(wall, not_before) - self._clock.monotonic()

    def now(self) -> float:
        """Return the time, Unix seconds."""
        return self._base + self._clock.monotonic()

    def skew_s(self) -> float:
        """Return how far the wall clock is ahead."""
        return self._clock.now().timestamp() - self.now()

    def is_sane(self) -> bool:
        """Tell whether the wall clock can be believed."""
        return abs(self.skew_s()) <= MAX_SKEW_S
