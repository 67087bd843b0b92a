"""How many attestations may be open at once, and who has to make room for whom.

An endorsement certificate is public: whoever has seen one can begin an exchange in its owner's
name, though not end it. So the one exchange that an endorsement key may have open is counted by
source: a stranger elsewhere takes nothing from the node. Where a limit is reached, what has been
open for longer than an honest TPM needs gives way; nothing younger is ever broken off.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import LimitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from spire_hw.clock import Clock

MAX_OPEN: Final = 1024
MAX_PER_SOURCE: Final = 4
MAX_PER_EK: Final = 64
GIVE_WAY_S: Final = 10.0

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


class Exchanges:
    """The open exchanges of one attestor; all use is on one event loop."""

    def __init__(self, clock: Clock, *, max_open: int = MAX_OPEN) -> None:
        self._clock = clock
        self._max_open = max_open
        self._places: dict[Place, None] = {}  # oldest first

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
        if self._is_taken(lambda p: (p.ek_hash, p.source) == (ek_hash, source), 1):
            raise LimitError(_BUSY)
        if source and self._is_taken(lambda p: p.source == source, MAX_PER_SOURCE):
            raise LimitError(_TOO_MANY)
        if self._is_taken(lambda p: p.ek_hash == ek_hash, MAX_PER_EK):
            raise LimitError(_TOO_MANY)
        if self._is_taken(lambda _: True, self._max_open):
            raise LimitError(_TOO_MANY)
        place = Place(ek_hash, source, self._clock.monotonic())
        self._places[place] = None
        try:
            yield place
        finally:
            self._places.pop(place, None)

    def win(self, place: Place) -> None:
        """Note that an exchange proved its endorsement key: no other one of that key goes on.

        Raises:
            LimitError: another one did before.
        """
        place.check()
        for other in [p for p in self._places if p.ek_hash == place.ek_hash and p is not place]:
            del self._places[other]
            other.give_way(_BUSY)

    def _is_taken(self, alike: Callable[[Place], bool], limit: int) -> bool:
        """Tell whether a limit is reached and its oldest place has to be left alone."""
        held = [place for place in self._places if alike(place)]
        if len(held) < limit:
            return False
        oldest = held[0]
        if self._clock.monotonic() - oldest.since < GIVE_WAY_S:
            return True
        del self._places[oldest]
        oldest.give_way(_DISPLACED)
        return False
