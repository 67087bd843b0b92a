"""The composition root: builds the server from its settings, runs it, closes it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from spire_hw import __version__
from spire_hw import log as logs
from spire_hw.aio.program import Program, run_program
from spire_hw.aio.tasks import Tasks
from spire_hw.catalog import Catalog, External, Table
from spire_hw.clock import Clock, SystemClock
from spire_hw.datadir import lock_data_dir, prepare_data_dir
from spire_hw.errors import (
    NotReadyError,
)
from spire_hw.plugin.info import PluginKind
from spire_hw.plugin.section import SERVER_RULES
from spire_hw.rpc.probes import HealthListener, answer_probes
from spire_hw.telemetry.host import Telemetry
from spire_hw.telemetry.logged import count_log_lines
from spire_hw_server import pluginhost
from spire_hw_server.announce import Announcer
from spire_hw_server.api.addresses import check_addresses
from spire_hw_server.api.listen import Doors, Endpoints
from spire_hw_server.api.nodes import NodeCache
from spire_hw_server.api.services import (
    Parts,
    build_health,
    build_interceptors,
    build_services,
)
from spire_hw_server.gauges import Gauges
from spire_hw_server.hostservices import ServerServices
from spire_hw_server.housekeeping import Housekeeping, HousekeepingSettings
from spire_hw_server.keywatch import KeyWatch
from spire_hw_server.parts import Opener

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from datetime import datetime
    from typing import Any

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.rpc.probes import Health
    from spire_hw_server.bundles import Bundles
    from spire_hw_server.ca.identity import ServerIdentity
    from spire_hw_server.ca.manager import CaManager
    from spire_hw_server.config import ServerSettings
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.posture.postures import Postures

GRACE_S: Final = 10.0
_UMASK: Final = 0o027


async def run(
    settings: ServerSettings,
    *,
    clock: Clock | None = None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Run a server until SIGTERM or SIGINT; a signal during the start ends it as well.

    Args:
        settings: from server.conf.
        clock: its time.
        on_ready: called once the server answers.

    Raises:
        SpireHwError: it could not start, or a part of it broke down.
    """
    _tighten_umask()
    await run_program(
        lambda: Server(settings, clock=clock), signal.SIGUSR1, Server.reconfigure, on_ready
    )


class Server(Program):
    """One server: build it from settings, `start`, `close`."""

    def __init__(
        self,
        settings: ServerSettings,
        *,
        clock: Clock | None = None,
        table: Table | None = None,
    ) -> None:
        """Describe it.

        Args:
            settings: from server.conf.
            clock: its time.
            table: where plugins are found; the built-in ones by default.
        """
        super().__init__("server")
        self.settings = settings
        self.clock = clock or SystemClock()
        self._table = table or pluginhost.table
        self._endpoints: Endpoints | None = None
        self._health_listener: HealthListener | None = None
        self._manager: CaManager | None = None
        self._identity: ServerIdentity | None = None
        self._bundles: Bundles | None = None
        self._postures: Postures | None = None
        self._catalog: Catalog | None = None
        self.telemetry = Telemetry(
            settings.telemetry,
            service="spire_server",
            trust_domain=settings.trust_domain,
            version=__version__,
            clock=self.clock,
            log=logs.get_logger("telemetry"),
        )
        self._services = ServerServices(
            clock=self.clock, log=logs.get_logger("catalog"), metrics=self.telemetry.metrics
        )

    @property
    def port(self) -> int:
        """Return the TCP port."""
        return self._endpoints.port if self._endpoints is not None else self.settings.bind_port

    @property
    def health_port(self) -> int:
        """Return the port of the health probes, 0 without them."""
        return 0 if self._health_listener is None else self._health_listener.port

    @property
    def manager(self) -> CaManager:
        """Return the CA manager of a started server."""
        if self._manager is None:
            raise NotReadyError("the server was not started")
        return self._manager

    @property
    def identity(self) -> ServerIdentity:
        """Return the own SVID of a started server."""
        if self._identity is None:
            raise NotReadyError("the server was not started")
        return self._identity

    async def reconfigure(self) -> None:
        """Read the plugins' data files and the policies again; what goes wrong is logged."""
        if self._catalog is not None:
            await self._catalog.reconfigure()
        if self._postures is not None:
            await self._postures.policies.reload()

    @override
    async def _start(self) -> None:
        settings = self.settings
        for notice in settings.notices:
            self.log.warning(notice)
        if self.telemetry.is_read:
            self._stack.callback(count_log_lines(self.telemetry.metrics))
        prepare_data_dir(settings.data_dir, self.log)
        self._stack.callback(lock_data_dir(settings.data_dir, self.name))
        await asyncio.to_thread(check_addresses, settings)
        opener = Opener(settings, self.clock, self.telemetry, self._stack, self.log)
        store = await opener.open_store()
        nodes = NodeCache(store, clock=self.clock, log=logs.get_logger("cache"))
        await nodes.start()
        self._postures = postures = await opener.open_postures(store, nodes)
        self._catalog = catalog = await self._load_plugins(store, postures)
        self._bundles = bundles = await opener.open_bundles(store)
        parts = await opener.open_parts(store, catalog, nodes, postures, bundles)
        self._manager, self._identity = parts.manager, parts.identity
        self._services.open(store, parts.identity, bundles)
        health = build_health(
            parts, settings, catalog.checks(), self._watch_keys(catalog, parts.manager)
        )
        await self._open_endpoints(parts, health)
        await self._announce(catalog, parts)
        await health.check_costly()
        self._health_listener = await answer_probes(health, settings.health, self._stack)
        await self._let_metrics_be_read(parts)
        self._start_loops(parts, health)
        self.log.info(
            "server is ready",
            trust_domain=str(settings.trust_domain),
            address=f"{settings.bind_address}:{self.port}",
            socket=str(settings.socket_path),
        )

    async def _load_plugins(self, store: Datastore, postures: Postures) -> Catalog:
        catalog = await Catalog.load(
            pluginhost.configured(self.settings),
            self._table,
            pluginhost.host_info(
                self.settings,
                self.clock,
                store,
                self._own_bundle,
                judge=postures.judge,
                metrics=self.telemetry.metrics,
            ),
            SERVER_RULES,
            names=pluginhost.names,
            external=External(self._services.offered),
        )
        self._stack.push_async_callback(catalog.close)
        postures.use(
            {p.name: p.plugin for p in catalog.all(PluginKind.NODE_ATTESTOR)},
            {p.name: p.plugin for p in catalog.all(PluginKind.NOTIFIER)},
        )
        return catalog

    def _watch_keys(self, catalog: Catalog, manager: CaManager) -> KeyWatch:
        def ca_ends() -> datetime | None:
            active = manager.x509_slots.active
            return None if active is None else active.not_after

        plugin = catalog.one(PluginKind.KEY_MANAGER).plugin
        return KeyWatch(plugin, ca_ends, logs.get_logger("keymanager"))

    def _own_bundle(self) -> Bundle:
        return pluginhost.no_bundle() if self._bundles is None else self._bundles.own

    async def _open_endpoints(self, parts: Parts, health: Health) -> None:
        settings, bundles = self.settings, parts.bundles
        self._endpoints = Endpoints(
            Doors(
                trust_domain=settings.trust_domain,
                address=settings.bind_address,
                port=settings.bind_port,
                socket_path=settings.socket_path,
                admin_ids=settings.admin_ids,
                identity=parts.identity.tls_identity,
                bundles=lambda: bundles.all,
            ),
            build_services(parts, settings),
            build_interceptors(parts, settings, self.telemetry),
            is_healthy=health.is_healthy,
            clock=self.clock,
            log=logs.get_logger("api"),
        )
        await self._endpoints.start()
        self._stack.push_async_callback(self._endpoints.close, GRACE_S)
        self._stack.callback(parts.postures.heartbeats.end)

    async def _announce(self, catalog: Catalog, parts: Parts) -> None:
        announcer = Announcer(
            parts.bundles.watch,
            notifiers=[(p.name, p.plugin) for p in catalog.all(PluginKind.NOTIFIER)],
            publishers=[(p.name, p.plugin) for p in catalog.all(PluginKind.BUNDLE_PUBLISHER)],
            clock=self.clock,
            log=logs.get_logger("bundle_publishing"),
        )
        self._stack.push_async_callback(announcer.close)
        await announcer.start()

    async def _let_metrics_be_read(self, parts: Parts) -> None:
        if not self.telemetry.is_read:
            return
        gauges = Gauges(
            self.telemetry,
            trust_domain=self.settings.trust_domain,
            manager=parts.manager,
            postures=parts.postures,
            nodes=parts.nodes,
            entries=parts.entries,
            clock=self.clock,
        )
        self.telemetry.before_reading(gauges.measure)
        bundles = parts.bundles
        await self.telemetry.start(
            identity=parts.identity.tls_identity, bundles=lambda: bundles.all
        )
        self._stack.push_async_callback(self.telemetry.close)

    def _start_loops(self, parts: Parts, health: Health) -> None:
        settings = self.settings
        housekeeping = Housekeeping(
            parts.store,
            HousekeepingSettings(
                nodes_after=settings.prune_attested_nodes_expired_for,
                nodes_batch=settings.prune_attested_nodes_batch_size,
                tofu_nodes=settings.prune_tofu_nodes,
                changes_after=settings.prune_events_older_than,
            ),
            clock=self.clock,
            log=logs.get_logger("housekeeping"),
            metrics=self.telemetry.metrics,
        )
        loops: dict[str, Coroutine[Any, Any, None]] = {
            "CA rotation": parts.manager.run(),
            "server SVID rotation": parts.identity.run(),
            "node cache": parts.nodes.run(),
            "own changes of nodes": parts.nodes.follow_own(),
            "housekeeping": housekeeping.run(),
            "custody of keys": parts.custodian.run(),
            "health": health.run(),
            **parts.postures.loops(),
        }
        if parts.keys.uses is not None:
            loops["last use of keys"] = parts.keys.uses.run()
        tasks = Tasks(on_failure=self._broke_down)
        self._stack.push_async_callback(tasks.close)
        for name, loop in loops.items():
            tasks.start(name, loop)


def _tighten_umask() -> None:
    before = os.umask(_UMASK)
    os.umask(before | _UMASK)
    if before | _UMASK != before:
        logs.get_logger("server").info(
            "umask tightened", before=f"{before:04o}", now=f"{before | _UMASK:04o}"
        )
