"""Takes workloads' identities away while the server has this node in quarantine, and gives them back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.errors import DeniedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.log import Logger
    from spire_hw_agent.cache import Cache
    from spire_hw_agent.upstream.posture import Standing


class CutOff:
    """What the server last said of this node, and what follows for workloads.

    What was said holds until something else is said: a lost stream heals nobody.

    Args:
        cache: emptied while the node is cut off.
        on_healed: told when workloads may have identities again.
    """

    def __init__(self, cache: Cache, *, log: Logger, on_healed: Callable[[], None]) -> None:
        self._cache = cache
        self._log = log
        self._on_healed = on_healed
        self._standing: Standing | None = None

    def follow(self, standing: Standing | None) -> None:
        """React to what the server says; None when it knows no states."""
        before, self._standing = self._standing, standing
        is_cut_off = standing is not None and standing.is_cut_off
        if standing is not None and (before is None or before.why != standing.why):
            note = self._log.error if is_cut_off else self._log.info
            why = {"reasons": ",".join(standing.reasons), "detail": standing.message}
            said = {name: text for name, text in why.items() if text}
            note("The server told the state of this node", state=standing.state.value, **said)
        if is_cut_off:
            self._cache.cut_off()
        elif self._cache.is_cut_off:
            self._log.info("Workloads of this node may have identities again")
            self._cache.restore()
            self._on_healed()

    def check(self) -> None:
        """Refuse while the node is cut off.

        Raises:
            DeniedError: with the state and its reason codes.
        """
        standing = self._standing
        if standing is not None and standing.is_cut_off:
            raise DeniedError(f"no identity for this node: it is {standing.why}")
