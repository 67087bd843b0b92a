"""What the signer has to remember of an owner's keys across restarts: which were made and used when.

A generation is noted before the device is asked for it, so that a repeated request finds its key
instead of making another one, and so that budgets are not refilled by a restart. When a key signed
is noted now and then; what lies between is taken to be as late as it may have been.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import NotReadyError, UnavailableError
from spire_hw.files import NoFileError, NotWrittenError, read_bounded, replace_file
from spire_hw.key import KeyType
from spire_hw_signer.rates import DAY_S

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

FILE_NAME: Final = "key-notes.json"
_MAX_BYTES: Final = 4 << 20
_KEPT_S: Final = 2 * DAY_S
_WHAT: Final = "notes of keys"
# How often the last use of a key goes to the disk.
USE_GRAIN_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Making:
    """One generation of a key.

    Attributes:
        request_id: of the client, hexadecimal.
        key_id: which key.
        key_type: its type, as in configuration.
        at: when it was begun, Unix seconds.
        before: fingerprint of the key that was current then, "" for none.
        fingerprint: of the key that was made, "" while that is not known.
        generation: counts the generations of the key id, from 1.
    """

    request_id: str
    key_id: str
    key_type: str
    at: float
    before: str
    fingerprint: str
    generation: int

    def is_of(self, key_id: str, key_type: KeyType) -> bool:
        """Tell whether it is the generation that is asked for."""
        return self.key_id == key_id and self.key_type == key_type.config_name


class Notes:
    """The notes of one owner, in a file that is replaced at each change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._makings: list[Making] = []
        self._used: dict[str, float] = {}
        self._noted: dict[str, float] = {}
        self._on_disk: dict[str, float] = {}
        self._saving = asyncio.Lock()

    @property
    def newest(self) -> float:
        """Return the latest time that stands in the notes, Unix seconds."""
        return max([0.0, *(m.at for m in self._makings), *self._noted.values()])

    async def load(self) -> None:
        """Read the file; none is no notes.

        Raises:
            NotReadyError: it cannot be read, or is not what was written.
        """
        try:
            data = await asyncio.to_thread(read_bounded, self._path, _MAX_BYTES, _WHAT)
        except NoFileError:
            return
        try:
            found = json.loads(data)
            makings = [_making(one) for one in found["makings"]]
            noted = {str(k): float(v) for k, v in found["used"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise NotReadyError(
                f"{_WHAT} {self._path} are not what was written; budgets and the protection of keys"
                " in use hang on them: put back a copy, or remove the file to start without"
            ) from e
        self._makings, self._noted, self._on_disk = makings, noted, dict(noted)
        # It may have signed up to the next note.
        self._used = {key_id: at + USE_GRAIN_S for key_id, at in noted.items()}

    def made(self) -> list[tuple[str, float]]:
        """Return key id and time of every generation, in order."""
        return [(m.key_id, m.at) for m in self._makings]

    def find(self, request_id: str) -> Making | None:
        """Return the generation that a request asked for."""
        return next((m for m in self._makings if m.request_id == request_id), None)

    def unfinished(self, key_id: str, key_type: KeyType) -> Making | None:
        """Return a generation of this key of which nobody knows what became of it."""
        for making in reversed(self._makings):
            if making.key_id == key_id:
                fits = not making.fingerprint and making.is_of(key_id, key_type)
                return making if fits else None
        return None

    def generation(self, key_id: str, fingerprint: str) -> int:
        """Return the number of the current generation, 0 when it is not noted.

        It is not the highest when an operator took one back.
        """
        found = (
            m.generation
            for m in self._makings
            if m.key_id == key_id and m.fingerprint == fingerprint
        )
        return max(found, default=0)

    def begin(
        self, request_id: str, key_id: str, key_type: KeyType, before: str, now: float
    ) -> Making:
        """Note a generation that is about to be asked for; `save` makes it last."""
        number = max((m.generation for m in self._makings if m.key_id == key_id), default=0) + 1
        made = Making(request_id, key_id, key_type.config_name, now, before, "", number)
        self._makings.append(made)
        self._prune(now)
        return made

    def change(self, making: Making, **what: Any) -> Making:
        """Replace what is known of a generation; `save` makes it last."""
        changed = replace(making, **what)
        self._makings[self._makings.index(making)] = changed
        return changed

    def drop(self, making: Making) -> None:
        """Forget a generation that came to nothing; `save` makes it last."""
        self._makings.remove(making)

    def idle_s(self, key_id: str, now: float) -> float | None:
        """Return how long ago a key signed, None when it did not."""
        used = self._used.get(key_id)
        return None if used is None else max(0.0, now - used)

    def use(self, key_ids: Collection[str], now: float) -> bool:
        """Note that keys sign; tell whether `save_uses` is due before they do."""
        for key_id in key_ids:
            self._used[key_id] = max(now, self._used.get(key_id, now))
            if now - self._noted.get(key_id, 0.0) >= USE_GRAIN_S:
                self._noted[key_id] = now
        return not self._are_on_disk(key_ids)

    def _are_on_disk(self, key_ids: Collection[str]) -> bool:
        return all(self._on_disk.get(k) == self._noted.get(k) for k in key_ids)

    def unused(self, key_id: str) -> None:
        """Note that the key of an id is a new one, which did not sign yet."""
        self._used.pop(key_id, None)
        self._noted.pop(key_id, None)

    async def believe(self, now: float) -> None:
        """Take nothing to lie ahead of the time, which an operator says is right.

        What was noted by a clock that was ahead would hold keys to be in use until then.

        Raises:
            UnavailableError: that cannot be written.
        """
        if self.newest <= now and max(self._used.values(), default=now) <= now:
            return
        self._makings = [replace(m, at=min(m.at, now)) for m in self._makings]
        self._used = {key_id: min(at, now) for key_id, at in self._used.items()}
        self._noted = {key_id: min(at, now) for key_id, at in self._noted.items()}
        await self.save()

    async def save(self) -> None:
        """Write the notes; they are on the disk once this returns.

        Raises:
            UnavailableError: they cannot be written.
        """
        async with self._saving:
            await self._write()

    async def save_uses(self, key_ids: Collection[str]) -> None:
        """Write the notes, unless somebody else has meanwhile; the uses are on the disk after that.

        Raises:
            UnavailableError: they cannot be written.
        """
        async with self._saving:
            if not self._are_on_disk(key_ids):
                await self._write()

    async def _write(self) -> None:
        noted = dict(self._noted)
        content = {"makings": [asdict(m) for m in self._makings], "used": noted}
        data = json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"
        try:
            await asyncio.to_thread(replace_file, self._path, data, _WHAT)
        except NotWrittenError as e:
            raise UnavailableError(f"nothing is signed or made: {e.message}") from e
        self._on_disk = noted

    def _prune(self, now: float) -> None:
        latest = {m.key_id: m for m in self._makings}
        self._makings = [m for m in self._makings if now - m.at < _KEPT_S or latest[m.key_id] is m]


def _making(found: dict[str, Any]) -> Making:
    made = Making(
        request_id=str(found["request_id"]),
        key_id=str(found["key_id"]),
        key_type=str(found["key_type"]),
        at=float(found["at"]),
        before=str(found["before"]),
        fingerprint=str(found["fingerprint"]),
        generation=int(found["generation"]),
    )
    KeyType.parse(made.key_type)
    return made
