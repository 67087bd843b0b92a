"""BundlePublisher: puts the trust bundle where others find it.

The contract is upstream's `spire.plugin.server.bundlepublisher.v1.BundlePublisher`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from spire_hw.bundle.bundle import Bundle


class BundlePublisher(Protocol):
    """What a BundlePublisher plugin implements."""

    async def publish_bundle(self, bundle: Bundle) -> None:
        """Publish a bundle; called again and again with the same one.

        Raises:
            SpireHwError: it could not be published; the next call comes anyway.
        """
        ...
