"""What the server offers to its plugins: known agents, its own identity, measurements.

Plugins are loaded before most of the server stands: what is not there yet is FAILED_PRECONDITION.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization

from spire_hw.errors import NotReadyError
from spire_hw.plugin.hostservices import HostServices, ServerIdentity
from spire_hw.plugin.metrics import PluginMetrics
from spire_hw.telemetry.metrics import NO_METRICS

if TYPE_CHECKING:
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.spiffeid import SpiffeId
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_server.bundles import Bundles
    from spire_hw_server.ca.identity import ServerIdentity as OwnIdentity
    from spire_hw_server.datastore.interface import Datastore


class ServerServices:
    """The agent store and identity provider of one server.

    Attributes:
        offered: both and the metrics, as plugins get them.
    """

    def __init__(self, *, clock: Clock, log: Logger, metrics: Metrics = NO_METRICS) -> None:
        self._store: Datastore | None = None
        self._identity: OwnIdentity | None = None
        self._bundles: Bundles | None = None
        self.offered = HostServices(PluginMetrics(log, clock, metrics), self, self)

    def open(self, store: Datastore, identity: OwnIdentity, bundles: Bundles) -> None:
        """Answer from now on."""
        self._store, self._identity, self._bundles = store, identity, bundles

    async def check_known(self, agent_id: SpiffeId) -> None:
        """Return when an agent has attested; see `spire_hw.plugin.hostservices.AgentStore`."""
        if self._store is None:
            raise NotReadyError("the server is starting, it knows no agents yet")
        await self._store.get_node(agent_id)

    async def fetch_x509_identity(self) -> ServerIdentity:
        """Return the server's SVID; see `spire_hw.plugin.hostservices.IdentityProvider`."""
        if self._identity is None or self._bundles is None:
            raise NotReadyError("the server is starting, it has no identity yet")
        svid = self._identity.svid
        key = svid.private_key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return ServerIdentity(svid.chain, key, self._bundles.own)
