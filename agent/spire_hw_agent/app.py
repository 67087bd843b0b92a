"""Composition root of the agent: builds everything, runs it, closes it in reverse."""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING

from typing_extensions import override

from spire_hw import __version__
from spire_hw.aio.program import Program, run_program
from spire_hw.aio.tasks import Tasks
from spire_hw.bundle.bundle import Bundle
from spire_hw.catalog import Catalog, External, check_plugins
from spire_hw.clock import Clock, SystemClock
from spire_hw.errors import NotReadyError, SpireHwError, UnavailableError
from spire_hw.log import get_logger
from spire_hw.plugin.hostservices import HostServices
from spire_hw.plugin.info import HostInfo, PluginKind, Side
from spire_hw.plugin.keycalls import KeyCalls
from spire_hw.plugin.keymanager import Keys
from spire_hw.plugin.metrics import PluginMetrics
from spire_hw.plugin.section import AGENT_RULES
from spire_hw.posture.heartbeat import HeartbeatSource
from spire_hw.rotation import draw_jitter, rotation_due_at
from spire_hw.rpc.probes import Health, HealthListener, answer_probes
from spire_hw.telemetry.host import Telemetry
from spire_hw.telemetry.logged import count_log_lines
from spire_hw.telemetry.metrics import NO_METRICS
from spire_hw_agent.cache import Cache
from spire_hw_agent.cutoff import CutOff
from spire_hw_agent.enroll import Enroller
from spire_hw_agent.heartbeat import Heartbeat
from spire_hw_agent.identity import AgentIdentity
from spire_hw_agent.storage import Storage
from spire_hw_agent.svidstore import SvidStores
from spire_hw_agent.sync import Synchroniser
from spire_hw_agent.trust import Trust
from spire_hw_agent.upstream.client import Upstream
from spire_hw_agent.workload.api import WorkloadApi
from spire_hw_agent.workload.attest import Attestors
from spire_hw_agent.workload.listen import workload_server
from spire_hw_plugins.builtin import lookup, names

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from spire_hw.errors import ConfigFault
    from spire_hw.plugin.info import Builder
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_agent.config import AgentSettings
    from spire_hw_agent.upstream.posture import Standing

_SVIDS = ("lru_cache_svid_map_size",)
_TOKENS = ("jwt_svid_cache_size",)
_RECORDS = ("lru_cache_record_map_size",)
_ENTRIES = ("sync_entries_total",)
_BUNDLES = ("sync_bundles_total",)
_ALIVE = ("agent_svid", "alive")
_STARTING = "the agent is starting: it has not synchronised with the server yet"
_HEALED = "this node is out of quarantine: the agent has not synchronised with the server yet"


class Agent(Program):
    """One agent: build it from settings, `start`, `close`.

    Args:
        settings: what the configuration says.
        clock: the agent's time.
    """

    def __init__(self, settings: AgentSettings, *, clock: Clock | None = None) -> None:
        super().__init__("agent", title="Agent")
        self.settings = settings
        self._clock = clock or SystemClock()
        self._why_not_ready = _STARTING
        self._random = random.SystemRandom()
        self._health_listener: HealthListener | None = None
        self._catalog: Catalog | None = None
        self.cache: Cache
        self.identity: AgentIdentity
        self._sync: Synchroniser
        self._stores: SvidStores
        self._cutoff: CutOff
        self.telemetry = Telemetry(
            settings.telemetry,
            service="spire_agent",
            trust_domain=settings.trust_domain,
            version=__version__,
            clock=self._clock,
            log=get_logger("telemetry"),
        )

    @property
    def health_port(self) -> int:
        """Return the port of the health probes, 0 without them."""
        return 0 if self._health_listener is None else self._health_listener.port

    @override
    async def _start(self) -> None:
        """Enrol, open the Workload API and keep everything up to date in the background.

        The socket is open from the start and answers UNAVAILABLE until the first synchronisation.

        Raises:
            SpireHwError: configuration, device, or a refusal by the server.
        """
        settings, clock = self.settings, self._clock
        for notice in settings.notices:
            self.log.warning(notice)
        if self.telemetry.is_read:
            self._stack.callback(count_log_lines(self.telemetry.metrics))
        storage = Storage(settings.data_dir)
        self._stack.callback(storage.close)
        catalog = await self._plugins()
        trust = Trust(settings, storage, clock=clock, log=get_logger("attestor"))
        upstream = self._upstream(trust)
        self._stack.push_async_callback(upstream.close)
        tasks = Tasks(self._failed)
        self._stack.push_async_callback(tasks.close)

        self.cache = Cache(
            trust.bundle or Bundle(settings.trust_domain),
            max_svids=settings.x509_svid_cache_max_size,
            max_tokens=settings.jwt_svid_cache_max_size,
        )
        self.identity = self._identity(catalog, upstream, trust, storage)
        self._sync = self._synchroniser(upstream, trust)
        self._stores = self._svid_stores(catalog)
        self._cutoff = CutOff(self.cache, log=get_logger("posture"), on_healed=self._on_healed)
        await self._serve(catalog, upstream)
        await self._listen_for_probes(catalog)
        await self._let_metrics_be_read(upstream)
        await self.identity.start()
        tasks.start("identity", self.identity.run())
        tasks.start("entries", self._sync.run_entries())
        tasks.start("svids", self._sync.run_svids())
        tasks.start("heartbeat", self._heartbeat(catalog, upstream).run())
        tasks.start("status", self._post_status(upstream))
        tasks.start("SVID stores", self._stores.run())

    def _upstream(self, trust: Trust) -> Upstream:
        return Upstream(
            self.settings.server_address,
            self.settings.server_port,
            self.settings.trust_domain,
            trust,
            clock=self._clock,
            log=get_logger("upstream"),
        )

    def _identity(
        self, catalog: Catalog, upstream: Upstream, trust: Trust, storage: Storage
    ) -> AgentIdentity:
        key_manager = catalog.one(PluginKind.KEY_MANAGER)
        attestor = catalog.one(PluginKind.NODE_ATTESTOR)
        enroller = Enroller(
            trust_domain=self.settings.trust_domain,
            keys=Keys(
                key_manager.plugin,
                key_manager.name,
                KeyCalls(self.telemetry.metrics, Side.AGENT),
            ),
            attestor_name=attestor.name,
            attestor=attestor.plugin,
            upstream=upstream,
            trust=trust,
            storage=storage,
            clock=self._clock,
            log=get_logger("attestor"),
            renew_at=self._renew_at,
            metrics=self.telemetry.metrics,
        )
        return AgentIdentity(
            enroller,
            upstream,
            trust,
            storage,
            clock=self._clock,
            log=get_logger("manager"),
            on_end=self._end,
            on_lost=self.cache.revoke,
            on_new=self._on_new_identity,
            on_new_trust=self.cache.reissue,
        )

    def _synchroniser(self, upstream: Upstream, trust: Trust) -> Synchroniser:
        return Synchroniser(
            upstream,
            trust,
            self.cache,
            clock=self._clock,
            log=get_logger("manager"),
            interval_s=self.settings.sync_interval.total_seconds(),
            key_type=self.settings.workload_x509_svid_key_type,
            renew_at=self._renew_at,
            on_synchronised=self._on_synchronised,
            on_denied=self.identity.denied,
            metrics=self.telemetry.metrics,
        )

    def _heartbeat(self, catalog: Catalog, upstream: Upstream) -> Heartbeat:
        attestor = catalog.one(PluginKind.NODE_ATTESTOR).plugin
        return Heartbeat(
            upstream,
            attestor if isinstance(attestor, HeartbeatSource) else None,
            clock=self._clock,
            log=get_logger("posture"),
            on_standing=self._on_standing,
            on_denied=self.identity.denied,
        )

    def _svid_stores(self, catalog: Catalog) -> SvidStores:
        return SvidStores(
            self.cache,
            {p.name: p.plugin for p in catalog.all(PluginKind.SVID_STORE)},
            clock=self._clock,
            log=get_logger("svid_store"),
        )

    def _on_new_identity(self) -> None:
        self._sync.wake()

    def _on_standing(self, standing: Standing | None) -> None:
        self._cutoff.follow(standing)
        self.identity.follow(standing)

    def _on_healed(self) -> None:
        self._why_not_ready = _HEALED
        self._sync.wake()

    def _on_synchronised(self) -> None:
        self._why_not_ready = ""

    def _renew_at(self, not_before: datetime, not_after: datetime) -> datetime:
        return rotation_due_at(
            not_before,
            not_after,
            jitter=draw_jitter(self._random),
            availability_target=self.settings.availability_target,
        )

    async def _plugins(self) -> Catalog:
        catalog = await Catalog.load(
            self.settings.plugins,
            _table,
            _host(self.settings, self._clock, self.telemetry.metrics),
            AGENT_RULES,
            names=_names,
            external=_external(self._clock, self.telemetry.metrics),
        )
        self._stack.push_async_callback(catalog.close)
        self._catalog = catalog
        return catalog

    async def reconfigure(self) -> None:
        """Read the plugins' data files again; what goes wrong is logged."""
        if self._catalog is not None:
            await self._catalog.reconfigure()

    async def _serve(self, catalog: Catalog, upstream: Upstream) -> None:
        log = get_logger("endpoints")
        path = self.settings.socket_path
        if path is None:
            log.info("The Workload API is switched off")
            return
        attestors = Attestors(
            [(p.name, p.plugin) for p in catalog.all(PluginKind.WORKLOAD_ATTESTOR)],
            get_logger("workload_attestor"),
            log_selectors=self.settings.log_selectors,
            clock=self._clock,
            metrics=self.telemetry.metrics,
        )
        api = WorkloadApi(
            self.cache,
            attestors,
            clock=self._clock,
            check=self.check_ready,
            new_jwt_svid=upstream.new_jwt_svid,
            open_bundles=self.settings.allow_unauthenticated_verifiers,
            foreign_claims=self.settings.allowed_foreign_jwt_claims,
        )
        server = workload_server(
            path,
            api,
            is_healthy=self.is_healthy,
            log=log,
            metrics=self.telemetry.metrics,
        )
        await server.start()
        self._stack.push_async_callback(server.close, 1.0)
        log.info(
            "Starting Workload and SDS APIs",
            address=str(path),
            network="unix",
        )

    async def _listen_for_probes(self, catalog: Catalog) -> None:
        log = get_logger("health")
        health = Health(
            waiting={
                "agent": self._check_ready,
                "agent.svid": self._check_identity,
                **catalog.checks(),
            },
            clock=self._clock,
            log=log,
        )
        listener = await answer_probes(health, self.settings.health, self._stack)
        if listener is not None:
            log.info("Serving health checks", address=listener.address)
        self._health_listener = listener

    async def _let_metrics_be_read(self, upstream: Upstream) -> None:
        telemetry, metrics, cache = self.telemetry, self.telemetry.metrics, self.cache
        if not telemetry.is_read:
            return

        def measure() -> None:
            metrics.gauge(_SVIDS, cache.svid_count)
            metrics.gauge(_TOKENS, len(cache.tokens))
            metrics.gauge(_RECORDS, len(cache.entries))
            metrics.gauge(_ENTRIES, len(cache.entries))
            metrics.gauge(_BUNDLES, len(cache.bundles()))
            metrics.gauge(_ALIVE, self.identity.is_alive())

        telemetry.before_reading(measure)
        await telemetry.start(identity=upstream.tls_identity, bundles=cache.bundles)
        self._stack.push_async_callback(telemetry.close)

    async def _check_ready(self) -> None:
        self.check_ready()

    async def _check_identity(self) -> None:
        if not self.identity.is_alive():
            raise NotReadyError("the agent has no SVID that is alive")

    def check_ready(self) -> None:
        """Say why workloads cannot be served now.

        Raises:
            DeniedError: the server has this node in quarantine, or banned it.
            UnavailableError: the agent has not synchronised yet.
        """
        self._cutoff.check()
        if self._why_not_ready:
            raise UnavailableError(self._why_not_ready)

    async def is_healthy(self) -> bool:
        """Tell whether the agent can serve workloads and its own identity is alive."""
        try:
            self.check_ready()
        except SpireHwError:
            return False
        return self.identity.is_alive()

    async def _post_status(self, upstream: Upstream) -> None:
        try:
            await upstream.post_status(__version__)
        except SpireHwError as e:
            self.log.warning("Failed to post the agent's status", error=e.message)

    def _failed(self, name: str, error: BaseException) -> None:
        self.log.error("A background task failed", task=name, exc_info=error)
        self._end(SpireHwError(f"{name} failed: {error}"))


def _host(settings: AgentSettings, clock: Clock, metrics: Metrics = NO_METRICS) -> HostInfo:
    return HostInfo(
        side=Side.AGENT,
        trust_domain=settings.trust_domain,
        data_dir=settings.data_dir,
        log=get_logger("catalog"),
        clock=clock,
        join_token=settings.join_token,
        metrics=metrics,
    )


def _external(clock: Clock, metrics: Metrics = NO_METRICS) -> External:
    return External(HostServices(metrics=PluginMetrics(get_logger("catalog"), clock, metrics)))


def _table(kind: PluginKind, name: str) -> Builder:
    return lookup(kind, name, Side.AGENT)


def _names(kind: PluginKind) -> list[str]:
    return names(kind, Side.AGENT)


async def check(settings: AgentSettings) -> list[ConfigFault]:
    """Return the faults of all plugins' configurations.

    Nothing is touched but external plugins, which are started, asked and stopped.
    """
    host = _host(settings, SystemClock())
    return await check_plugins(
        settings.plugins,
        _table,
        host,
        AGENT_RULES,
        names=_names,
        external=_external(host.clock),
    )


async def run(settings: AgentSettings, *, on_ready: Callable[[], None] | None = None) -> None:
    """Run an agent until a signal or the server ends it.

    Raises:
        SpireHwError: it could not start, or cannot go on.
    """
    await run_program(lambda: Agent(settings), signal.SIGUSR1, Agent.reconfigure, on_ready)
