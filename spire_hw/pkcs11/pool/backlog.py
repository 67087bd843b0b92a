"""Signatures that wait for a worker of one token: no more than it can make while callers wait.

How many that are shows in what its workers' last answers took. What comes beyond that is refused
when it comes; what was let in before the token became slow is refused as soon as it is known that
its turn would come too late. Who has to go when a key with less, or something urgent, comes is for
`spire_hw.aio.queues` to say.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from spire_hw.aio.queues import Queues
from spire_hw.errors import LimitError, SpireHwError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.pkcs11.wire import SignItem

# Of the time that callers wait: what is let in has to be made although a few answers take longer.
_SURE: Final = 0.9
_SHORTEST_S: Final = 1e-6


class Job:
    """A signature that somebody waits for."""

    __slots__ = ("deadline", "future", "is_urgent", "item", "lane", "retried")

    def __init__(self, item: SignItem, future: asyncio.Future[bytes], deadline: float) -> None:
        self.item = item
        self.future = future
        self.deadline = deadline
        self.lane = item.key.cka_id
        self.is_urgent = item.options.urgent
        self.retried = False

    @property
    def is_over(self) -> bool:
        """Tell whether nobody waits for it any more."""
        return self.future.done()

    def settle(self, result: bytes | SpireHwError) -> None:
        """Tell whoever still waits how it ended."""
        if self.future.done():
            return
        if isinstance(result, bytes):
            self.future.set_result(result)
        else:
            self.future.set_exception(result)


class Backlog:
    """Bounded queues of one token.

    Args:
        most: signatures that may wait however fast the token is.
        wait_s: seconds a caller waits at most.
    """

    def __init__(self, most: int, wait_s: float) -> None:
        self._most = most
        self._wait_s = wait_s
        self._queues: Queues[Job] = Queues()
        self._known_room = most
        self._workers = 0
        # Signatures a second; 0 while it is not known.
        self._rate = 0.0
        self._known_until = 0.0

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._queues)

    def add(self, job: Job) -> None:
        """Let one in; another that has to go for it is refused.

        Raises:
            LimitError: there is no room for it.
        """
        if len(self._queues) < self._known_room:
            self._queues.push(job)
            return
        gone = self._queues.admit(job, self._room())
        if gone is job:
            raise self._full()
        if gone is not None:
            gone.settle(self._full())

    def again(self, job: Job) -> None:
        """Put one that a worker lost at the head of its lane; it was let in before."""
        self._queues.push(job, first=True)

    def take(self, most: int) -> list[Job]:
        """Return the next ones that somebody still waits for."""
        return self._queues.take(most)

    def drop_over(self) -> None:
        """Forget those in front that nobody waits for."""
        self._queues.drop_over()

    def refuse_all(self, error: SpireHwError) -> None:
        """Tell all that wait that they wait in vain."""
        while (job := self._queues.pop_last()) is not None:
            job.settle(error)

    def learn(self, paces: Sequence[float | None]) -> None:
        """Take in how fast the token is, and refuse at once what it will not get to in time.

        Args:
            paces: seconds a signature takes, for each worker that is ready; None where it is not
                known, which counts as the mean of the others.
        """
        known = [1 / max(pace, _SHORTEST_S) for pace in paces if pace is not None]
        self._workers = len(paces)
        self._rate = len(paces) * sum(known) / len(known) if known else 0.0
        now = asyncio.get_running_loop().time()
        # An idle token may have become another one: what it did then refuses nobody now.
        self._known_until = now + self._wait_s
        self._known_room = self._room()
        if not known or self._in_time() >= self._most:
            return
        while (job := self._queues.last()) is not None:
            ahead = len(self._queues) - 1 + self._workers
            if (job.deadline - now) * self._rate > ahead:
                break
            self._queues.pop_last()
            job.settle(self._full())

    def _room(self) -> int:
        """Return how many may wait."""
        if not self._rate or asyncio.get_running_loop().time() > self._known_until:
            return self._most
        return max(1, min(self._most, self._in_time()))

    def _in_time(self) -> int:
        """Return how many may wait and still be made before their callers give up."""
        return int(_SURE * self._wait_s * self._rate) - self._workers

    def _full(self) -> LimitError:
        room = self._room()
        slow = f": token signs {self._rate:.2g} a second" if room < self._most else ""
        return LimitError(f"signing queue full ({room}){slow}")
