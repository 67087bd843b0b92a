"""The composition root: builds the server from its settings, runs it, closes it."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from spire_hw import __version__
from spire_hw import log as logs
from spire_hw.aio.program import Program, run_program
from spire_hw.aio.tasks import Tasks
from spire_hw.catalog import Catalog, External, Table, check_plugins, plugin_data
from spire_hw.clock import Clock, SystemClock
from spire_hw.datadir import lock_data_dir, prepare_data_dir
from spire_hw.errors import (
    ConfigError,
    ConfigFault,
    InvalidInputError,
    NotReadyError,
)
from spire_hw.pkcs11.inventory.reaping import SharedToken, SharedTokenSource
from spire_hw.plugin.info import HostInfo, PluginKind, Side
from spire_hw.plugin.keycalls import KeyCalls
from spire_hw.plugin.keymanager import KeyRetention, Keys
from spire_hw.plugin.keyuses import KeyUses
from spire_hw.plugin.section import SERVER_RULES, PluginConfig
from spire_hw.rpc.probes import HealthListener, answer_probes
from spire_hw.telemetry.host import Telemetry
from spire_hw.telemetry.logged import count_log_lines
from spire_hw.telemetry.metrics import NO_METRICS
from spire_hw.x509.name import Subject
from spire_hw_plugins import builtin
from spire_hw_server.admission import JOIN_TOKEN, Admissions
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
from spire_hw_server.bundles import Bundles
from spire_hw_server.ca.authority import Issuer
from spire_hw_server.ca.compose import Composers
from spire_hw_server.ca.custody import Custodian
from spire_hw_server.ca.identity import ServerIdentity
from spire_hw_server.ca.manager import Authority, CaManager, CaSettings
from spire_hw_server.ca.mark import AuthorityMark
from spire_hw_server.ca.profile import Profile
from spire_hw_server.datastore.config import parse_datastore
from spire_hw_server.datastore.records import EntryFilter, NodeFilter, Page
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.entries import EntryCache
from spire_hw_server.gauges import Gauges
from spire_hw_server.hostservices import ServerServices
from spire_hw_server.housekeeping import Housekeeping, HousekeepingSettings
from spire_hw_server.keywatch import KeyWatch
from spire_hw_server.posture.policyfiles import find_policy_faults
from spire_hw_server.posture.postures import Postures

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from datetime import datetime
    from typing import Any

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.plugin.info import Builder, EkList
    from spire_hw.posture.judge import Judge
    from spire_hw.rpc.probes import Health
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_server.config import ServerSettings
    from spire_hw_server.datastore.interface import Datastore

GRACE_S: Final = 10.0
KEY_USES_FILE: Final = "key-uses.json"
_UMASK: Final = 0o027
_FORGETFUL: Final = "memory"


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


async def check_settings(
    settings: ServerSettings, *, clock: Clock | None = None
) -> list[ConfigFault]:
    """Return the faults of plugins, store settings and policy files.

    Policy files are read. Nothing else is touched but external plugins, which are started, asked
    and stopped.
    """
    faults: list[ConfigFault] = []
    try:
        parse_datastore(settings.store.data, settings.file)
    except ConfigError as e:
        faults += e.faults
    if settings.posture.policy_dir is not None:
        found = await asyncio.to_thread(find_policy_faults, settings.posture.policy_dir)
        faults += [ConfigFault(0, f'"policy_dir": {message}') for message in found]
    host = _host(settings, clock or SystemClock(), _UnopenedEkList(), _no_bundle)
    services = ServerServices(clock=host.clock, log=host.log)
    faults += await check_plugins(
        _plugins(settings),
        _table,
        host,
        SERVER_RULES,
        names=_names,
        external=External(services.offered),
    )
    return sorted(faults, key=lambda f: f.line)


@asynccontextmanager
async def shared_token(settings: ServerSettings, name: str) -> AsyncIterator[SharedToken]:
    """Open the token on which the server's keys are, beside the server; nothing of it is claimed.

    Args:
        settings: the server's.
        name: which of several tokens; the only one when empty.

    Raises:
        InvalidInputError: its KeyManager keeps keys elsewhere.
        SpireHwError: the token cannot be opened.
    """
    (manager,) = [p for p in settings.plugins if p.kind is PluginKind.KEY_MANAGER]
    host = _host(settings, SystemClock(), _UnopenedEkList(), _no_bundle)
    plugin: object = None if manager.cmd else _table(manager.kind, manager.name)(host)
    if not isinstance(plugin, SharedTokenSource):
        raise InvalidInputError(
            f'KeyManager "{manager.name}" keeps no keys on a token that others may use: only '
            '"pkcs11" does'
        )
    data = await asyncio.to_thread(plugin_data, manager)
    async with plugin.shared_token(data, name) as token:
        yield token


@asynccontextmanager
async def keys_at_rest(settings: ServerSettings) -> AsyncIterator[KeyRetention]:
    """Open the KeyManager of a server that does not run, for its replaced keys.

    Raises:
        UnavailableError: the server runs.
        InvalidInputError: its KeyManager keeps no replaced keys.
        SpireHwError: the keys cannot be opened.
    """
    (manager,) = [p for p in settings.plugins if p.kind is PluginKind.KEY_MANAGER]
    let_go = lock_data_dir(settings.data_dir, "server")
    try:
        host = _host(settings, SystemClock(), _UnopenedEkList(), _no_bundle)
        plugin = None if manager.cmd else _table(manager.kind, manager.name)(host)
        keeper: object = plugin
        if plugin is None or not isinstance(keeper, KeyRetention):
            raise InvalidInputError(f"KeyManager {manager.name} keeps no replaced keys")
        try:
            await plugin.configure(await asyncio.to_thread(plugin_data, manager))
            yield keeper
        finally:
            await plugin.close()
    finally:
        let_go()


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
        self._table = table or _table
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
        store = await self._open_store()
        nodes = NodeCache(store, clock=self.clock, log=logs.get_logger("cache"))
        await nodes.start()
        postures = await self._open_postures(store, nodes)
        catalog = await Catalog.load(
            _plugins(settings),
            self._table,
            _host(
                settings,
                self.clock,
                store,
                self._own_bundle,
                judge=postures.judge,
                metrics=self.telemetry.metrics,
            ),
            SERVER_RULES,
            names=_names,
            external=External(self._services.offered),
        )
        self._stack.push_async_callback(catalog.close)
        self._catalog = catalog
        postures.use(
            {p.name: p.plugin for p in catalog.all(PluginKind.NODE_ATTESTOR)},
            {p.name: p.plugin for p in catalog.all(PluginKind.NOTIFIER)},
        )
        parts = await self._open_parts(store, catalog, nodes, postures)
        self._services.open(store, parts.identity, parts.bundles)
        health = build_health(
            parts, settings, catalog.checks(), self._watch_keys(catalog, parts.manager)
        )
        bundles = parts.bundles
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
        self._stack.callback(postures.heartbeats.end)
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

    def _watch_keys(self, catalog: Catalog, manager: CaManager) -> KeyWatch:
        def ca_ends() -> datetime | None:
            active = manager.x509_slots.active
            return None if active is None else active.not_after

        plugin = catalog.one(PluginKind.KEY_MANAGER).plugin
        return KeyWatch(plugin, ca_ends, logs.get_logger("keymanager"))

    def _own_bundle(self) -> Bundle:
        return _no_bundle() if self._bundles is None else self._bundles.own

    async def _open_store(self) -> Datastore:
        settings = self.settings
        config = parse_datastore(settings.store.data, settings.file)
        store = await open_datastore(config, clock=self.clock, log=logs.get_logger("sql"))
        self._stack.push_async_callback(store.close)
        first = await store.list_entries(EntryFilter(), Page(size=1))
        for entry in first.entries:
            if entry.spiffe_id.trust_domain != settings.trust_domain:
                raise NotReadyError(
                    f'the datastore belongs to trust domain "{entry.spiffe_id.trust_domain}", the '
                    f'configuration is for "{settings.trust_domain}"; use another database or '
                    "correct trust_domain"
                )
        nodes = await store.list_nodes(NodeFilter(), Page(size=1))
        for node in nodes.nodes:
            if node.agent_id.trust_domain != settings.trust_domain:
                self.log.warning(
                    "an attested node is of another trust domain", id=str(node.agent_id)
                )
        return store

    async def _open_postures(self, store: Datastore, nodes: NodeCache) -> Postures:
        settings = self.settings
        postures = Postures(
            store,
            settings.posture,
            trust_domain=settings.trust_domain,
            node_of=nodes.get,
            poll_s=settings.cache_reload_interval.total_seconds(),
            full_reload_s=settings.full_cache_reload_interval.total_seconds(),
            clock=self.clock,
            log=logs.get_logger("posture"),
            metrics=self.telemetry.metrics,
        )
        await postures.start()
        self._stack.push_async_callback(postures.close)
        nodes.on_change = postures.heartbeats.node_changed
        self._postures = postures
        return postures

    async def _open_parts(
        self, store: Datastore, catalog: Catalog, nodes: NodeCache, postures: Postures
    ) -> Parts:
        settings, clock = self.settings, self.clock
        poll_s = settings.cache_reload_interval.total_seconds()
        full_s = settings.full_cache_reload_interval.total_seconds()
        log = logs.get_logger("cache")
        bundles = Bundles(
            store,
            trust_domain=settings.trust_domain,
            clock=clock,
            log=log,
            poll_s=poll_s,
            full_reload_s=full_s,
        )
        await bundles.start()
        self._stack.push_async_callback(bundles.close)
        self._bundles = bundles
        entries = EntryCache(
            store,
            trust_domain=settings.trust_domain,
            clock=clock,
            log=log,
            poll_s=poll_s,
            full_reload_s=full_s,
            metrics=self.telemetry.metrics,
        )
        await entries.start()
        self._stack.push_async_callback(entries.close)
        composers = [(p.name, p.plugin) for p in catalog.all(PluginKind.CREDENTIAL_COMPOSER)]
        metrics = self.telemetry.metrics
        issuer = Issuer(_profile(settings), clock, Composers(composers), metrics)
        keys = await self._open_keys(catalog)
        manager = await self._open_ca(store, bundles, issuer, catalog, keys)
        identity = ServerIdentity(
            issuer,
            settings.ca_key_type,
            is_tainted=manager.is_tainted,
            clock=clock,
            log=logs.get_logger("svid_rotator"),
            metrics=metrics,
        )
        await identity.renew()
        self._manager, self._identity = manager, identity
        custodian = Custodian(
            keys,
            manager,
            trust_domain=settings.trust_domain,
            telemetry=self.telemetry,
            clock=clock,
            log=logs.get_logger("keys"),
        )
        admissions = Admissions(
            store,
            trust_domain=settings.trust_domain,
            attestors={p.name: p.plugin for p in catalog.all(PluginKind.NODE_ATTESTOR)},
            clock=clock,
            log=logs.get_logger("admission"),
            is_banned=entries.is_banned,
            judge=postures.judge,
            # An operator's agent_path_template may lead elsewhere, as upstream has it.
            strict_ids=False,
            metrics=metrics,
        )
        return Parts(
            clock=clock,
            store=store,
            entries=entries,
            bundles=bundles,
            nodes=nodes,
            issuer=issuer,
            manager=manager,
            keys=keys,
            custodian=custodian,
            identity=identity,
            admissions=admissions,
            postures=postures,
        )

    async def _open_keys(self, catalog: Catalog) -> Keys:
        found = catalog.one(PluginKind.KEY_MANAGER)
        uses = KeyUses(
            self.settings.data_dir / KEY_USES_FILE, clock=self.clock, log=logs.get_logger("keys")
        )
        await asyncio.to_thread(uses.load)
        self._stack.callback(uses.save)
        calls = KeyCalls(self.telemetry.metrics, Side.SERVER)
        return Keys(found.plugin, found.name, calls, uses)

    async def _open_ca(
        self,
        store: Datastore,
        bundles: Bundles,
        issuer: Issuer,
        catalog: Catalog,
        keys: Keys,
    ) -> CaManager:
        settings = self.settings
        upstream = [Authority(p.plugin, p.name) for p in catalog.all(PluginKind.UPSTREAM_AUTHORITY)]
        manager = CaManager(
            CaSettings(
                trust_domain=settings.trust_domain,
                ca_ttl=settings.ca_ttl,
                ca_key_type=settings.ca_key_type,
                jwt_key_type=settings.jwt_key_type,
                jwt_enabled=not settings.disable_jwt_svids,
                keys_persist=keys.name != _FORGETFUL,
                accept_lost_authorities=settings.accept_lost_authorities,
            ),
            keys=keys,
            store=store,
            bundles=bundles,
            issuer=issuer,
            mark=AuthorityMark(settings.data_dir),
            clock=self.clock,
            log=logs.get_logger("ca_manager"),
            upstream=upstream[0] if upstream else None,
            metrics=self.telemetry.metrics,
        )
        self._stack.push_async_callback(manager.close)
        await manager.start()
        return manager

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


def _profile(settings: ServerSettings) -> Profile:
    subject = Subject(
        country=settings.ca_subject.country,
        organization=settings.ca_subject.organization,
        common_name=settings.ca_subject.common_name,
    )
    return Profile(
        trust_domain=settings.trust_domain,
        x509_svid_ttl=settings.x509_svid_ttl,
        jwt_svid_ttl=settings.jwt_svid_ttl,
        agent_ttl=settings.agent_ttl,
        jwt_issuer=settings.jwt_issuer,
        ca_subject=subject.encode(),
    )


def _tighten_umask() -> None:
    before = os.umask(_UMASK)
    os.umask(before | _UMASK)
    if before | _UMASK != before:
        logs.get_logger("server").info(
            "umask tightened", before=f"{before:04o}", now=f"{before | _UMASK:04o}"
        )


def _plugins(settings: ServerSettings) -> list[PluginConfig]:
    """Return the configured plugins without `join_token`, which is part of the server."""
    return [
        p
        for p in settings.plugins
        if p.cmd or (p.kind, p.name) != (PluginKind.NODE_ATTESTOR, JOIN_TOKEN)
    ]


def _table(kind: PluginKind, name: str) -> Builder:
    return builtin.lookup(kind, name, Side.SERVER)


def _names(kind: PluginKind) -> list[str]:
    return builtin.names(kind, Side.SERVER)


class _UnopenedEkList:
    """Stands for the store while a configuration is only checked: it is there, but not asked."""

    async def is_ek_allowed(self, ek_hash: str) -> bool:
        raise NotReadyError(f"the store is not open, cannot look for {ek_hash}")


def _no_bundle() -> Bundle:
    raise NotReadyError("the server is not up, it has no trust bundle yet")


def _host(
    settings: ServerSettings,
    clock: Clock,
    store: EkList,
    trust_bundle: Callable[[], Bundle],
    *,
    judge: Judge | None = None,
    metrics: Metrics = NO_METRICS,
) -> HostInfo:
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
