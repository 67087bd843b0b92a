"""How many attestations may be open at once, and who has to make room for whom.

An endorsement certificate is public: whoever has seen one can begin an exchange in its owner's
name, though not end it. So the one exchange that an endorsement key may have open is counted by
source: a stranger elsewhere takes nothing from the node. Where a limit is reached, what has been
open for longer than an honest TPM needs gives way; nothing younger is ever broken off. Whoever
allows slow TPMs more time for their answer allows them more time here.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import LimitError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from spire_hw.clock import Clock

MAX_OPEN: Final = 1024
MAX_PER_SOURCE: Final = 4
MAX_PER_EK: Final = 64
GIVE_WAY_S: Final = 10.0
_GIVE_WAY_SHARE: Final = 1 / 3  # of the time for an answer

_BUSY: Final = "envelope: this node is attesting already"
_TOO_MANY: Final = "envelope: too many attestations in progress"
_DISPLACED: Final = "envelope: this attestation made room for a newer one"


@dataclass(slots=True, eq=False)
class Place:
    """One open exchange.

    Attributes:
        ek_hash: of the endorsement key it claims.
        source: where it comes from, "" when the host cannot tell.
        since: monotonic time of its beginning.
    """

    ek_hash: str
    source: str
    since: float
    _refusal: str = ""
    _interrupt: Callable[[], None] | None = None

    def check(self) -> None:
        """Refuse to go on after another exchange took this place.

        Raises:
            LimitError: it did.
        """
        if self._refusal:
            raise LimitError(self._refusal)

    @contextmanager
    def interrupted_by(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """Call a function when another exchange takes this place during the block."""
        self._interrupt = interrupt
        try:
            yield
        finally:
            self._interrupt = None

    def give_way(self, refusal: str) -> None:
        """End this exchange in favour of another, with these words."""
        self._refusal = refusal
        if self._interrupt is not None:
            self._interrupt()


class _Groups:
    """Places by what they have in common, the oldest of each group first."""

    def __init__(self) -> None:
        self._groups: defaultdict[Hashable, OrderedDict[Place, None]] = defaultdict(OrderedDict)

    def add(self, key: Hashable, place: Place) -> None:
        """Put a place, the youngest, into a group."""
        self._groups[key][place] = None

    def remove(self, key: Hashable, place: Place) -> None:
        """Take a place out of a group that it is in."""
        group = self._groups[key]
        del group[place]
        if not group:
            del self._groups[key]

    def of(self, key: Hashable) -> OrderedDict[Place, None]:
        """Return a group, not to be changed."""
        return self._groups.get(key) or OrderedDict()


class Exchanges:
    """The open exchanges of one attestor; all use is on one event loop.

    What a stranger's first message costs here does not depend on how many exchanges are open.
    """

    def __init__(self, clock: Clock, *, max_open: int = MAX_OPEN) -> None:
        self._clock = clock
        self._max_open = max_open
        self._places: OrderedDict[Place, None] = OrderedDict()  # oldest first
        self._groups = _Groups()
        self._give_way_s = GIVE_WAY_S

    def expect(self, timeout_s: float) -> None:
        """Take note of how long an honest TPM may take for its answer."""
        self._give_way_s = max(GIVE_WAY_S, timeout_s * _GIVE_WAY_SHARE)

    def __len__(self) -> int:
        return len(self._places)

    @contextmanager
    def hold(self, ek_hash: str, source: str) -> Iterator[Place]:
        """Hold a place for an exchange.

        Args:
            ek_hash: of the endorsement key it claims.
            source: where it comes from; "" is a source without a limit of its own.

        Raises:
            LimitError: there is none, and none that is old enough to be taken.
        """
        place = Place(ek_hash, source, self._clock.monotonic())
        both, by_source, by_ek = _keys_of(place)
        if self._is_taken(self._groups.of(both), 1):
            raise LimitError(_BUSY)
        if source and self._is_taken(self._groups.of(by_source), MAX_PER_SOURCE):
            raise LimitError(_TOO_MANY)
        if self._is_taken(self._groups.of(by_ek), MAX_PER_EK):
            raise LimitError(_TOO_MANY)
        if self._is_taken(self._places, self._max_open):
            raise LimitError(_TOO_MANY)
        self._places[place] = None
        for key in (both, by_source, by_ek):
            self._groups.add(key, place)
        try:
            yield place
        finally:
            self._remove(place)

    def win(self, place: Place) -> None:
        """Note that an exchange proved its endorsement key: no other one of that key goes on.

        Raises:
            LimitError: another one did before.
        """
        place.check()
        _, _, by_ek = _keys_of(place)
        for other in [p for p in self._groups.of(by_ek) if p is not place]:
            self._remove(other)
            other.give_way(_BUSY)

    def _is_taken(self, held: OrderedDict[Place, None], limit: int) -> bool:
        """Tell whether a limit is reached and its oldest place has to be left alone."""
        if len(held) < limit:
            return False
        oldest = next(iter(held))
        if self._clock.monotonic() - oldest.since < self._give_way_s:
            return True
        self._remove(oldest)
        oldest.give_way(_DISPLACED)
        return False

    def _remove(self, place: Place) -> None:
        """Give a place back; one that was taken is none any more."""
        if place not in self._places:
            return
        del self._places[place]
        for key in _keys_of(place):
            self._groups.remove(key, place)


def _keys_of(place: Place) -> tuple[Hashable, Hashable, Hashable]:
    """Return the groups that a place is in: of key and source, of the source, of the key."""
    return ("both", place.ek_hash, place.source), ("source", place.source), ("ek", place.ek_hash)
