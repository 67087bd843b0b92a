"""How often a key may be made anew: what a host that crashes and starts over cannot exceed.

Each key id has a bucket that fills in a day and holds a few generations. What was taken from it is
on disk before a key is made, so that a loop of crashes ends at the bucket's bottom, and the token
does not fill.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import ErrorKind, LimitError
from spire_hw.files import NotWrittenError, replace_file
from spire_hw.pkcs11.errors import Cure, TokenError

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.clock import Clock

_DAY_S: Final = 86400.0
_MAX_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many generations of one key id are allowed.

    Attributes:
        per_day: over a long time; 0 lifts the limit.
        burst: one after the other.
    """

    per_day: int = 12
    burst: int = 4


DEFAULT_ALLOWANCE: Final = Allowance()


class Budget:
    """The buckets of one host's keys."""

    def __init__(self, path: Path, allowance: Allowance, clock: Clock) -> None:
        self._path = path
        self._allowance = allowance
        self._clock = clock
        self._turn = asyncio.Lock()

    async def take(self, key_id: str) -> None:
        """Take one generation.

        Raises:
            LimitError: none is left.
            TokenError: the note of what was taken cannot be read (FAILED_PRECONDITION) or written.
        """
        if not self._allowance.per_day:
            return
        async with self._turn:
            levels = await asyncio.to_thread(self._load)
            level = levels.get(key_id, float(self._allowance.burst))
            if level < 1.0:
                wait_s = (1.0 - level) * _DAY_S / self._allowance.per_day
                raise LimitError(
                    f'generation budget of key "{key_id}" is used up '
                    f"({self._allowance.per_day} a day, {self._allowance.burst} at once): the next "
                    f"in {wait_s / 60:.0f} min. Find out what makes keys so often, or raise "
                    "generations_per_day"
                )
            await asyncio.to_thread(self._save, {**levels, key_id: level - 1.0})

    async def give_back(self, key_id: str) -> None:
        """Put back a generation that left no key."""
        if not self._allowance.per_day:
            return
        async with self._turn:
            levels = await asyncio.to_thread(self._load)
            if key_id in levels:
                await asyncio.to_thread(self._save, {**levels, key_id: levels[key_id] + 1.0})

    def _load(self) -> dict[str, float]:
        """Return what is left of the buckets that are not full."""
        try:
            with self._path.open("rb") as file:
                note = json.loads(file.read(_MAX_BYTES))
            since, levels = float(note["time"]), dict(note["levels"])
            left = {str(key_id): float(level) for key_id, level in levels.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise self._unusable() from None
        # A clock that went back fills nothing.
        filled = max(0.0, self._clock.now().timestamp() - since) * self._allowance.per_day / _DAY_S
        return {k: v + filled for k, v in left.items() if v + filled < self._allowance.burst}

    def _save(self, levels: dict[str, float]) -> None:
        note = {"time": self._clock.now().timestamp(), "levels": levels}
        try:
            replace_file(self._path, json.dumps(note).encode("utf-8"), "generation budget")
        except NotWrittenError as e:
            raise TokenError(
                e.message, reason="hsm.state_write", operation="write generation budget"
            ) from e

    def _unusable(self) -> TokenError:
        return TokenError(
            f"generation budget {self._path} cannot be read; remove it to start with full buckets",
            reason="hsm.state_unusable",
            operation="read generation budget",
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )
