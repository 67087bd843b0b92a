"""UpstreamAuthority: signs this server's CA, so that the trust domain hangs from somebody's root.

The contract is upstream's `spire.plugin.server.upstreamauthority.v1.UpstreamAuthority`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from datetime import timedelta

    from spire_hw.bundle.bundle import JwtAuthority, X509Root


@dataclass(frozen=True, slots=True)
class UpstreamX509Ca:
    """One answer to a request for a CA certificate.

    Attributes:
        chain: DER, the new CA first, then intermediates up to but without the root; empty in all
            answers but the first.
        roots: all upstream roots as they are now; a tainted one must not be trusted any more.
    """

    chain: tuple[bytes, ...]
    roots: tuple[X509Root, ...]


@dataclass(frozen=True, slots=True)
class LocalBundle:
    """What the upstream authority publishes for this trust domain."""

    x509_roots: tuple[X509Root, ...]
    jwt_authorities: tuple[JwtAuthority, ...]


class UpstreamAuthority(Protocol):
    """What an UpstreamAuthority plugin implements."""

    def mint_x509_ca(
        self, csr: bytes, preferred_ttl: timedelta
    ) -> AsyncGenerator[UpstreamX509Ca, None]:
        """Have a CA certificate signed; an async generator, to be closed by who started it.

        The first answer holds the chain. Later ones tell of changed roots; a plugin that does not
        learn of changes ends after the first. It keeps going over passing faults, for nobody asks
        again before the next rotation.

        Args:
            csr: DER certificate request with the server's ID.
            preferred_ttl: wished-for lifetime; zero leaves it to the plugin.

        Raises:
            InvalidInputError: the request is not acceptable.
            UnavailableError: the authority above is away.
            NotReadyError: before configure.
        """
        ...


@runtime_checkable
class JwtKeyPublisher(Protocol):
    """Optional: JWT keys are published upstream, and those of siblings learnt.

    An external plugin always seems to have this ability and answers UNIMPLEMENTED without it.
    """

    def publish_jwt_key(self, key: JwtAuthority) -> AsyncGenerator[tuple[JwtAuthority, ...], None]:
        """Publish a key; every answer holds all JWT keys upstream knows, this one included."""
        ...


@runtime_checkable
class LocalBundleSource(Protocol):
    """Optional: upstream tells what it publishes for this trust domain.

    An external plugin always seems to have this ability and answers UNIMPLEMENTED without it.
    """

    def subscribe_to_local_bundle(self) -> AsyncGenerator[LocalBundle, None]:
        """Tell the bundle now and after every change."""
        ...
