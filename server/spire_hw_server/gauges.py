"""How things stand in the server, measured when somebody reads its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.posture.verdict import NodeState

if TYPE_CHECKING:
    from collections.abc import Sized

    from spire_hw.clock import Clock
    from spire_hw.spiffeid import TrustDomain
    from spire_hw.telemetry.host import Telemetry
    from spire_hw_server.ca.manager import CaManager
    from spire_hw_server.entries import EntryCache
    from spire_hw_server.posture.postures import Postures

_CA_END: Final = ("manager", "x509_ca", "rotate", "expiration")
_CA_TTL: Final = ("manager", "x509_ca", "rotate", "ttl")
_NODES: Final = ("node", "agents_by_id_cache", "count")
_ENTRIES: Final = ("entry", "entries_by_entryid_cache", "count")
_STATES: Final = ("posture", "nodes")
_STREAMS: Final = ("posture", "heartbeat", "streams")


class Gauges:
    """Sets the gauges of one server."""

    def __init__(
        self,
        telemetry: Telemetry,
        *,
        trust_domain: TrustDomain,
        manager: CaManager,
        postures: Postures,
        nodes: Sized,
        entries: EntryCache,
        clock: Clock,
    ) -> None:
        self._metrics = telemetry.metrics
        self._labels = {"trust_domain_id": str(trust_domain)}
        self._manager = manager
        self._postures = postures
        self._nodes = nodes
        self._entries = entries
        self._clock = clock

    def measure(self) -> None:
        """Set all of them."""
        gauge = self._metrics.gauge
        active = self._manager.x509_slots.active
        if active is not None:
            left = active.not_after - self._clock.now()
            gauge(_CA_END, active.not_after.timestamp(), self._labels)
            gauge(_CA_TTL, left.total_seconds(), self._labels)
        gauge(_NODES, len(self._nodes))
        gauge(_ENTRIES, len(self._entries))
        gauge(_STREAMS, len(self._postures.heartbeats))
        states = self._postures.ledger.states()
        for state in NodeState:
            gauge(_STATES, states[state], {"state": state.value})
