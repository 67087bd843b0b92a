"""What a host offers to its plugins.

The contracts are upstream's `spire.hostservice.{common,server}.*.v1`: metrics on both sides, agents
and the server's own identity on the server.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.spiffeid import SpiffeId


class Metrics(Protocol):
    """Takes measurements; `key` is a path of words, labels are optional."""

    async def set_gauge(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        """Set a value that goes up and down."""
        ...

    async def emit_key(self, key: Sequence[str], value: float) -> None:
        """Tell one value."""
        ...

    async def incr_counter(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        """Count something."""
        ...

    async def add_sample(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        """Add to a distribution."""
        ...

    async def measure_since(
        self, key: Sequence[str], start: datetime, labels: Mapping[str, str] | None = None
    ) -> None:
        """Add the time from start to now to a distribution."""
        ...


class AgentStore(Protocol):
    """Knows the attested agents."""

    async def check_known(self, agent_id: SpiffeId) -> None:
        """Return when an agent of that ID has attested, as trust on first use wants to know.

        Raises:
            NotFoundError: there is none.
            NotReadyError: the server is still starting.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """The server's own X509-SVID.

    Attributes:
        chain: DER, leaf first.
        private_key: PKCS#8 DER; a secret.
        bundle: of its trust domain.
    """

    chain: tuple[bytes, ...]
    private_key: bytes = field(repr=False)
    bundle: Bundle


class IdentityProvider(Protocol):
    """Lends plugins the server's identity."""

    async def fetch_x509_identity(self) -> ServerIdentity:
        """Return what the server is at the moment.

        Raises:
            NotReadyError: the server is still starting: not to be called while configuring.
        """
        ...


@dataclass(frozen=True, slots=True)
class HostServices:
    """What one host offers; None where it does not."""

    metrics: Metrics | None = None
    agent_store: AgentStore | None = None
    identity_provider: IdentityProvider | None = None
