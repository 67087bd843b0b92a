"""How often what failed may be tried again: a tenth of what is asked, and never all at once (pure)."""

from __future__ import annotations

import secrets
from typing import Final

_STEPS: Final = 1000


class RetryBudget:
    """Retries earned by requests: one for ten, and a few to begin with."""

    def __init__(self, share: float = 0.1, reserve: float = 10.0) -> None:
        """Describe the budget.

        Args:
            share: retries for each request.
            reserve: retries that can be saved up; there are as many at the start.
        """
        self._share = share
        self._reserve = reserve
        self._left = reserve

    def earn(self) -> None:
        """Count a request that is not a retry."""
        self._left = min(self._reserve, self._left + self._share)

    def spend(self) -> bool:
        """Take a retry; False when there is none left."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


def jitter_s(attempt: int, first_s: float = 0.02, cap_s: float = 1.0) -> float:
    """Return how long to wait before a retry: anything up to a bound that doubles each time.

    Args:
        attempt: 1 for the first retry.
        first_s: its bound.
        cap_s: where the bound stops to grow.
    """
    bound: float = min(cap_s, first_s * 2 ** (attempt - 1))
    return bound * secrets.randbelow(_STEPS) / _STEPS
