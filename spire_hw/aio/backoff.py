"""How long to wait between tries."""

from __future__ import annotations

import secrets

_JITTER_STEPS = 1000


class Backoff:
    """Exponential spacing with jitter: each wait is 50 to 100 % of a bound that grows to a cap."""

    def __init__(self, first_s: float, cap_s: float, factor: float = 1.5) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self._factor = factor
        self._bound_s = first_s

    def next_s(self, most_s: float | None = None) -> float:
        """Return the seconds to wait before the next try.

        Args:
            most_s: a lower cap for this once.
        """
        bound = self._bound_s
        self._bound_s = min(self._cap_s, bound * self._factor)
        if most_s is not None:
            bound = min(bound, most_s)
        return bound * (0.5 + 0.5 * secrets.randbelow(_JITTER_STEPS) / _JITTER_STEPS)

    def reset(self) -> None:
        """Start over after a success."""
        self._bound_s = self._first_s
