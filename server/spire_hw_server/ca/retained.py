"""Replaced keys that the KeyManager keeps for a while: listed, taken back, destroyed by operators.

A generation is not taken back over a key that an authority signs with, or is about to: nothing would
be signed any more. Where that is what is wanted, since the journal is the one from before the
replacement, the server does not start, and the key is restored while it is stopped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.errors import NotReadyError, PluginError, SpireHwError
from spire_hw.plugin.keymanager import KeyRetention

if TYPE_CHECKING:
    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import KeyInfo, Keys, RetainedKey
    from spire_hw_server.ca.manager import CaManager


class RetainedKeys:
    """The replaced keys of one server.

    Args:
        keys: the KeyManager.
        manager: knows which keys authorities need.
        log: where every change is told.
    """

    def __init__(self, keys: Keys, manager: CaManager, log: Logger) -> None:
        self._keys = keys
        self._manager = manager
        self._log = log

    async def list(self) -> list[RetainedKey]:
        """Return what is kept, the oldest first; nothing where the KeyManager keeps none.

        Raises:
            PluginError: the KeyManager failed.
        """
        keeper = self._keys.manager
        if not isinstance(keeper, KeyRetention):
            return []
        try:
            return await keeper.retained_keys()
        except SpireHwError as e:
            raise PluginError(f"keymanager({self._keys.name})", e) from e

    async def restore(self, key_id: str, generation: int, *, by: str, comment: str) -> KeyInfo:
        """Make a generation current again; the current one is kept in its place.

        Args:
            key_id: its id.
            generation: which.
            by: who wants it, in words.
            comment: why.

        Raises:
            NotReadyError: an authority needs the current key, or nothing is kept here.
            PluginError: NOT_FOUND, it is not kept; or the KeyManager failed, nothing changed.
        """
        keeper = self._keeper()
        asked = {"key_id": key_id, "generation": generation, "by": by, "comment": comment}
        async with self._manager.held_still() as needed:
            current = {s.info.key_id: s.info.fingerprint for s in await self._keys.list()}
            user = needed.get(current.get(key_id, ""))
            if user is not None:
                raise NotReadyError(
                    f'key "{key_id}" as it is belongs to {user}: it is not replaced while this server '
                    "runs. To go back to a journal from before, stop the server, restore the database "
                    "and then the key: spire-hw-server hsm restore"
                )
            try:
                made = await keeper.restore_key(key_id, generation)
            except SpireHwError as e:
                self._tell_failed("restore", e, **asked)
                raise PluginError(f"keymanager({self._keys.name})", e) from e
        self._log.warning(
            "a replaced key was taken back by hand",
            **asked,
            fp=made.fingerprint,
            before=current.get(key_id, ""),
        )
        return made

    async def destroy(self, key_id: str, generation: int, *, by: str, comment: str) -> None:
        """Destroy a kept generation; arguments as in `restore`.

        Raises:
            NotReadyError: nothing is kept here.
            PluginError: NOT_FOUND, it is not kept; or the KeyManager failed.
        """
        keeper = self._keeper()
        asked = {"key_id": key_id, "generation": generation, "by": by, "comment": comment}
        try:
            await keeper.destroy_retained(key_id, generation)
        except SpireHwError as e:
            self._tell_failed("destroy", e, **asked)
            raise PluginError(f"keymanager({self._keys.name})", e) from e
        self._log.warning("a replaced key was destroyed by hand", **asked)

    def _keeper(self) -> KeyRetention:
        keeper = self._keys.manager
        if isinstance(keeper, KeyRetention):
            return keeper
        raise NotReadyError(
            f"KeyManager {self._keys.name} keeps no replaced keys; where a signer holds the keys, ask "
            "for it there: spire-hw-signer key list"
        )

    def _tell_failed(self, what: str, error: SpireHwError, **fields: object) -> None:
        message = "a replaced key could not be changed by hand"
        self._log.warning(message, action=what, **fields, error=error.message)
