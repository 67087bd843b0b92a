"""What a peer may cost us: a budget for frames that bring no call on, an account of held bytes (pure).

Source: RFC 9113 section 10.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_BURST: Final = 1_000.0
_REFILL_PER_S: Final = 100.0
# A connection holds this much whatever the others do.
FREE_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Windows:
    """How much a peer may send ahead of its reader.

    Attributes:
        stream: bytes per stream.
        connection: bytes on all streams together.
        held: bytes of messages that are incomplete, unread or worked on, on all streams together.
    """

    stream: int
    connection: int
    held: int


class Budget:
    """Costs of frames: a burst, then a rate; answers that the peer takes earn some back."""

    __slots__ = ("_at", "_left")

    def __init__(self, now: float) -> None:
        self._left = _BURST
        self._at = now

    def spend(self, cost: float, now: float) -> bool:
        """Take a cost; tell whether there was enough left."""
        self._left -= cost
        if self._left < 0:
            self._left = min(_BURST, self._left + (now - self._at) * _REFILL_PER_S)
            self._at = now
        return self._left >= 0

    def earn(self, amount: float) -> None:
        """Give something back."""
        self._left = min(_BURST, self._left + amount)


class Pool:
    """Bytes that the connections of one kind of caller may hold together.

    Attributes:
        limit: how many.
        used: by all connections, what each holds for free left out.
    """

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0


class Account:
    """Bytes of messages that one connection holds: incomplete, unread or being worked on.

    The first `FREE_BYTES` are its own, so one caller cannot crowd out another's ordinary calls;
    what goes beyond counts in the pool.

    Attributes:
        held: now.
    """

    __slots__ = ("_drawn", "_limit", "_pool", "held")

    def __init__(self, limit: int, pool: Pool) -> None:
        self.held = 0
        self._limit = limit
        self._pool = pool
        self._drawn = 0

    def add(self, count: int) -> bool:
        """Note so many bytes more, or fewer; tell whether that many may be held."""
        self.held += count
        drawn = max(0, self.held - FREE_BYTES)
        if drawn == self._drawn:
            return True
        pool = self._pool
        pool.used += drawn - self._drawn
        self._drawn = drawn
        return count <= 0 or (self.held <= self._limit and pool.used <= pool.limit)
