"""Configuration of KeyManager `pkcs11`: read, checked as a whole, nothing opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from spire_hw.config.duration import parse_duration
from spire_hw.config.hcl import Body
from spire_hw.config.schema import GoDuration, Model
from spire_hw.errors import ConfigFault, InvalidInputError
from spire_hw.key import KeyType
from spire_hw.pkcs11 import uri as pkcs11_uri

_MAX_IDENTIFIER: Final = 64
_URI_ATTRIBUTES: Final = frozenset(
    {"token", "serial", "model", "manufacturer", "slot-description", "slot-manufacturer"}
)
_Text = Annotated[str, StringConstraints(min_length=1)]


class Config(Model):
    """The plugin_data; see the module's text.

    Attributes:
        workers: signing worker processes; one more does the slow work.
        queue: signatures that may wait for a worker.
        start_timeout: how long the token may be away at start.
        sign_timeout: how long a worker may be silent over a batch of signatures.
        generate_timeout: how long a key generation may take.
        profile: `tpm2` leaves out attributes that tpm2-pkcs11 refuses.
        key_types: key types that may be generated; all four when empty.
        accept_token: serial number of a token that may replace the one used so far.
        accept_key_loss: go on although keys are gone; take it out again after one start.
        accept_weak_keys: key ids whose origin in the token need not be proven.
    """

    module_path: _Text | None = None
    token_label: _Text | None = None
    token_serial: _Text | None = None
    uri: _Text | None = None
    pin_file: _Text | None = None
    pin_env: _Text | None = None
    key_identifier_file: _Text | None = None
    key_identifier_value: _Text | None = None
    environment: Body = Body.empty()
    workers: Annotated[int, Field(ge=1, le=32)] = 1
    queue: Annotated[int, Field(ge=1, le=65536)] = 1024
    start_timeout: GoDuration = parse_duration("30s")
    sign_timeout: GoDuration = parse_duration("10s")
    generate_timeout: GoDuration = parse_duration("2m")
    profile: Literal["generic", "tpm2"] = "generic"
    key_types: list[str] = Field(default_factory=list)
    accept_token: str = ""
    accept_key_loss: bool = False
    accept_weak_keys: list[str] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration that holds together.

    Attributes:
        module: path of the module as configured.
        token: the fields of a worker's OPEN request but for module and PIN.
        environment: additions to the workers' environment.
        key_types: types that may be generated.
    """

    module: str
    token: dict[str, object]
    pin_file: str | None
    environment: dict[str, str]
    key_types: frozenset[KeyType]


class _Faults:
    """Collects what is wrong with a configuration whose fields are right one by one."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.found: list[ConfigFault] = []

    def add(self, field: str, message: str) -> None:
        self.found.append(ConfigFault(self._config.line(field), message))


def settings_of(config: Config) -> tuple[Settings | None, list[ConfigFault]]:
    """Return the settings, None when there are faults, and the faults."""
    found = _Faults(config)
    parsed = _uri_of(config, found)
    module = config.module_path or parsed.module_path
    if module is None:
        found.add("module_path", "module_path is required (or module-path in uri)")
    elif not module.startswith("/"):
        found.add("module_path", "module_path must be absolute")
    label, serial = config.token_label or parsed.token, config.token_serial or parsed.serial
    if label is None and serial is None and not parsed.attributes and parsed.slot_id is None:
        found.add("token_label", "token_label, token_serial or uri is required")
    pins = {"pin_file": config.pin_file, "pin_env": config.pin_env, "uri": parsed.pin_file}
    given = [name for name, value in pins.items() if value is not None]
    if len(given) != 1:
        found.add("pin_file", "exactly one of pin_file, pin_env and the uri's pin-source is needed")
    if config.key_identifier_file is not None and config.key_identifier_value is not None:
        found.add(
            "key_identifier_value",
            "key_identifier_file and key_identifier_value exclude each other",
        )
    _check_identifier(config, found)
    environment = _environment_of(config, found)
    key_types = _key_types_of(config, found)
    if found.found or module is None:
        return None, found.found
    rest = {n: v for n, v in parsed.attributes.items() if n not in {"token", "serial"}}
    token: dict[str, object] = {
        "label": label,
        "serial": serial,
        "uri": rest,
        "slot_id": parsed.slot_id,
        "profile": config.profile,
    }
    pin_file = config.pin_file or parsed.pin_file
    return Settings(module, token, pin_file, environment, key_types), []


def _uri_of(config: Config, found: _Faults) -> pkcs11_uri.Pkcs11Uri:
    if config.uri is None:
        return pkcs11_uri.Pkcs11Uri()
    try:
        parsed = pkcs11_uri.parse(config.uri)
    except InvalidInputError as e:
        found.add("uri", e.message)
        return pkcs11_uri.Pkcs11Uri()
    odd = sorted(set(parsed.attributes) - _URI_ATTRIBUTES)
    if parsed.id is not None:
        odd.append("id")
    if parsed.module_name is not None:
        odd.append("module-name")
    if odd:
        found.add("uri", f"uri must name a token; {', '.join(odd)} cannot be used here")
    for field, attribute in (("token_label", "token"), ("token_serial", "serial")):
        if getattr(config, field) is not None and attribute in parsed.attributes:
            found.add(field, f"{field} and the uri's {attribute} exclude each other")
    if config.module_path is not None and parsed.module_path is not None:
        found.add("module_path", "module_path and the uri's module-path exclude each other")
    return parsed


def _check_identifier(config: Config, found: _Faults) -> None:
    value = config.key_identifier_value
    if value is not None and not is_identifier(value):
        found.add(
            "key_identifier_value",
            f"key_identifier_value must be 1 to {_MAX_IDENTIFIER} letters, digits, - _ .",
        )


def is_identifier(value: str) -> bool:
    """Tell whether a text may name a server or an agent."""
    return 1 <= len(value) <= _MAX_IDENTIFIER and all(
        c.isascii() and (c.isalnum() or c in "-_.") for c in value
    )


def _environment_of(config: Config, found: _Faults) -> dict[str, str]:
    environment = {}
    for item in config.environment.items:
        value = getattr(item, "value", None)
        key = getattr(item, "key", "")
        if not isinstance(value, str) or not key or "=" in key or "\0" in key + value:
            found.add("environment", 'environment holds NAME = "text" only')
        else:
            environment[key] = value
    return environment


def _key_types_of(config: Config, found: _Faults) -> frozenset[KeyType]:
    types = set()
    for name in config.key_types:
        try:
            types.add(KeyType.parse(name))
        except InvalidInputError as e:
            found.add("key_types", e.message)
    return frozenset(types) or frozenset(KeyType)
