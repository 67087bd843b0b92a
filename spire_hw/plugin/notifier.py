"""Notifier: is told about the trust bundle.

The contract is upstream's `spire.plugin.server.notifier.v1.Notifier`, where it is deprecated in
favour of BundlePublisher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from spire_hw.bundle.bundle import Bundle


class Notifier(Protocol):
    """What a Notifier plugin implements."""

    async def notify_bundle_updated(self, bundle: Bundle) -> None:
        """Take note of a new bundle; whoever calls logs errors and goes on."""
        ...

    async def notify_and_advise_bundle_loaded(self, bundle: Bundle) -> None:
        """Take note of the bundle at start.

        Raises:
            SpireHwError: the server must not start.
        """
        ...
