"""server.conf to `ServerSettings`: upstream's keys, checked all at once.

Keys that upstream knows and this release does not are refused by name, unless their value asks
for nothing. What is odd without being wrong ends up in `ServerSettings.notices`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Final

from pydantic import Field

from spire_hw.config.duration import format_duration
from spire_hw.config.hcl import Body
from spire_hw.config.host import (
    HealthChecks,
    HealthSettings,
    LogKeys,
    Override,
    Port,
    health_settings,
    load,
    override,
    parse_ip,
    parse_socket_path,
    parse_trust_domain,
)
from spire_hw.config.schema import GoDuration, Model, at_least, check, nearest, parsed
from spire_hw.errors import ConfigError, ConfigFault
from spire_hw.key import KeyType
from spire_hw.log import LogSettings  # noqa: TC001 - public field types stay real
from spire_hw.plugin.olddir import OldStyle, read_plugin_dir
from spire_hw.plugin.section import (
    SERVER_RULES,
    PluginConfig,
    StoreConfig,
    read_section,
)
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.telemetry.config import (
    TelemetryKeys,
    TelemetrySettings,
    find_telemetry_faults,
    telemetry_notices,
    telemetry_settings,
)
from spire_hw_server.postureconfig import (
    DEFAULT_POSTURE,
    PostureKeys,
    PostureSettings,
    find_posture_faults,
    posture_settings,
)

DEFAULT_CONFIG: Final = Path("conf/server/server.conf")
DEFAULT_SOCKET: Final = Path("/tmp/spire-server/private/api.sock")  # noqa: S108 - upstream's default
_DEFAULT_CA_TTL: Final = timedelta(hours=24)
_DEFAULT_X509_TTL: Final = timedelta(hours=1)
_DEFAULT_JWT_TTL: Final = timedelta(minutes=5)
_ACTIVATION_FRACTION: Final = 6
_MAX_GUARANTEE: Final = timedelta(days=7)
_STORE_NAMES: Final = ("sql",)


@dataclass(frozen=True, slots=True)
class CaSubject:
    """Subject of CA certificates."""

    country: tuple[str, ...] = ("US",)
    organization: tuple[str, ...] = ("SPIFFE",)
    common_name: str = ""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Everything a server is told, checked.

    Attributes:
        store: the `DataStore "sql"` block; its data are checked by the datastore room.
        admin_ids: may call the admin API over TCP; foreign trust domains are possible.
        prune_attested_nodes_expired_for: None leaves expired nodes alone.
        accept_lost_authorities: authority ids whose keys are gone for good; a new CA may be
            started in their place.
        health: None when probes are not answered over HTTP.
        posture: the block `posture { }`.
        telemetry: where metrics can be read, None for nowhere.
        plugins: in the order of the file, disabled ones too.
        notices: what the operator should hear at start.
        file: the file the settings come from.
    """

    trust_domain: TrustDomain
    bind_address: str
    bind_port: int
    socket_path: Path
    data_dir: Path
    log: LogSettings
    store: StoreConfig
    plugins: tuple[PluginConfig, ...]
    admin_ids: frozenset[SpiffeId] = frozenset()
    agent_ttl: timedelta = _DEFAULT_X509_TTL
    x509_svid_ttl: timedelta = _DEFAULT_X509_TTL
    jwt_svid_ttl: timedelta = _DEFAULT_JWT_TTL
    ca_ttl: timedelta = _DEFAULT_CA_TTL
    ca_key_type: KeyType = KeyType.EC_P256
    jwt_key_type: KeyType = KeyType.EC_P256
    ca_subject: CaSubject = CaSubject()
    jwt_issuer: str = ""
    disable_jwt_svids: bool = False
    audit_log_enabled: bool = False
    ratelimit_attestation: bool = True
    ratelimit_signing: bool = True
    prune_attested_nodes_expired_for: timedelta | None = None
    prune_attested_nodes_batch_size: int = 1000
    prune_tofu_nodes: bool = False
    cache_reload_interval: timedelta = timedelta(seconds=5)
    full_cache_reload_interval: timedelta = timedelta(hours=24)
    prune_events_older_than: timedelta = timedelta(hours=12)
    accept_lost_authorities: frozenset[str] = frozenset()
    health: HealthSettings | None = None
    posture: PostureSettings = DEFAULT_POSTURE
    telemetry: TelemetrySettings | None = None
    notices: tuple[str, ...] = ()
    file: str = ""


Ttl = Annotated[GoDuration, at_least(timedelta(seconds=1))]
KeyTypeName = Annotated[KeyType, parsed(KeyType.parse)]


class CaSubjectKeys(Model):
    """`ca_subject { }`."""

    country: list[str] = Field(default_factory=list)
    organization: list[str] = Field(default_factory=list)
    common_name: str = ""


class RateLimitKeys(Model):
    """`ratelimit { }`."""

    attestation: bool = True
    signing: bool = True


class ExperimentalKeys(Model):
    """`experimental { }`; keys nobody knows are passed over, as upstream does."""

    tolerant: ClassVar[bool] = True
    unsupported: ClassVar[Mapping[str, object]] = {
        "agent_spiffe_id_as_selector": False,
        "auth_opa_policy_engine": None,
        "event_timeout": None,
        "feature_flags": [],
        "named_pipe_name": None,
        "require_pq_kem": False,
        "sql_transaction_timeout": None,
        "wit_issuer": None,
        "wit_key_type": None,
    }

    accept_lost_authorities: list[str] = Field(default_factory=list)
    cache_reload_interval: Annotated[GoDuration, at_least(timedelta(milliseconds=100))] = timedelta(
        seconds=5
    )
    events_based_cache: bool = False
    full_cache_reload_interval: Ttl = timedelta(hours=24)
    prune_events_older_than: Ttl = timedelta(hours=12)


class ServerKeys(LogKeys):
    """`server { }`."""

    unsupported: ClassVar[Mapping[str, object]] = {
        "federation": Body.empty(),
        "max_attested_node_info_staleness": "0s",
        "profiling_enabled": False,
        "profiling_freq": None,
        "profiling_names": None,
        "profiling_port": None,
        "proxy_protocol_trusted_cidrs": [],
    }

    admin_ids: list[Annotated[SpiffeId, parsed(SpiffeId.parse)]] = Field(default_factory=list)
    agent_ttl: Ttl | None = None
    audit_log_enabled: bool = False
    bind_address: Annotated[str, parsed(parse_ip)] = "0.0.0.0"  # noqa: S104 - upstream's default
    bind_port: Port = 8081
    ca_key_type: KeyTypeName = KeyType.EC_P256
    ca_subject: CaSubjectKeys | None = None
    ca_ttl: Ttl = _DEFAULT_CA_TTL
    data_dir: Annotated[str, Field(min_length=1)]
    default_x509_svid_ttl: Ttl = _DEFAULT_X509_TTL
    default_jwt_svid_ttl: Ttl = _DEFAULT_JWT_TTL
    disable_jwt_svids: bool = False
    experimental: ExperimentalKeys = ExperimentalKeys()
    jwt_issuer: str = ""
    jwt_key_type: KeyTypeName | None = None
    plugin_dir: str = ""
    prune_attested_nodes_batch_size: Annotated[int, Field(ge=1, le=100_000)] = 1000
    prune_attested_nodes_expired_for: Ttl | None = None
    prune_tofu_nodes: bool = False
    ratelimit: RateLimitKeys = RateLimitKeys()
    socket_path: Annotated[Path, parsed(parse_socket_path)] = DEFAULT_SOCKET
    trust_domain: Annotated[TrustDomain, parsed(parse_trust_domain)]


class ServerFile(Model):
    """The whole file."""

    server: ServerKeys
    plugins: Body = Body.empty()
    health_checks: HealthChecks | None = None
    posture: PostureKeys | None = None
    telemetry: TelemetryKeys | None = None


def build_settings(body: Body, overrides: Mapping[str, Override] | None = None) -> ServerSettings:
    """Check what was read; see `load` for what is given and raised."""
    raw, faults = check(override(body, "server", overrides or {}), ServerFile)
    old = OldStyle()
    if raw is not None and raw.server.plugin_dir:
        old = read_plugin_dir(Path(raw.server.plugin_dir), raw.server.line("plugin_dir"))
    plugins, stores, wrong = read_section(body, old, SERVER_RULES, with_store=True)
    faults += wrong
    if body.blocks("plugins") or old.blocks:
        faults += _store_faults(stores)
    faults += [] if raw is None else _cross_faults(raw)
    if raw is None or faults:
        file = body.file or "configuration"
        raise ConfigError(file, sorted(faults, key=lambda f: f.line))
    settings = _build(raw, plugins, stores[0], body.file)
    more = telemetry_notices(raw.telemetry)
    notices = (*old.notices, *_notices(settings, raw.server), *more)
    return replace(settings, notices=notices)


load_settings: Final = partial(load, build_settings)


def _store_faults(stores: list[StoreConfig]) -> list[ConfigFault]:
    if len(stores) != 1:
        line = stores[1].line if stores else 0
        message = f'plugins needs exactly 1 DataStore "sql", found {len(stores)}'
        return [ConfigFault(line, message)]
    if stores[0].name in _STORE_NAMES:
        return []
    hint = nearest(stores[0].name, _STORE_NAMES) or '; the only one is "sql"'
    return [ConfigFault(stores[0].line, f'DataStore "{stores[0].name}" does not exist{hint}')]


def _cross_faults(raw: ServerFile) -> list[ConfigFault]:
    more = raw.server.experimental
    faults = [] if raw.posture is None else list(find_posture_faults(raw.posture))
    faults += find_telemetry_faults(raw.telemetry)
    if more.full_cache_reload_interval <= more.cache_reload_interval:
        message = '"full_cache_reload_interval" must be longer than cache_reload_interval'
        faults.append(ConfigFault(more.line("full_cache_reload_interval"), message))
    return faults


def _build(
    raw: ServerFile, plugins: list[PluginConfig], store: StoreConfig, file: str
) -> ServerSettings:
    keys, more = raw.server, raw.server.experimental
    return ServerSettings(
        trust_domain=keys.trust_domain,
        bind_address=keys.bind_address,
        bind_port=keys.bind_port,
        socket_path=keys.socket_path,
        data_dir=Path(keys.data_dir),
        log=keys.log_settings(),
        store=store,
        plugins=tuple(plugins),
        admin_ids=frozenset(keys.admin_ids),
        agent_ttl=keys.agent_ttl or keys.default_x509_svid_ttl,
        x509_svid_ttl=keys.default_x509_svid_ttl,
        jwt_svid_ttl=keys.default_jwt_svid_ttl,
        ca_ttl=keys.ca_ttl,
        ca_key_type=keys.ca_key_type,
        jwt_key_type=keys.jwt_key_type or keys.ca_key_type,
        ca_subject=_subject(keys.ca_subject),
        jwt_issuer=keys.jwt_issuer,
        disable_jwt_svids=keys.disable_jwt_svids,
        audit_log_enabled=keys.audit_log_enabled,
        ratelimit_attestation=keys.ratelimit.attestation,
        ratelimit_signing=keys.ratelimit.signing,
        prune_attested_nodes_expired_for=keys.prune_attested_nodes_expired_for,
        prune_attested_nodes_batch_size=keys.prune_attested_nodes_batch_size,
        prune_tofu_nodes=keys.prune_tofu_nodes,
        cache_reload_interval=more.cache_reload_interval,
        full_cache_reload_interval=more.full_cache_reload_interval,
        prune_events_older_than=more.prune_events_older_than,
        accept_lost_authorities=frozenset(more.accept_lost_authorities),
        health=health_settings(raw.health_checks),
        posture=posture_settings(raw.posture),
        telemetry=telemetry_settings(raw.telemetry),
        file=file,
    )


def _subject(keys: CaSubjectKeys | None) -> CaSubject:
    if keys is None or not (keys.country or keys.organization or keys.common_name):
        return CaSubject()
    return CaSubject(tuple(keys.country), tuple(keys.organization), keys.common_name)


def _notices(settings: ServerSettings, keys: ServerKeys) -> Iterator[str]:
    for key in keys.experimental.ignored():
        yield f"experimental.{key} is unknown and ignored"
    guarantee = min(settings.ca_ttl / _ACTIVATION_FRACTION, _MAX_GUARANTEE)
    ttls = {
        "default_x509_svid_ttl": settings.x509_svid_ttl,
        "default_jwt_svid_ttl": settings.jwt_svid_ttl,
        "agent_ttl": settings.agent_ttl,
    }
    for key, ttl in ttls.items():
        if ttl <= guarantee or (key == "default_jwt_svid_ttl" and settings.disable_jwt_svids):
            continue
        advice = f"set {key} to {format_duration(guarantee)} or less"
        if ttl <= _MAX_GUARANTEE:
            advice += f", or ca_ttl to {format_duration(ttl * _ACTIVATION_FRACTION)} or more"
        yield (
            f"{key} {format_duration(ttl)} is longer than what ca_ttl"
            f" {format_duration(settings.ca_ttl)} can guarantee: {advice}"
        )
