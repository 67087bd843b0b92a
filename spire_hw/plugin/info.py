"""What every plugin is told about itself and its host, and the life cycle all kinds share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from spire_hw.plugin.hostservices import HostServices
from spire_hw.telemetry.metrics import NO_METRICS

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault
    from spire_hw.log import Logger
    from spire_hw.posture.judge import Judge
    from spire_hw.spiffeid import TrustDomain
    from spire_hw.telemetry.metrics import Metrics


class PluginKind(Enum):
    """Plugin kinds with upstream's names in configuration files and messages."""

    KEY_MANAGER = "KeyManager"
    NODE_ATTESTOR = "NodeAttestor"
    WORKLOAD_ATTESTOR = "WorkloadAttestor"
    UPSTREAM_AUTHORITY = "UpstreamAuthority"
    SVID_STORE = "SVIDStore"
    NOTIFIER = "Notifier"
    BUNDLE_PUBLISHER = "BundlePublisher"
    CREDENTIAL_COMPOSER = "CredentialComposer"


class Side(Enum):
    """Which host a plugin runs in."""

    SERVER = "server"
    AGENT = "agent"


class EkList(Protocol):
    """The server's list of TPMs that were enrolled by endorsement key hash."""

    async def is_ek_allowed(self, ek_hash: str) -> bool:
        """Tell whether the lower-case hex hash is enrolled; asked on every attestation."""
        ...


@dataclass(frozen=True, slots=True)
class HostInfo:
    """What the host tells a plugin when it builds it.

    Attributes:
        side: server or agent.
        trust_domain: the host's trust domain.
        data_dir: the host's data directory (0700), for built-ins that keep state.
        holds_data_dir: whether no other host uses it as long as this one runs.
        log: logger already bound to plugin_type and plugin_name.
        clock: the host's time.
        ek_list: enrolled endorsement keys; None in the agent.
        join_token: the agent's single-use token, "" when it has none; a secret.
        trust_bundle: returns the server's own bundle as it is now, raises NotReadyError while the
            server starts; None in the agent.
        judge: policies and the memory of nodes; None in the agent and under a host without them.
        metrics: takes the measurements of built-ins.
    """

    side: Side
    trust_domain: TrustDomain
    data_dir: Path
    log: Logger
    clock: Clock
    ek_list: EkList | None = None
    join_token: str = field(default="", repr=False)
    services: HostServices = field(default_factory=HostServices)
    trust_bundle: Callable[[], Bundle] | None = None
    judge: Judge | None = None
    metrics: Metrics = NO_METRICS
    holds_data_dir: bool = True


class Plugin(Protocol):
    """The life cycle every plugin has besides the methods of its kind."""

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching network or device."""
        ...

    async def configure(self, config: Body) -> None:
        """Take a configuration and make ready.

        Raises:
            ConfigError: the configuration has faults.
            SpireHwError: a device or peer it needs is not usable.
        """
        ...

    async def close(self) -> None:
        """Release everything; called once."""
        ...


# A built-in is made by calling its module's `build(host)`.
Builder = Callable[[HostInfo], Plugin]
