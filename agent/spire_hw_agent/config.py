"""agent.conf to `AgentSettings`: upstream's keys, checked all at once.

Keys that upstream knows and this release does not are refused by name, unless their value asks
for nothing. What is odd without being wrong ends up in `AgentSettings.notices`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from spire_hw.config.hcl import Body
from spire_hw.config.host import (
    HealthChecks,
    HealthSettings,
    LogKeys,
    Override,
    health_settings,
    load,
    override,
    parse_socket_path,
    parse_trust_domain,
)
from spire_hw.config.schema import GoDuration, Model, at_least, check, parsed
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError
from spire_hw.key import KeyType
from spire_hw.log import LogSettings  # noqa: TC001 - public field types stay real
from spire_hw.plugin.info import PluginKind
from spire_hw.plugin.olddir import OldStyle, read_plugin_dir
from spire_hw.plugin.section import AGENT_RULES, PluginConfig, read_section
from spire_hw.spiffeid import TrustDomain  # noqa: TC001 - likewise
from spire_hw.telemetry.config import (
    TelemetryKeys,
    TelemetrySettings,
    find_telemetry_faults,
    telemetry_notices,
    telemetry_settings,
)

DEFAULT_CONFIG: Final = Path("conf/agent/agent.conf")
DEFAULT_SOCKET: Final = Path("/tmp/spire-agent/public/api.sock")  # noqa: S108 - upstream's default
_MAX_TOKEN_CHARS: Final = 1024
_LEAST_AVAILABILITY: Final = timedelta(hours=24)
_REBOOTSTRAP_DELAY: Final = timedelta(minutes=10)
# Node attestors that can do it once only.
_ONCE: Final = frozenset({"join_token"})


class RebootstrapMode(Enum):
    """What to do when the server can no longer be verified by the bundle."""

    NEVER = "never"
    AUTO = "auto"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Everything an agent is told, checked.

    Attributes:
        socket_path: the Workload API's; None when that API is switched off.
        join_token: given by flag, file or configuration; a secret, "" when there is none.
        trust_bundle_path: at most one bootstrap source is set; the URL may be asked over
            `trust_bundle_unix_socket`.
        insecure_bootstrap: trust the server of the first connection without proof.
        rebootstrap_mode: NEVER when the node attestor could not attest again.
        rebootstrap_delay: how long a mismatch has to last first.
        health: where probes are answered over HTTP, None for nowhere.
        telemetry: where metrics can be read, None for nowhere.
        plugins: in the order of the file, disabled ones too.
        notices: what the operator should hear at start.
        file: the file the settings come from.
    """

    trust_domain: TrustDomain
    server_address: str
    server_port: int
    data_dir: Path
    socket_path: Path | None
    log: LogSettings
    plugins: tuple[PluginConfig, ...]
    join_token: str = field(default="", repr=False)
    trust_bundle_path: Path | None = None
    trust_bundle_url: str = ""
    trust_bundle_unix_socket: str = ""
    trust_bundle_format: Literal["pem", "spiffe"] = "pem"
    insecure_bootstrap: bool = False
    rebootstrap_mode: RebootstrapMode = RebootstrapMode.NEVER
    rebootstrap_delay: timedelta = _REBOOTSTRAP_DELAY
    health: HealthSettings | None = None
    telemetry: TelemetrySettings | None = None
    log_selectors: bool = False
    allow_unauthenticated_verifiers: bool = False
    allowed_foreign_jwt_claims: frozenset[str] = frozenset()
    availability_target: timedelta | None = None
    workload_x509_svid_key_type: KeyType = KeyType.EC_P256
    x509_svid_cache_max_size: int = 1000
    jwt_svid_cache_max_size: int = 1000
    sync_interval: timedelta = timedelta(seconds=5)
    notices: tuple[str, ...] = ()
    file: str = ""


class ExperimentalKeys(Model):
    """`experimental { }`; keys nobody knows are passed over, as upstream does."""

    tolerant: ClassVar[bool] = True
    unsupported: ClassVar[Mapping[str, object]] = {
        "admin_named_pipe_name": None,
        "broker": Body.empty(),
        "feature_flags": [],
        "jwt_svid_cache_hit_timeout": None,
        "named_pipe_name": None,
        "ratelimit": Body.empty(),
        "require_pq_kem": False,
    }

    sync_interval: Annotated[GoDuration, at_least(timedelta(milliseconds=100))] = timedelta(
        seconds=5
    )
    use_sync_authorized_entries: bool = True


_WORKLOAD_KEY_TYPES: Final = (KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048)


def _workload_key_type(text: str) -> KeyType:
    found = KeyType.parse(text)
    if found not in _WORKLOAD_KEY_TYPES:
        known = ", ".join(k.config_name for k in _WORKLOAD_KEY_TYPES)
        raise InvalidInputError(f"{text} is not for workloads; use one of {known}")
    return found


class AgentKeys(LogKeys):
    """`agent { }`."""

    unsupported: ClassVar[Mapping[str, object]] = {
        "admin_socket_path": "",
        "authorized_delegates": [],
        "disable_sds_api": True,
        "profiling_enabled": False,
        "profiling_freq": None,
        "profiling_names": None,
        "profiling_port": None,
        "sds": Body.empty(),
        "trust_bundle_spiffe_workload_api": None,
    }

    allow_unauthenticated_verifiers: bool = False
    allowed_foreign_jwt_claims: list[str] = Field(default_factory=list)
    availability_target: Annotated[GoDuration, at_least(_LEAST_AVAILABILITY)] | None = None
    data_dir: Annotated[str, Field(min_length=1)] = "."
    disable_workload_api: bool = False
    experimental: ExperimentalKeys = ExperimentalKeys()
    insecure_bootstrap: bool = False
    join_token: str = ""
    join_token_file: str = ""
    jwt_svid_cache_max_size: Annotated[int, Field(ge=0)] = 1000
    log_selectors: bool = False
    plugin_dir: str = ""
    rebootstrap_delay: Annotated[GoDuration, at_least(timedelta(0))] = _REBOOTSTRAP_DELAY
    rebootstrap_mode: Literal["never", "auto", "always"] = "never"
    server_address: Annotated[str, Field(min_length=1)]
    server_port: Annotated[int, Field(ge=1, le=65535)]
    socket_path: Annotated[Path, parsed(parse_socket_path)] = DEFAULT_SOCKET
    trust_bundle_format: Literal["pem", "spiffe"] = "pem"
    trust_bundle_path: str = ""
    trust_bundle_unix_socket: str = ""
    trust_bundle_url: str = ""
    trust_domain: Annotated[TrustDomain, parsed(parse_trust_domain)]
    workload_x509_svid_key_type: Annotated[KeyType, parsed(_workload_key_type)] = KeyType.EC_P256
    x509_svid_cache_max_size: Annotated[int, Field(ge=0)] = 1000


class AgentFile(Model):
    """The whole file."""

    agent: AgentKeys
    plugins: Body = Body.empty()
    health_checks: HealthChecks = HealthChecks()
    telemetry: TelemetryKeys | None = None


def build_settings(body: Body, overrides: Mapping[str, Override] | None = None) -> AgentSettings:
    """Check what was read; see `load` for what is given and raised."""
    raw, faults = check(override(body, "agent", overrides or {}), AgentFile)
    old = OldStyle()
    if raw is not None and raw.agent.plugin_dir:
        old = read_plugin_dir(Path(raw.agent.plugin_dir), raw.agent.line("plugin_dir"))
    plugins, _, wrong = read_section(body, old, AGENT_RULES)
    faults += wrong
    token = ""
    if raw is not None:
        faults += _bootstrap_faults(raw.agent)
        faults += find_telemetry_faults(raw.telemetry)
        if raw.agent.rebootstrap_mode == "always" and _attests_once(plugins):
            message = '"rebootstrap_mode" cannot be always: join_token attests only once'
            faults.append(ConfigFault(raw.agent.line("rebootstrap_mode"), message))
        try:
            token = _join_token(raw.agent)
        except InvalidInputError as e:
            faults.append(ConfigFault(raw.agent.line("join_token_file"), e.message))
    if raw is None or faults:
        raise ConfigError(body.file or "configuration", sorted(faults, key=lambda f: f.line))
    settings = _build(raw, plugins, token, body.file)
    notices = (*_notices(raw.agent, plugins), *telemetry_notices(raw.telemetry))
    return replace(settings, notices=(*old.notices, *notices))


load_settings: Final = partial(load, build_settings)


def _attests_once(plugins: list[PluginConfig]) -> bool:
    return any(
        p.kind is PluginKind.NODE_ATTESTOR and p.enabled and p.name in _ONCE for p in plugins
    )


def _rebootstrap_mode(keys: AgentKeys, plugins: list[PluginConfig]) -> RebootstrapMode:
    return (
        RebootstrapMode.NEVER if _attests_once(plugins) else RebootstrapMode(keys.rebootstrap_mode)
    )


def _bootstrap_faults(keys: AgentKeys) -> Iterator[ConfigFault]:
    sources = ("trust_bundle_path", "trust_bundle_url", "insecure_bootstrap")
    given = [k for k in sources if getattr(keys, k)]
    if len(given) > 1:
        message = f"only one of {', '.join(given)} can be set"
        yield ConfigFault(keys.line(given[-1]), message)
    if not given:
        message = (
            "the agent needs a way to trust the server: set trust_bundle_path, trust_bundle_url"
            " or insecure_bootstrap"
        )
        yield ConfigFault(keys.line(""), message)
    url, line = keys.trust_bundle_url, keys.line("trust_bundle_url")
    if keys.trust_bundle_unix_socket and not url:
        message = '"trust_bundle_unix_socket" needs trust_bundle_url'
        yield ConfigFault(keys.line("trust_bundle_unix_socket"), message)
    elif keys.trust_bundle_unix_socket and not url.startswith("http://"):
        yield ConfigFault(line, '"trust_bundle_url" must start with http:// over a unix socket')
    elif url and not keys.trust_bundle_unix_socket and not url.startswith("https://"):
        yield ConfigFault(line, '"trust_bundle_url" must start with https://')


def _join_token(keys: AgentKeys) -> str:
    if not keys.join_token_file:
        return keys.join_token
    if keys.join_token:
        raise InvalidInputError("give join_token or join_token_file, not both")
    try:
        with Path(keys.join_token_file).open("rb") as stream:
            token = stream.read(_MAX_TOKEN_CHARS + 1).decode().strip()
    except OSError as e:
        raise InvalidInputError(f'"join_token_file" cannot be read: {e.strerror}') from e
    except UnicodeDecodeError as e:
        raise InvalidInputError('"join_token_file" is not text') from e
    if not token or len(token) > _MAX_TOKEN_CHARS:
        raise InvalidInputError('"join_token_file" does not hold a token')
    return token


def _build(raw: AgentFile, plugins: list[PluginConfig], token: str, file: str) -> AgentSettings:
    keys = raw.agent
    return AgentSettings(
        trust_domain=keys.trust_domain,
        server_address=keys.server_address,
        server_port=keys.server_port,
        data_dir=Path(keys.data_dir),
        socket_path=None if keys.disable_workload_api else keys.socket_path,
        log=keys.log_settings(),
        plugins=tuple(plugins),
        join_token=token,
        trust_bundle_path=Path(keys.trust_bundle_path) if keys.trust_bundle_path else None,
        trust_bundle_url=keys.trust_bundle_url,
        trust_bundle_unix_socket=keys.trust_bundle_unix_socket,
        trust_bundle_format=keys.trust_bundle_format,
        insecure_bootstrap=keys.insecure_bootstrap,
        rebootstrap_mode=_rebootstrap_mode(keys, plugins),
        rebootstrap_delay=keys.rebootstrap_delay,
        health=health_settings(raw.health_checks),
        telemetry=telemetry_settings(raw.telemetry),
        log_selectors=keys.log_selectors,
        allow_unauthenticated_verifiers=keys.allow_unauthenticated_verifiers,
        allowed_foreign_jwt_claims=frozenset(keys.allowed_foreign_jwt_claims),
        availability_target=keys.availability_target,
        workload_x509_svid_key_type=keys.workload_x509_svid_key_type,
        x509_svid_cache_max_size=keys.x509_svid_cache_max_size or 1000,
        jwt_svid_cache_max_size=keys.jwt_svid_cache_max_size or 1000,
        sync_interval=keys.experimental.sync_interval,
        file=file,
    )


def _notices(keys: AgentKeys, plugins: list[PluginConfig]) -> Iterator[str]:
    if keys.rebootstrap_mode == "auto" and _attests_once(plugins):
        yield "rebootstrap_mode auto has no effect: join_token attests only once"
    for key in keys.experimental.ignored():
        yield f"experimental.{key} is unknown and ignored"
    if keys.experimental.given("use_sync_authorized_entries"):
        yield "experimental.use_sync_authorized_entries is deprecated and has no effect"
