"""Request ids of signatures that were asked for a short while ago (pure).

The same id with the same content is a retry and gets the same answer; with other content it is
refused. What is remembered is bounded in time and number, per client.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

T = TypeVar("T")

MAX_REMEMBERED: Final = 32_768


@dataclass(slots=True)
class Asked(Generic[T]):
    """A request that was let through.

    Attributes:
        content: what it was, for comparison.
        at: when, in seconds of the caller's clock.
        answer: what came of it, or will.
    """

    content: object
    at: float
    answer: T


class ReuseError(Exception):
    """The id was used for something else."""


class Replay(Generic[T]):
    """The request ids of one client."""

    def __init__(self, window_s: float, limit: int = MAX_REMEMBERED) -> None:
        self.window_s = window_s
        self._limit = limit
        # A dict looks at all it has let go of on its way to its first item.
        self._asked: OrderedDict[bytes, Asked[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._asked)

    def find(self, request_id: bytes, content: object, now: float) -> T | None:
        """Return the answer to the same request, None when the id is new.

        Raises:
            ReuseError: the id was used for something else.
        """
        self._expire(now)
        asked = self._asked.get(request_id)
        if asked is None:
            return None
        if asked.content != content:
            raise ReuseError
        return asked.answer

    def remember(self, request_id: bytes, content: object, now: float, answer: T) -> None:
        """Keep a request that is let through."""
        while len(self._asked) >= self._limit:
            self._asked.popitem(last=False)
        self._asked[request_id] = Asked(content, now, answer)

    def forget(self, request_id: bytes) -> None:
        """Let go of a request that came to nothing, so that it may be tried again."""
        self._asked.pop(request_id, None)

    def _expire(self, now: float) -> None:
        while self._asked:
            first = next(iter(self._asked))
            if now - self._asked[first].at < self.window_s:
                return
            del self._asked[first]
