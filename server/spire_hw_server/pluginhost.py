"""What the server is to its plugins: which it has, where built-ins are found, what they are told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw import log as logs
from spire_hw.errors import NotReadyError
from spire_hw.plugin.info import HostInfo, PluginKind, Side
from spire_hw.telemetry.metrics import NO_METRICS
from spire_hw_plugins import builtin
from spire_hw_server.admission import JOIN_TOKEN

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.plugin.info import Builder, EkList
    from spire_hw.plugin.section import PluginConfig
    from spire_hw.posture.judge import Judge
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_server.config import ServerSettings


def configured(settings: ServerSettings) -> list[PluginConfig]:
    """Return the configured plugins without `join_token`, which is part of the server."""
    return [
        p
        for p in settings.plugins
        if p.cmd or (p.kind, p.name) != (PluginKind.NODE_ATTESTOR, JOIN_TOKEN)
    ]


def table(kind: PluginKind, name: str) -> Builder:
    """Return what builds a built-in plugin."""
    return builtin.lookup(kind, name, Side.SERVER)


def names(kind: PluginKind) -> list[str]:
    """Return the built-in plugins of a kind."""
    return builtin.names(kind, Side.SERVER)


class _NoEkList:
    """Stands for the store of a server that does not run: it is there, but not asked."""

    async def is_ek_allowed(self, ek_hash: str) -> bool:
        raise NotReadyError(f"the store is not open, cannot look for {ek_hash}")


def no_bundle() -> Bundle:
    """Stand for the trust bundle of a server that is not up.

    Raises:
        NotReadyError: always.
    """
    raise NotReadyError("the server is not up, it has no trust bundle yet")


def host_info(
    settings: ServerSettings,
    clock: Clock,
    store: EkList,
    trust_bundle: Callable[[], Bundle],
    *,
    judge: Judge | None = None,
    metrics: Metrics = NO_METRICS,
) -> HostInfo:
    """Return what plugins are told of their host."""
    return HostInfo(
        side=Side.SERVER,
        trust_domain=settings.trust_domain,
        data_dir=settings.data_dir,
        log=logs.get_logger("catalog"),
        clock=clock,
        ek_list=store,
        trust_bundle=trust_bundle,
        judge=judge,
        metrics=metrics,
    )


def host_at_rest(settings: ServerSettings, clock: Clock) -> HostInfo:
    """Return what plugins are told of a server that does not run."""
    return host_info(settings, clock, _NoEkList(), no_bundle)
