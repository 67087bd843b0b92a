"""What waits for a device or a signer: urgent ones first, then each key in its turn (pure)."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

# Urgent ones served in a row while others wait: a flood of handshakes must not end all renewals.
_URGENT_RUN: Final = 16


class Waiting(Protocol):
    """Something that waits."""

    @property
    def lane(self) -> Hashable:
        """Return what it takes turns for: a key's id."""
        ...

    @property
    def is_urgent(self) -> bool:
        """Tell whether it goes before those that are not."""
        ...

    @property
    def is_over(self) -> bool:
        """Tell whether nobody waits for it any more."""
        ...


T = TypeVar("T", bound=Waiting)


class Queues(Generic[T]):
    """Two queues, each of which takes its lanes in turns.

    Where only so many may wait, each of the two is sure of half the room, and each lane of a fair
    share of that: who takes more gives way, its youngest first.
    """

    def __init__(self) -> None:
        self._urgent: _Lanes[T] = _Lanes()
        self._others: _Lanes[T] = _Lanes()
        self._run = 0

    def __len__(self) -> int:
        """Return how many wait."""
        return self._urgent.size + self._others.size

    def push(self, job: T, *, first: bool = False) -> None:
        """Add one, at the end of its lane or at its head."""
        (self._urgent if job.is_urgent else self._others).push(job, first=first)

    def admit(self, job: T, limit: int) -> T | None:
        """Add one where no more than `limit` may wait; return who has no room: another, or this."""
        if len(self) < limit:
            self.push(job)
            return None
        if job.is_urgent:
            own, other, share = self._urgent, self._others, (limit + 1) // 2
        else:
            own, other, share = self._others, self._urgent, limit // 2
        # Among its like, no lane is made longer than the one that gives way to it.
        gone = other.pop_last(0) if own.size < share else own.pop_last(own.length(job.lane) + 1)
        if gone is None:
            return job
        self.push(job)
        return gone

    def last(self) -> T | None:
        """Return the one that has to go next when there is too little room, None when none waits."""
        return self._larger().last()

    def pop_last(self) -> T | None:
        """Take out what `last` returns."""
        return self._larger().pop_last(0)

    def take(self, most: int) -> list[T]:
        """Return the next ones that somebody still waits for, those of one lane side by side."""
        jobs = self._urgent.take(min(most, self._room()))
        self._run += len(jobs)
        if len(jobs) < most and self._others.size:
            jobs += self._others.take(most - len(jobs))
            self._run = 0
        return [job for job in jobs if not job.is_over]

    def _larger(self) -> _Lanes[T]:
        return self._urgent if self._urgent.size > self._others.size else self._others

    def _room(self) -> int:
        return max(0, _URGENT_RUN - self._run) if self._others.size else self._urgent.size

    def waiting(self, *, urgent: bool) -> int:
        """Return how many wait in one of the two."""
        return (self._urgent if urgent else self._others).size

    def take_of(self, most: int, *, urgent: bool) -> list[T]:
        """Return the next ones of one of the two, as `take` does."""
        jobs = (self._urgent if urgent else self._others).take(most)
        return [job for job in jobs if not job.is_over]

    def drop_over(self) -> None:
        """Forget those in front that nobody waits for: they would keep others out."""
        self._urgent.drop_over()
        self._others.drop_over()


class _Lanes(Generic[T]):
    def __init__(self) -> None:
        self.size = 0
        self._lanes: OrderedDict[Hashable, deque[T]] = OrderedDict()

    def push(self, job: T, *, first: bool = False) -> None:
        lane = self._lanes.get(job.lane)
        if lane is None:
            lane = self._lanes[job.lane] = deque()
        if first:
            lane.appendleft(job)
        else:
            lane.append(job)
        self.size += 1

    def take(self, most: int) -> list[T]:
        jobs: list[T] = []
        while self._lanes and len(jobs) < most:
            # A fair share of each lane at a stretch: neighbours that are alike cost less.
            name, lane = next(iter(self._lanes.items()))
            share = -(-(most - len(jobs)) // len(self._lanes))
            jobs += [lane.popleft() for _ in range(min(share, len(lane)))]
            if lane:
                self._lanes.move_to_end(name)
            else:
                del self._lanes[name]
        self.size -= len(jobs)
        return jobs

    def length(self, name: Hashable) -> int:
        return len(self._lanes.get(name, ()))

    def last(self) -> T | None:
        return self._lanes[self._longest()][-1] if self._lanes else None

    def pop_last(self, longer_than: int) -> T | None:
        """Take the youngest out of the longest lane; None when that is no longer than this."""
        if not self._lanes:
            return None
        name = self._longest()
        lane = self._lanes[name]
        if len(lane) <= longer_than:
            return None
        job = lane.pop()
        self.size -= 1
        if not lane:
            del self._lanes[name]
        return job

    def _longest(self) -> Hashable:
        return max(self._lanes, key=lambda name: len(self._lanes[name]))

    def drop_over(self) -> None:
        for name, lane in list(self._heads_over()):
            while lane and lane[0].is_over:
                lane.popleft()
                self.size -= 1
            if not lane:
                del self._lanes[name]

    def _heads_over(self) -> Iterator[tuple[Hashable, deque[T]]]:
        return ((name, lane) for name, lane in self._lanes.items() if lane[0].is_over)
