"""Notifier: is told about the trust bundle.

The contract is upstream's `spire.plugin.server.notifier.v1.Notifier`, where it is deprecated in
favour of BundlePublisher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.posture.verdict import NodeState
    from spire_hw.spiffeid import SpiffeId


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


@dataclass(frozen=True, slots=True)
class NodeStateEvent:
    """A node got into another state, or into the same for other reasons.

    Attributes:
        agent_id: the node.
        state: where it is now.
        before: where it was.
        reasons: codes, the decisive one first; empty when all is well.
        message: the same for people.
        occasion: what led there: `attestation`, `heartbeat`, `policy_update`, `silence` or
            `operator`.
        at: when.
    """

    agent_id: SpiffeId
    state: NodeState
    before: NodeState
    reasons: tuple[str, ...]
    message: str
    occasion: str
    at: datetime


@runtime_checkable
class NodeStateNotifier(Protocol):
    """Ability of a notifier in this process; upstream's contract knows of bundles alone."""

    async def notify_node_state(self, event: NodeStateEvent) -> None:
        """Take note of a node's new state; whoever calls logs errors and goes on."""
        ...
