"""The parts of a server, opened in the order in which they need each other."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw import log as logs
from spire_hw.errors import NotReadyError
from spire_hw.plugin.info import PluginKind, Side
from spire_hw.plugin.keycalls import KeyCalls
from spire_hw.plugin.keymanager import Keys
from spire_hw.plugin.keyuses import KeyUses
from spire_hw.x509.name import Subject
from spire_hw_server.admission import Admissions
from spire_hw_server.api.services import Parts
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
from spire_hw_server.posture.postures import Postures

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from spire_hw.catalog import Catalog
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.telemetry.host import Telemetry
    from spire_hw_server.api.nodes import NodeCache
    from spire_hw_server.config import ServerSettings
    from spire_hw_server.datastore.interface import Datastore

KEY_USES_FILE: Final = "key-uses.json"
_FORGETFUL: Final = "memory"


@dataclass(frozen=True, slots=True)
class Opener:
    """Opens parts; whoever has the stack closes them, the last one first.

    Attributes:
        settings: from server.conf.
        clock: the server's time.
        telemetry: where parts count what they do.
        stack: takes how each part is closed.
        log: of the server.
    """

    settings: ServerSettings
    clock: Clock
    telemetry: Telemetry
    stack: AsyncExitStack
    log: Logger

    @property
    def poll_s(self) -> float:
        """Return how often caches look for changes in the store."""
        return self.settings.cache_reload_interval.total_seconds()

    @property
    def full_reload_s(self) -> float:
        """Return how often they read all of it."""
        return self.settings.full_cache_reload_interval.total_seconds()

    async def open_store(self) -> Datastore:
        """Open the store.

        Raises:
            NotReadyError: it belongs to another trust domain.
            SpireHwError: it cannot be opened.
        """
        settings = self.settings
        config = parse_datastore(settings.store.data, settings.file)
        store = await open_datastore(config, clock=self.clock, log=logs.get_logger("sql"))
        self.stack.push_async_callback(store.close)
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

    async def open_postures(self, store: Datastore, nodes: NodeCache) -> Postures:
        """Start judging nodes, and follow the changes of them."""
        settings = self.settings
        postures = Postures(
            store,
            settings.posture,
            trust_domain=settings.trust_domain,
            node_of=nodes.get,
            poll_s=self.poll_s,
            full_reload_s=self.full_reload_s,
            clock=self.clock,
            log=logs.get_logger("posture"),
            metrics=self.telemetry.metrics,
        )
        await postures.start()
        self.stack.push_async_callback(postures.close)
        nodes.on_change = postures.heartbeats.node_changed
        return postures

    async def open_bundles(self, store: Datastore) -> Bundles:
        """Start following the trust bundles."""
        bundles = Bundles(
            store,
            trust_domain=self.settings.trust_domain,
            clock=self.clock,
            log=logs.get_logger("cache"),
            poll_s=self.poll_s,
            full_reload_s=self.full_reload_s,
        )
        await bundles.start()
        self.stack.push_async_callback(bundles.close)
        return bundles

    async def open_parts(
        self,
        store: Datastore,
        catalog: Catalog,
        nodes: NodeCache,
        postures: Postures,
        bundles: Bundles,
    ) -> Parts:
        """Open what services are made from: entries, keys, authorities, own SVID, admissions.

        Raises:
            SpireHwError: the store, the KeyManager or the authorities cannot be used.
        """
        settings, clock, metrics = self.settings, self.clock, self.telemetry.metrics
        entries = await self._open_entries(store)
        composers = [(p.name, p.plugin) for p in catalog.all(PluginKind.CREDENTIAL_COMPOSER)]
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

    async def _open_entries(self, store: Datastore) -> EntryCache:
        entries = EntryCache(
            store,
            trust_domain=self.settings.trust_domain,
            clock=self.clock,
            log=logs.get_logger("cache"),
            poll_s=self.poll_s,
            full_reload_s=self.full_reload_s,
            metrics=self.telemetry.metrics,
        )
        await entries.start()
        self.stack.push_async_callback(entries.close)
        return entries

    async def _open_keys(self, catalog: Catalog) -> Keys:
        found = catalog.one(PluginKind.KEY_MANAGER)
        uses = KeyUses(
            self.settings.data_dir / KEY_USES_FILE, clock=self.clock, log=logs.get_logger("keys")
        )
        await asyncio.to_thread(uses.load)
        self.stack.callback(uses.save)
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
        self.stack.push_async_callback(manager.close)
        await manager.start()
        return manager


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
