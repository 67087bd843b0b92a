"""Replaced TPM keys that are kept for a while: unused, until an operator takes one back or time is up.

They stand in the file of the key that took their place, so a crash at any moment leaves each key used,
kept or gone. A clock that jumped removes nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from spire_hw.clock import Jumps
from spire_hw.errors import LimitError, NotFoundError, SpireHwError
from spire_hw.plugin.keymanager import KeyInfo, RetainedKey
from spire_hw_plugins.keymanager.tpm_store import MAX_REPLACED, KeyFile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw_plugins.keymanager.tpm_store import Replaced, StoredKey, TpmKeyStore

_LOOK_EVERY_S: Final = 1800.0
_LEAST_S: Final = 1.0
_JUMP_S: Final = 3600.0


class TpmRetention:
    """What a directory of keys holds, and for how long.

    Args:
        store: the directory.
        files: what it holds.
        keep_s: seconds that replaced keys are kept, 0 for not at all.
        turn: held by whoever replaces or removes keys.
        clock: the time.
        log: where removals are told.
    """

    def __init__(
        self,
        store: TpmKeyStore,
        files: Iterable[KeyFile],
        *,
        keep_s: float,
        turn: asyncio.Lock,
        clock: Clock,
        log: Logger,
    ) -> None:
        # Of lost keys too: a successor takes their persistent handle away.
        self._files = {file.key_id: file for file in files}
        self._turn = turn
        self._store = store
        self._keep_s = keep_s
        self._clock = clock
        self._log = log
        self._jumps = Jumps(clock)

    @property
    def next_serial(self) -> int:
        """Return the serial number of the next key."""
        found = (key.serial for file in self._files.values() for key in file.keys)
        return 1 + max(found, default=0)

    def next_generation(self, key_id: str) -> int:
        """Return the number of the next key of an id.

        Raises:
            LimitError: too many of those before are kept.
        """
        file = self._files.get(key_id)
        if file is None:
            return 1
        if self._keep_s > 0 and len(file.replaced) >= MAX_REPLACED:
            raise LimitError(
                f'{MAX_REPLACED} replaced keys of "{key_id}" are kept, no more fit: destroy some by '
                "hand (key destroy), or shorten retain_replaced"
            )
        return file.made + 1

    async def replace(self, key: StoredKey) -> StoredKey | None:
        """Use a key for its id from now on; the one before is kept, or is gone.

        Returns:
            The key before.

        Raises:
            DeviceError: the disk refused; nothing changed.
        """
        file = self._files.get(key.key_id)
        if file is None:
            await self._save(KeyFile(key, key.generation))
            return None
        await self._save(file.followed(key, self._now if self._keep_s > 0 else None))
        return file.current

    def find(self, key_id: str, generation: int) -> Replaced:
        """Return a key that is kept.

        Raises:
            NotFoundError: it is not.
        """
        file = self._files.get(key_id)
        if file is None:
            raise NotFoundError(f'generation {generation} of key "{key_id}" is not retained')
        return file.find(generation)

    def list(self) -> list[RetainedKey]:
        """Return what is kept, in the order in which it was replaced."""
        kept = [one for file in self._files.values() for one in file.replaced]
        return [
            RetainedKey(info_of(one.key), one.key.generation, one.since + self._keep_s)
            for one in sorted(kept, key=lambda one: one.since)
        ]

    async def destroy(self, key_id: str, generation: int) -> None:
        """Remove a key that is kept; see `KeyRetention.destroy_retained`."""
        self.find(key_id, generation)
        await self._remove(self._files[key_id], {generation})

    async def run(self) -> None:
        """Remove keys whose time is up, until cancelled."""
        while True:
            try:
                due = self._next_s() if await self.expire() else None
            except SpireHwError as e:
                self._log.warning("Replaced TPM keys could not be removed", error=e.message)
                due = None
            pause = _LOOK_EVERY_S if due is None else min(_LOOK_EVERY_S, max(_LEAST_S, due))
            await self._clock.sleep(pause)

    async def expire(self) -> bool:
        """Remove keys whose time is up; False when the clock cannot be trusted.

        Raises:
            DeviceError: the disk refused.
        """
        if self._jumps.seconds > _JUMP_S:
            self._log.warning("The clock jumped: no replaced TPM key is removed before a restart")
            return False
        async with self._turn:
            for file in list(self._files.values()):
                until = {r.key.generation: r.since + self._keep_s for r in file.replaced}
                over = {n for n, time in until.items() if self._keep_s <= 0 or time <= self._now}
                if over:
                    await self._remove(file, over)
        return True

    async def _remove(self, file: KeyFile, generations: set[int]) -> None:
        await self._save(file.without(generations))
        for generation in sorted(generations):
            self._log.info(
                "A replaced TPM key was removed", key_id=file.key_id, generation=generation
            )

    async def _save(self, file: KeyFile) -> None:
        await asyncio.to_thread(self._store.put, file)
        self._files[file.key_id] = file

    def _next_s(self) -> float | None:
        since = [one.since for file in self._files.values() for one in file.replaced]
        return max(0.0, min(since) + self._keep_s - self._now) if since else None

    @property
    def _now(self) -> float:
        return self._clock.now().timestamp()


def info_of(key: StoredKey) -> KeyInfo:
    """Return the public face of a key."""
    return KeyInfo.of(key.key_id, key.key_type, key.blob.parsed.key)
