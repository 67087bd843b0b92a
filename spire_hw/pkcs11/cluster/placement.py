"""Several tokens, one set of keys: which instance of a key is current, where it is, where a new one goes.

An instance is younger than another when its generation is higher, on whichever token either is. So a
token that was away while a key was replaced elsewhere comes back with an older instance, and nothing
has to be remembered for that but the generations. Values in, values out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.plugin.keymanager import DeviceHealth, KeyHealth

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spire_hw.pkcs11.inventory.entry import Entry

_SLOTS: Final = {"-A": "-B", "-B": "-A"}
_ORDER: Final = {KeyHealth.GOOD: 0, KeyHealth.DEGRADED: 1, KeyHealth.DOWN: 2}


class Mode(Enum):
    """What several tokens are to each other; the value is the configuration's word."""

    SAME_KEYS = "same_keys"
    SPREAD = "spread"


@dataclass(frozen=True, slots=True)
class Held:
    """A key on one token.

    Attributes:
        entry: the key.
        rank: its generation, or the one it was taken back over.
    """

    entry: Entry
    rank: int


@dataclass(frozen=True, slots=True)
class Standing:
    """One token as it is now.

    Attributes:
        name: what the configuration calls it.
        health: whether it can be used.
        keys: what is on it by key id, or was when it was seen last.
    """

    name: str
    health: DeviceHealth
    keys: Mapping[str, Held]

    @property
    def is_usable(self) -> bool:
        """Tell whether it can sign."""
        return self.health.health is not KeyHealth.DOWN


@dataclass(frozen=True, slots=True)
class Current:
    """The instance of a key that counts.

    Attributes:
        entry: the key.
        rank: see `Held`.
        holders: names of the tokens that have it, in the order of the configuration.
    """

    entry: Entry
    rank: int
    holders: tuple[str, ...]


def current_keys(
    standings: Sequence[Standing], known: Mapping[str, str] | None = None
) -> dict[str, Current]:
    """Return the current instance of every key, in the order in which tokens have them.

    Two tokens have one key when the public keys are equal.

    Args:
        standings: the tokens.
        known: fingerprints by key id of what counted before: a token that was lost while a key was
            made on it comes back with one that nobody heard of, and with a number given again since.

    Raises:
        TokenError: FAILED_PRECONDITION, two different keys claim one place.
    """
    found: dict[str, list[tuple[Standing, Held]]] = {}
    for standing in standings:
        for key_id, held in standing.keys.items():
            found.setdefault(key_id, []).append((standing, held))
    before = known or {}
    return {key_id: _current(key_id, c, before.get(key_id)) for key_id, c in found.items()}


def _current(key_id: str, claims: Sequence[tuple[Standing, Held]], known: str | None) -> Current:
    rank = max(held.rank for _, held in claims)
    newest = {held.entry.fingerprint: held.entry for _, held in claims if held.rank == rank}
    if len(newest) > 1 and known in newest:
        newest = {known: newest[known]}
    if len(newest) > 1:
        names = ", ".join(standing.name for standing, held in claims if held.rank == rank)
        raise TokenError(
            f'tokens {names} have different keys in generation {rank} of "{key_id}"; will not '
            "choose: destroy the one that does not belong, its fingerprint tells which "
            f"({', '.join(sorted(newest))})",
            reason="hsm.key_conflict",
            operation="compare tokens",
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )
    fingerprint, entry = newest.popitem()
    holders = tuple(s.name for s, held in claims if held.entry.fingerprint == fingerprint)
    return Current(entry, rank, holders)


def superseded(standings: Sequence[Standing], keys: Mapping[str, Current]) -> list[tuple[str, str]]:
    """Return token and key id of instances that another token has a younger one of."""
    return [
        (standing.name, key_id)
        for standing in standings
        for key_id, held in standing.keys.items()
        if held.entry.fingerprint != keys[key_id].entry.fingerprint
    ]


def stranded(
    standings: Sequence[Standing], keys: Mapping[str, Current]
) -> dict[str, tuple[str, ...]]:
    """Return the keys that no usable token has while one is usable, with the tokens that have them."""
    usable = {standing.name for standing in standings if standing.is_usable}
    if not usable:
        return {}
    return {
        key_id: key.holders for key_id, key in keys.items() if not usable.intersection(key.holders)
    }


def missing_copies(
    standings: Sequence[Standing], keys: Mapping[str, Current]
) -> dict[str, tuple[str, ...]]:
    """Return the keys that are not on every token, with the tokens that lack them."""
    names = [standing.name for standing in standings]
    lacking = {
        key_id: tuple(n for n in names if n not in key.holders) for key_id, key in keys.items()
    }
    return {key_id: without for key_id, without in lacking.items() if without}


def order_for_generation(
    key_id: str, standings: Sequence[Standing], keys: Mapping[str, Current], mode: Mode
) -> list[str]:
    """Return the tokens on which a new key may be made, the best first.

    With keys spread over tokens it is the healthiest one, not counting the one that has the other of
    a pair of slots: of two slots the server has one replaced while the other signs. That one comes
    last. Where all tokens have the same keys it is the first that is well.
    """
    usable = [s for s in standings if s.is_usable]
    if mode is Mode.SAME_KEYS:
        return [s.name for s in sorted(usable, key=lambda s: _ORDER[s.health.health])]
    other = keys.get(key_id[:-2] + _SLOTS[key_id[-2:]]) if key_id[-2:] in _SLOTS else None
    avoided = other.holders if other is not None else ()
    ranked = sorted(usable, key=lambda s: (s.name in avoided, _ORDER[s.health.health], len(s.keys)))
    return [s.name for s in ranked]
