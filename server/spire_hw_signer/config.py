"""signer.conf to `SignerSettings`: checked all at once, keys nobody knows refused by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field

from spire_hw.config.hcl import Block, Body, Item
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
)
from spire_hw.config.schema import GoDuration, Model, at_least, check, parsed
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError
from spire_hw.log import LogSettings  # noqa: TC001 - public field types stay real
from spire_hw.plugin.info import PluginKind
from spire_hw.plugin.section import Count, PluginConfig, Rules, check_counts, read_plugins
from spire_hw.syslog import FACILITIES, SyslogSettings, parse_address, parse_facility
from spire_hw.telemetry.config import (
    TelemetryKeys,
    TelemetrySettings,
    find_telemetry_faults,
    telemetry_notices,
    telemetry_settings,
)
from spire_hw_signer.audit.log import AuditSettings
from spire_hw_signer.devicelog.settings import (  # noqa: TC001 - public field types stay real
    DeviceLogKeys,
    DeviceLogSettings,
)
from spire_hw_signer.operators import OperatorSettings, WitnessSettings
from spire_hw_signer.orders import check_name
from spire_hw_signer.tlsfiles import TlsPaths

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from spire_hw_signer.policy import Custody, Import, Owner

DEFAULT_CONFIG: Final = Path("/etc/spire-hw/signer.conf")
DEFAULT_ADMIN_SOCKET: Final = Path("/run/spire-hw/signer-admin.sock")
DEFAULT_PORT: Final = 8445
# KeyManagers that keep replaced keys for a while.
KEEPS_REPLACED: Final = frozenset({"pkcs11", "tpm"})
SIGNER_RULES: Final[Rules] = {PluginKind.KEY_MANAGER: Count(1, 1)}

_MAX_NAME: Final = 64
# What the signer sets itself for each owner, by KeyManager: nobody else may.
_OWN_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "pkcs11": ("key_identifier_file", "key_identifier_value", "retain_replaced"),
    "tpm": ("keys_path", "persistent_handles", "retain_replaced"),
    "disk": ("keys_path",),
}


def _parse_name(text: str) -> str:
    fits = 1 <= len(text) <= _MAX_NAME and all(
        c.isascii() and (c.isalnum() or c in "-_.") for c in text
    )
    if not fits:
        raise InvalidInputError(f"is made of 1 to {_MAX_NAME} letters, digits, '.', '_' and '-'")
    return text


_Path = Annotated[str, Field(min_length=1)]


class TlsKeys(Model):
    """`tls { }`."""

    cert_file: _Path
    key_file: _Path
    client_ca_files: Annotated[list[_Path], Field(min_length=1)]
    crl_files: list[_Path] = Field(default_factory=list)


class SyslogKeys(Model):
    """`syslog { }` of `audit { }`."""

    address: Annotated[SyslogSettings, parsed(parse_address)]
    facility: Annotated[int, parsed(parse_facility)] = FACILITIES["auth"]


class OperatorsKeys(Model):
    """`operators { }`."""

    required: Annotated[int, Field(ge=1, le=16)] = 2
    keys: Body


class AuditKeys(Model):
    """`audit { }`."""

    directory: str = ""
    max_file_bytes: Annotated[int, Field(ge=65_536, le=1 << 40)] = 64 * 1024 * 1024
    max_file_age: Annotated[GoDuration, at_least(timedelta(minutes=1))] = timedelta(days=1)
    checkpoint_file: str = ""
    syslog: SyslogKeys | None = None


class SignerKeys(LogKeys):
    """`signer { }`."""

    name: Annotated[str, parsed(_parse_name)]
    bind_address: Annotated[str, parsed(parse_ip)] = "0.0.0.0"  # noqa: S104 - clients are elsewhere
    bind_port: Port = DEFAULT_PORT
    socket_path: Annotated[Path, parsed(parse_socket_path)] | None = None
    admin_socket_path: Annotated[Path, parsed(parse_socket_path)] = DEFAULT_ADMIN_SOCKET
    data_dir: _Path
    policy_file: _Path
    tls: TlsKeys | None = None
    audit: AuditKeys = AuditKeys()
    operators: OperatorsKeys | None = None
    device_log: DeviceLogKeys | None = None


class SignerFile(Model):
    """The whole file."""

    signer: SignerKeys
    plugins: Body = Body.empty()
    health_checks: HealthChecks | None = None
    telemetry: TelemetryKeys | None = None


@dataclass(frozen=True, slots=True)
class SignerSettings:
    """Everything a signer is told but its policy, checked.

    Attributes:
        name: tells signers that share a token apart; their own keys go by it.
        tls: files of the TCP door, None when there is none.
        socket_path: socket of clients on this host, None when there is none.
        admin_socket_path: socket of operators.
        policy_file: who may do what.
        audit: where the audit log is.
        witness: where checkpoints of the audit log go besides.
        operators: who has to agree to what is done by hand.
        keys: the KeyManager's block.
        device_log: how the device's own log is read, None when it is not.
        health: None when probes are not answered over HTTP.
        telemetry: where metrics can be read, None for nowhere.
        notices: what the operator should hear at start.
        file: the file the settings come from.
    """

    name: str
    bind_address: str
    bind_port: int
    tls: TlsPaths | None
    socket_path: Path | None
    admin_socket_path: Path
    data_dir: Path
    policy_file: Path
    log: LogSettings
    audit: AuditSettings
    witness: WitnessSettings
    operators: OperatorSettings
    keys: PluginConfig
    device_log: DeviceLogSettings | None = None
    health: HealthSettings | None = None
    telemetry: TelemetrySettings | None = None
    notices: tuple[str, ...] = ()
    file: str = ""


def build_settings(body: Body, overrides: Mapping[str, Override] | None = None) -> SignerSettings:
    """Check what was read; see `load` for what is given and raised."""
    raw, faults = check(override(body, "signer", overrides or {}), SignerFile)
    plugins, wrong = _key_managers(body)
    faults += wrong
    if raw is not None:
        faults += _cross_faults(raw)
    if raw is None or faults:
        raise ConfigError(body.file or "configuration", sorted(faults, key=lambda f: f.line))
    settings = _build(raw, plugins[0], body.file)
    return replace(settings, notices=(*_notices(settings), *telemetry_notices(raw.telemetry)))


load_settings: Final = partial(load, build_settings)


def owner_config(
    keys: PluginConfig, owner: Owner, directory: Path, custody: Custody
) -> PluginConfig:
    """Return the KeyManager's block for one owner: what tells owners apart is set here.

    Args:
        keys: the block of the file.
        owner: whose keys.
        directory: for their state.
        custody: what policy says of them.

    Raises:
        ConfigError: this KeyManager cannot do what policy says, see `find_custody_faults`.
    """
    faults = list(find_custody_faults(keys, custody))
    if faults:
        raise ConfigError(f"policy of {owner}", [ConfigFault(0, message) for message in faults])
    values: dict[str, object] = {}
    if keys.name == "pkcs11":
        values["key_identifier_value"] = owner.server
    if keys.name in KEEPS_REPLACED and custody.retain is not None:
        values["retain_replaced"] = f"{int(custody.retain.total_seconds())}s"
    if keys.name == "disk":
        values["keys_path"] = str(directory / "keys.json")
    made = [
        Block(("import", one.key_id), Body.from_dict(_named(one)), keys.line)
        for one in custody.imports
    ]
    items = (*keys.data.items, *Body.from_dict(values).items, *made)
    return replace(keys, data=Body(items, keys.data.line, keys.data.file))


def find_custody_faults(keys: PluginConfig, custody: Custody) -> Iterator[str]:
    """Find what policy says of keys and their KeyManager cannot do: keys made elsewhere, keys kept."""
    if custody.imports and keys.name != "pkcs11":
        yield f'import: KeyManager "{keys.name}" uses its own keys alone'
    if custody.is_said and custody.retain and keys.name not in KEEPS_REPLACED:
        known = " and ".join(sorted(KEEPS_REPLACED))
        yield (
            f'retain_replaced: KeyManager "{keys.name}" keeps no replaced keys; {known} do. Take it '
            'out or write "0s"'
        )


def _named(one: Import) -> dict[str, object]:
    return {"uri": one.uri} if one.uri else {"label": one.label}


def _key_managers(body: Body) -> tuple[list[PluginConfig], list[ConfigFault]]:
    blocks = body.blocks("plugins")
    items = tuple(i for b in blocks for i in b.body.items)
    section = Body(items, body.line_of("plugins"), body.file)
    plugins, _, faults = read_plugins(section)
    faults += check_counts(plugins, SIGNER_RULES)
    plugins = [p for p in plugins if p.enabled and p.kind is PluginKind.KEY_MANAGER]
    for plugin in plugins:
        faults += _key_manager_faults(plugin)
    return plugins, faults


def _key_manager_faults(plugin: PluginConfig) -> Iterator[ConfigFault]:
    own = _OWN_KEYS.get(plugin.name)
    title = f'KeyManager "{plugin.name}"'
    if own is None or plugin.cmd:
        known = ", ".join(_OWN_KEYS)
        yield ConfigFault(plugin.line, f"{title}: the signer keeps its keys in {known}, built in")
        return
    if plugin.data_file:
        yield ConfigFault(plugin.line, f"{title}: write plugin_data, not plugin_data_file")
    for item in plugin.data.items:
        key = item.key if isinstance(item, Item) else item.keys[0]
        if key.lower() in own:
            message = f'{title}: "{key}" is set by the signer for each client; remove it'
            yield ConfigFault(item.line, message)
    yield from _import_faults(plugin.data, title)


def _import_faults(body: Body, title: str) -> Iterator[ConfigFault]:
    """Find keys made elsewhere: in the block of all clients each of them would have them."""
    for item in body.items:
        if isinstance(item, Item):
            continue
        if item.keys[0].lower() == "import":
            message = f"{title}: a key made elsewhere is a client's: write import in the policy"
            yield ConfigFault(item.line, message)
        else:
            yield from _import_faults(item.body, title)


def _cross_faults(raw: SignerFile) -> Iterator[ConfigFault]:
    keys = raw.signer
    if keys.tls is None and keys.socket_path is None:
        message = "nobody could reach the signer: set tls, socket_path or both"
        yield ConfigFault(keys.line(""), message)
    if keys.socket_path is not None and keys.socket_path == keys.admin_socket_path:
        message = "socket_path and admin_socket_path are the same"
        yield ConfigFault(keys.line("socket_path"), message)
    if keys.operators is not None:
        yield from _operator_faults(keys.operators)
    if keys.device_log is not None:
        yield from keys.device_log.find_faults()
    yield from find_telemetry_faults(raw.telemetry)


def _operator_faults(given: OperatorsKeys) -> Iterator[ConfigFault]:
    items = [item for item in given.keys.items if isinstance(item, Item)]
    for block in given.keys.items:
        if not isinstance(block, Item):
            yield ConfigFault(block.line, 'operators: write NAME = "FILE" in keys')
    for item in items:
        try:
            check_name(item.key)
        except InvalidInputError as e:
            yield ConfigFault(item.line, e.message)
        if not isinstance(item.value, str) or not item.value:
            yield ConfigFault(item.line, f'operators: write {item.key} = "FILE"')
    names = {item.key for item in items}
    if len(names) < len(items):
        yield ConfigFault(given.line("keys"), "operators: a name stands twice")
    if len(names) < given.required:
        message = f"{given.required} operators are required, {len(names)} have a key"
        yield ConfigFault(given.line("keys"), message)


def _build(raw: SignerFile, keys: PluginConfig, file: str) -> SignerSettings:
    given = raw.signer
    data_dir = Path(given.data_dir)
    tls = None
    if given.tls is not None:
        tls = TlsPaths(
            cert_file=Path(given.tls.cert_file),
            key_file=Path(given.tls.key_file),
            client_ca_files=tuple(Path(p) for p in given.tls.client_ca_files),
            crl_files=tuple(Path(p) for p in given.tls.crl_files),
        )
    return SignerSettings(
        name=given.name,
        bind_address=given.bind_address,
        bind_port=given.bind_port,
        tls=tls,
        socket_path=given.socket_path,
        admin_socket_path=given.admin_socket_path,
        data_dir=data_dir,
        policy_file=Path(given.policy_file),
        log=given.log_settings(),
        audit=AuditSettings(
            Path(given.audit.directory) if given.audit.directory else data_dir / "audit",
            given.audit.max_file_bytes,
            given.audit.max_file_age,
        ),
        witness=_witness(given.audit),
        operators=_operators(given.operators),
        keys=keys,
        device_log=None if given.device_log is None else given.device_log.settings(),
        health=health_settings(raw.health_checks),
        telemetry=telemetry_settings(raw.telemetry),
        file=file,
    )


def _witness(given: AuditKeys) -> WitnessSettings:
    syslog = given.syslog
    return WitnessSettings(
        file=Path(given.checkpoint_file) if given.checkpoint_file else None,
        syslog=None if syslog is None else replace(syslog.address, facility=syslog.facility),
    )


def _operators(given: OperatorsKeys | None) -> OperatorSettings:
    if given is None:
        return OperatorSettings()
    files = {i.key: Path(str(i.value)) for i in given.keys.items if isinstance(i, Item)}
    return OperatorSettings(files, given.required)


def _notices(settings: SignerSettings) -> Iterator[str]:
    if settings.keys.name == "disk":
        yield (
            "keys are unencrypted files, and replaced ones are not kept: for demonstrations alone; "
            "use KeyManager pkcs11 or tpm, whose keys nobody can copy"
        )
