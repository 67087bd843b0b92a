"""Whether the keys of the server can be used, as its KeyManager says: told to the log and to probes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.errors import UnavailableError
from spire_hw.plugin.keymanager import DeviceHealth, KeyHealth, KeyHealthSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from spire_hw.log import Logger

_WELL = DeviceHealth(KeyHealth.GOOD)


class KeyWatch:
    """Watches one KeyManager; those that tell nothing about themselves count as well.

    Args:
        manager: the KeyManager.
        ca_ends: when the active CA certificate ends: until then rotation may be impossible.
        log: told of every change.
    """

    def __init__(
        self, manager: object, ca_ends: Callable[[], datetime | None], log: Logger
    ) -> None:
        self._manager = manager
        self._ca_ends = ca_ends
        self._log = log
        self._last = _WELL

    def look(self) -> DeviceHealth:
        """Return how well keys can be used; what changed goes to the log."""
        now = self._manager.key_health() if isinstance(self._manager, KeyHealthSource) else _WELL
        before, self._last = self._last, now
        if (now.health, now.reason) == (before.health, before.reason):
            return now
        ends = self._ca_ends()
        expiry = "" if ends is None else ends.isoformat()
        fields = {"health": now.health.value, "reason": now.reason, "ca_expires_at": expiry}
        if now.health is KeyHealth.GOOD:
            self._log.info("keys can be used again", **fields)
        elif now.health is KeyHealth.DEGRADED:
            self._log.warning("keys can be used only in part", error=now.message, **fields)
        else:
            self._log.error("keys cannot be used", error=now.message, **fields)
        return now

    async def check(self) -> None:
        """Refuse when nothing can be signed.

        Raises:
            UnavailableError: cause and remedy.
        """
        health = self.look()
        if health.health is KeyHealth.DOWN:
            raise UnavailableError(f"{health.reason}: {health.message}")
