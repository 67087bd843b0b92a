"""The services and the checks around them, put together from the server's parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw import log as logs
from spire_hw.errors import NotReadyError, UnavailableError
from spire_hw.key import generate_private_key, spki_der
from spire_hw.rpc.interceptors import Guard, Interceptor, RequestId
from spire_hw.rpc.measure import Measure
from spire_hw.rpc.probes import Health
from spire_hw_server.api.agent import AgentService
from spire_hw_server.api.audit import Audit
from spire_hw_server.api.authorize import Authorizer
from spire_hw_server.api.bundle import BundleService
from spire_hw_server.api.ca import CaService
from spire_hw_server.api.debug import DebugService
from spire_hw_server.api.devid import DevIdService
from spire_hw_server.api.entry import EntryService
from spire_hw_server.api.keys import KeysService
from spire_hw_server.api.limits import Limits
from spire_hw_server.api.localauthority import LocalAuthorityService
from spire_hw_server.api.logger import LoggerService
from spire_hw_server.api.policies import PolicyService
from spire_hw_server.api.posture import PostureAdminService, PostureService
from spire_hw_server.api.svid import SvidService
from spire_hw_server.api.tpm import TpmService

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw.clock import Clock
    from spire_hw.plugin.keymanager import Keys
    from spire_hw.rpc.probes import Check
    from spire_hw.telemetry.host import Telemetry
    from spire_hw_server.admission import Admissions
    from spire_hw_server.api.nodes import NodeCache
    from spire_hw_server.bundles import Bundles
    from spire_hw_server.ca.authority import Issuer
    from spire_hw_server.ca.custody import Custodian
    from spire_hw_server.ca.identity import ServerIdentity
    from spire_hw_server.ca.manager import CaManager
    from spire_hw_server.config import ServerSettings
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.entries import EntryCache
    from spire_hw_server.keywatch import KeyWatch
    from spire_hw_server.posture.postures import Postures

_HEALTH_PATH: Final = ("for", "health", "check", "only")


@dataclass(frozen=True, slots=True)
class Parts:
    """What services are made from; all of it started."""

    clock: Clock
    store: Datastore
    entries: EntryCache
    bundles: Bundles
    nodes: NodeCache
    issuer: Issuer
    manager: CaManager
    keys: Keys
    custodian: Custodian
    identity: ServerIdentity
    admissions: Admissions
    postures: Postures


@dataclass(frozen=True, slots=True)
class Services:
    """What is served."""

    agent: AgentService
    bundle: BundleService
    entry: EntryService
    svid: SvidService
    local_authority: LocalAuthorityService
    ca: CaService
    tpm: TpmService
    devid: DevIdService
    keys: KeysService
    policy: PolicyService
    posture: PostureService
    posture_admin: PostureAdminService
    debug: DebugService
    logger: LoggerService


def build_services(parts: Parts, settings: ServerSettings) -> Services:
    """Return the services of a server."""
    trust_domain = settings.trust_domain
    jwt_enabled = not settings.disable_jwt_svids
    audit = Audit(enabled=settings.audit_log_enabled)
    limits = Limits(
        clock=parts.clock,
        attestation=settings.ratelimit_attestation,
        signing=settings.ratelimit_signing,
    )
    return Services(
        agent=AgentService(
            trust_domain=trust_domain,
            store=parts.store,
            nodes=parts.nodes,
            entries=parts.entries,
            admissions=parts.admissions,
            issuer=parts.issuer,
            limits=limits,
            audit=audit,
            clock=parts.clock,
        ),
        bundle=BundleService(
            trust_domain=trust_domain,
            store=parts.store,
            bundles=parts.bundles,
            limits=limits,
            audit=audit,
        ),
        entry=EntryService(
            trust_domain=trust_domain, store=parts.store, entries=parts.entries, audit=audit
        ),
        svid=SvidService(
            trust_domain=trust_domain,
            entries=parts.entries,
            bundles=parts.bundles,
            issuer=parts.issuer,
            limits=limits,
            audit=audit,
            jwt_enabled=jwt_enabled,
        ),
        local_authority=LocalAuthorityService(
            manager=parts.manager, audit=audit, jwt_enabled=jwt_enabled
        ),
        ca=CaService(manager=parts.manager, audit=audit),
        tpm=TpmService(store=parts.store, audit=audit),
        devid=DevIdService(store=parts.store, audit=audit, clock=parts.clock),
        keys=KeysService(custodian=parts.custodian, audit=audit),
        policy=PolicyService(store=parts.store, policies=parts.postures.policies, audit=audit),
        posture=PostureService(postures=parts.postures),
        posture_admin=PostureAdminService(
            trust_domain=trust_domain,
            store=parts.store,
            postures=parts.postures,
            audit=audit,
            clock=parts.clock,
        ),
        debug=DebugService(
            trust_domain=trust_domain,
            store=parts.store,
            identity=parts.identity,
            clock=parts.clock,
        ),
        logger=LoggerService(logs.output()),
    )


def build_interceptors(
    parts: Parts, settings: ServerSettings, telemetry: Telemetry
) -> list[Interceptor | Guard]:
    """Return what runs around every call, the outermost first."""
    measure: list[Interceptor | Guard] = [Measure(telemetry.metrics)] if telemetry.is_read else []
    authorizer = Authorizer(
        admin_ids=settings.admin_ids,
        entries_of=parts.entries.by_spiffe_id,
        nodes=parts.nodes,
        store=parts.store,
        clock=parts.clock,
    )
    if not settings.audit_log_enabled:
        return [*measure, RequestId(), authorizer]
    return [*measure, RequestId(), Audit(enabled=True), authorizer]


def build_health(
    parts: Parts, settings: ServerSettings, plugins: Mapping[str, Check], keys: KeyWatch
) -> Health:
    """Return the server's health checks, with upstream's names, and those of its plugins and keys."""
    spki = spki_der(generate_private_key(settings.ca_key_type).public_key())
    throw_away = settings.trust_domain.member(*_HEALTH_PATH)

    async def server() -> None:
        if not parts.bundles.own.x509_authorities:
            raise NotReadyError("the trust bundle is empty")
        if parts.clock.now() >= parts.identity.svid.not_after:
            raise NotReadyError("the server's own SVID has expired")

    async def rotator() -> None:
        if not parts.manager.healthy:
            raise UnavailableError("the CA could not be rotated several times in a row")

    async def authority() -> None:
        keys.look()
        await parts.issuer.x509_svid(spki=spki, spiffe_id=throw_away, ttl=settings.x509_svid_ttl)

    return Health(
        quick={"server": server, "server.ca.rotator": rotator},
        waiting={**plugins, "server.keymanager": keys.check},
        costly={"server.ca": authority, "catalog.datastore": parts.store.ping},
        clock=parts.clock,
        log=logs.get_logger("health"),
    )
