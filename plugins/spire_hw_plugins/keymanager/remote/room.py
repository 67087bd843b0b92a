"""How many signatures may be under way at a signer: what it takes by itself, and what it refused (pure).

All times are seconds of one clock that never goes back; who asks hands them in.
"""

from __future__ import annotations

from typing import Final

# What a policy lets be under way where it does not say (`max_in_flight`). Signers keep a part of it
# for what is urgent, and find less to be urgent than we do.
MOST: Final = 256
MOST_OTHERS: Final = 224
_LEARNT_S: Final = 10.0  # then it may be more again
_PAUSE_S: Final = (0.02, 1.0)


class Room:
    """What is under way, and how much more may be.

    Attributes:
        under_way: how many signatures a signer was asked for and has not answered.
        opens_at: until then nothing more may be; 0 when that is not so.
    """

    def __init__(self) -> None:
        self.under_way = 0
        self.opens_at = 0.0
        self._most = {True: MOST, False: MOST_OTHERS}
        self._learnt_until = 0.0

    def left(self, now: float, *, urgent: bool) -> int:
        """Return how many more may be under way."""
        if now < self.opens_at:
            return 0
        if self._learnt_until and now >= self._learnt_until:
            self._most = {True: MOST, False: MOST_OTHERS}
            self._learnt_until = 0.0
        return max(0, self._most[urgent] - self.under_way)

    def refused(self, count: int, of: int, wait_s: float, now: float, *, urgent: bool) -> None:
        """Take in that some were too many.

        Args:
            count: how many were refused.
            of: how many were under way with them, themselves included.
            wait_s: what the signer says when it may work.
            now: the time.
            urgent: whether they were urgent.
        """
        self._most[urgent] = max(1, min(self._most[urgent], of - count))
        self._learnt_until = now + _LEARNT_S
        if of <= count:
            # Nothing of ours was in the way: somebody else has taken all the room.
            shortest_s, longest_s = _PAUSE_S
            self.opens_at = now + min(longest_s, max(shortest_s, wait_s))
