"""An older generation that an operator took back, although a higher one exists.

Nothing on a token is ever relabelled, so that the older one is current again is a fact beside the
labels: in the host's note and, for a host that lost its note, in the manifest on the token. It holds
against the generations that existed then; one made later is current again by its number alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Choice:
    """Which generation of a key is current.

    Attributes:
        generation: the one that was taken back.
        over: the highest that existed then.
        revision: counts up with every choice about the key.
    """

    generation: int
    over: int
    revision: int

    def holds(self, highest: int) -> bool:
        """Tell whether it still decides when this is the highest generation on the token."""
        return highest <= self.over

    def fields(self) -> dict[str, int]:
        """Return what is written of it."""
        return {"generation": self.generation, "over": self.over, "revision": self.revision}

    @classmethod
    def of_fields(cls, fields: Any) -> Choice:
        """Read what `fields` gave.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        return cls(int(fields["generation"]), int(fields["over"]), int(fields["revision"]))


def merged(one: Mapping[str, Choice], other: Mapping[str, Choice]) -> dict[str, Choice]:
    """Return the latest choice about each key that either tells of."""
    latest = dict(one)
    for key_id, choice in other.items():
        if key_id not in latest or latest[key_id].revision < choice.revision:
            latest[key_id] = choice
    return latest
