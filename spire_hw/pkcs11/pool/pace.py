"""How fast a worker signs, from what its last answers took (pure)."""

from __future__ import annotations

from collections import deque
from typing import Final

# A token that takes longer over a signature gets one batch at a time: what is urgent waits for less.
_SLOW_S: Final = 0.005
_BATCH_TARGET_S: Final = 0.02
_SMOOTHING: Final = 0.2
# The pace that others are told: the median of the last answers, of no fewer, none of them older.
_LAST: Final = 5
_FEWEST: Final = 3
_FRESH_S: Final = 60.0


class Pace:
    """What a signature takes in one worker."""

    def __init__(self) -> None:
        self._item_s = 0.0
        self._last_answer = 0.0
        self._last: deque[tuple[float, float]] = deque(maxlen=_LAST)

    @property
    def settled_s(self) -> float | None:
        """Return the seconds a signature takes, None while too few were made.

        One answer that took long, or two, say nothing about the next ones.
        """
        if len(self._last) < _FEWEST:
            return None
        return sorted(each for _, each in self._last)[len(self._last) // 2]

    def is_quick(self, waiting_s: float) -> bool:
        """Tell whether a batch may follow another that has been with the token for some seconds."""
        return self._item_s < _SLOW_S and waiting_s < _BATCH_TARGET_S

    def batch_limit(self, most: int) -> int:
        """Return how many items keep the worker busy for a short while."""
        if self._item_s <= 0.0:
            return 1  # many of a token that is slow would look as if it hung
        return max(1, min(most, int(_BATCH_TARGET_S / self._item_s)))

    def measured(self, sent_at: float, answered_at: float, items: int) -> None:
        """Learn from a batch; times in seconds of one clock."""
        each = (answered_at - max(sent_at, self._last_answer)) / items
        self._last_answer = answered_at
        if self._item_s == 0.0:
            self._item_s = each
        self._item_s += _SMOOTHING * (each - self._item_s)
        while self._last and self._last[0][0] < answered_at - _FRESH_S:
            self._last.popleft()
        self._last.append((answered_at, each))

    def forget(self) -> None:
        """Begin anew with one item at a time: a batch was not made in the time it may take."""
        self._item_s = 0.0
        self._last.clear()
