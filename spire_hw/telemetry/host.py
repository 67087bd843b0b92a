"""The metrics of one program: a registry and its listener when somebody can read them."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from spire_hw.errors import NotReadyError
from spire_hw.telemetry.exposition import encode
from spire_hw.telemetry.listener import MetricsListener
from spire_hw.telemetry.metrics import NO_METRICS
from spire_hw.telemetry.naming import Selection, clean
from spire_hw.telemetry.process import read_process
from spire_hw.telemetry.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.spiffeid import TrustDomain
    from spire_hw.telemetry.config import TelemetrySettings
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw.transport.tls import TlsIdentity

_STARTED: Final = ("started",)
_UPTIME: Final = ("uptime_in_ms",)


class Telemetry:
    """Takes measurements and lets them be read; without settings it does neither."""

    def __init__(
        self,
        settings: TelemetrySettings | None,
        *,
        service: str,
        trust_domain: TrustDomain | None,
        version: str,
        clock: Clock,
        log: Logger,
    ) -> None:
        """Make it; measurements are taken from now on.

        Args:
            settings: where metrics can be read, None for nowhere.
            service: what names begin with, such as `spire_server`.
            trust_domain: the program's; None when it has none of its own.
            version: the program's.
            clock: its time.
            log: where the listener's remarks go.
        """
        self._settings = settings
        self._clock = clock
        self._log = log
        self._registry: Registry | None = None
        self._listener: MetricsListener | None = None
        if settings is None:
            return
        domain = "" if trust_domain is None else str(trust_domain)
        constant = {}
        if settings.hostname_label:
            constant["host"] = socket.gethostname()
        if settings.trust_domain_label:
            constant["trust_domain"] = clean(domain)
        selection = Selection(
            settings.prefix or service,
            settings.allowed_prefixes,
            settings.blocked_prefixes,
            settings.allowed_labels,
            settings.blocked_labels,
        )
        registry = Registry(selection, constant=constant, monotonic=clock.monotonic)
        registry.gauge(_STARTED, 1, {"version": version, "trust_domain_id": domain})
        began = clock.monotonic()
        registry.before_reading(
            lambda: registry.gauge(_UPTIME, round((clock.monotonic() - began) * 1000))
        )
        self._registry = registry

    @property
    def is_read(self) -> bool:
        """Tell whether anybody can read what is measured."""
        return self._registry is not None

    @property
    def metrics(self) -> Metrics:
        """Return what takes measurements."""
        return NO_METRICS if self._registry is None else self._registry

    @property
    def port(self) -> int:
        """Return the port of the listener, 0 without one."""
        return 0 if self._listener is None else self._listener.port

    def before_reading(self, measure: Callable[[], None]) -> None:
        """Have a function set gauges right before they are read."""
        if self._registry is not None:
            self._registry.before_reading(measure)

    def forget(self, *name: str) -> None:
        """Drop all series of a gauge, before those that are left are set again."""
        if self._registry is not None:
            self._registry.forget(name)

    async def start(
        self,
        *,
        identity: Callable[[], TlsIdentity] | None = None,
        bundles: Callable[[], Mapping[TrustDomain, Bundle]] | None = None,
    ) -> None:
        """Listen, when anybody is to read.

        Args:
            identity: the program's own SVID as it is now.
            bundles: whom it believes now.

        Raises:
            SpireHwError: the address is taken, or the TLS settings cannot be used.
        """
        settings, registry = self._settings, self._registry
        if settings is None or registry is None:
            return
        listener = MetricsListener(
            settings.host,
            settings.port,
            lambda: encode((*registry.read(), *read_process())),
            tls=settings.tls,
            identity=identity or _no_identity,
            bundles=bundles or dict,
            clock=self._clock,
            log=self._log,
        )
        await listener.open()
        self._listener = listener
        self._log.info("Starting prometheus exporter", host=settings.host, port=listener.port)

    async def close(self) -> None:
        """Stop listening."""
        if self._listener is not None:
            await self._listener.close()


def _no_identity() -> TlsIdentity:
    raise NotReadyError(
        "this program has no SVID of its own: set cert_file and key_file in telemetry.Prometheus.tls"
    )
