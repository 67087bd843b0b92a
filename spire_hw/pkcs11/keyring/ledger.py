"""The keys in use, and the host's note of them: kept in step."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from spire_hw.errors import InvalidInputError
from spire_hw.pkcs11.inventory.labels import key_name
from spire_hw.pkcs11.keyring.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from spire_hw.pkcs11.inventory.entry import Entry
    from spire_hw.pkcs11.inventory.inventory import Inventory
    from spire_hw.pkcs11.inventory.labels import Owner
    from spire_hw.pkcs11.keyring.state import StateFile


class Ledger:
    """What this host knows of its keys.

    Attributes:
        owner: whose keys.
        entries: keys in use by key id, oldest first.
        state: the note as it is on disk.
    """

    def __init__(self, owner: Owner, file: StateFile, key_ids: Iterable[str] = ()) -> None:
        self.owner = owner
        self._key_ids = tuple(key_ids)
        self.entries: dict[str, Entry] = {}
        self.state = State(owner)
        self._file = file
        self._saving = asyncio.Lock()

    async def load(self) -> None:
        """Read the note.

        Raises:
            TokenError: FAILED_PRECONDITION, it cannot be read.
        """
        self.state = await asyncio.to_thread(self._file.load)

    async def save(self, change: Callable[[State], State]) -> None:
        """Change the note and make it durable.

        Raises:
            TokenError: INTERNAL, it cannot be written; nothing changed.
        """
        async with self._saving:
            state = change(self.state)
            await asyncio.to_thread(self._file.save, state)
            self.state = state

    def use(self, entries: dict[str, Entry]) -> None:
        """Take keys into use, in the order of the note."""
        order = {key_id: n for n, key_id in enumerate(self.state.keys)}
        known_first = sorted(entries.items(), key=lambda item: order.get(item[0], len(order)))
        self.entries = dict(known_first)

    def replace(self, entry: Entry) -> Entry | None:
        """Make an entry the newest key in use; return the one it takes the place of."""
        old = self.entries.pop(entry.key_id, None)
        self.entries[entry.key_id] = entry
        return old

    def known_ids(self) -> dict[str, bytes]:
        """Return the CKA_IDs of noted keys by the key part of their labels."""
        return {key_name(key_id): known.cka_id for key_id, known in self.state.keys.items()}

    def check_name(self, key_id: str, inventory: Inventory) -> None:
        """Refuse a key id that looks in labels like one that is in use: both are hashes there.

        Raises:
            InvalidInputError: it does.
        """
        other = self.ids(inventory).get(key_name(key_id), key_id)
        if other != key_id:
            raise InvalidInputError(
                f'key id "{key_id}" cannot be told from "{other}" on the token; choose another'
            )

    def ids(self, inventory: Inventory) -> dict[str, str]:
        """Return key ids by the key part of their labels."""
        ids = {name: name for name in inventory.current if not name.startswith("~")}
        if inventory.manifest is not None:
            ids |= inventory.manifest.keys
        for key_id in (*self._key_ids, *self.state.keys, *self.entries):
            ids[key_name(key_id)] = key_id
        return ids
