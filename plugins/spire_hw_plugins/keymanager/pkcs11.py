"""KeyManager `pkcs11`: keys made in a PKCS#11 token, which they never leave.

Configuration (`plugin_data`), with one of the three ways to name the token:

    module_path  = "/usr/lib/softhsm/libsofthsm2.so"
    token_label  = "spire"            # and/or
    token_serial = "a6348d0fc6c98df7" # or
    uri          = "pkcs11:token=spire;serial=a6348d0fc6c98df7?pin-source=file:/etc/spire-hw/pin"
    pin_file     = "/etc/spire-hw/pin"   # or pin_env, or the URI's pin-source
    key_identifier_file  = "/var/lib/spire-hw/key_id"   # or key_identifier_value

Workers inherit the host's environment without `pin_env`; the `environment` block adds to it, for
modules that are set up that way (SOFTHSM2_CONF, P11_KIT_SERVER_ADDRESS, ...).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field, StringConstraints

from spire_hw.config.duration import parse_duration
from spire_hw.config.hcl import Body
from spire_hw.config.schema import GoDuration, Model, decode, faults
from spire_hw.errors import (
    ConfigError,
    ConfigFault,
    InvalidInputError,
    NotReadyError,
)
from spire_hw.files import NoFileError, create_file, read_bounded
from spire_hw.key import KeyType, SignOptions
from spire_hw.pkcs11 import uri as pkcs11_uri
from spire_hw.pkcs11.keyring import Keyring, Policy, info_of
from spire_hw.pkcs11.labels import Owner
from spire_hw.pkcs11.module import check_module_path
from spire_hw.pkcs11.pin import EnvironmentPin, FilePin, PinGuard, PinSource
from spire_hw.pkcs11.pool import Limits, Pool
from spire_hw.pkcs11.process import Launch
from spire_hw.pkcs11.seat import Opening
from spire_hw.pkcs11.state import StateFile
from spire_hw.plugin.info import HostInfo, Side

if TYPE_CHECKING:
    from spire_hw.plugin.keymanager import KeyEvidence, KeyInfo, KeySignature

NAME: Final = "pkcs11"
_IDENTIFIER_FILE: Final = "pkcs11-key-identifier"
_MAX_IDENTIFIER_FILE_BYTES: Final = 4096
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
    if value is not None and not _is_identifier(value):
        found.add(
            "key_identifier_value",
            f"key_identifier_value must be 1 to {_MAX_IDENTIFIER} letters, digits, - _ .",
        )


def _is_identifier(value: str) -> bool:
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


class Pkcs11KeyManager:
    """The KeyManager contract over one token; also offers `KeyEvidenceSource`."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._instance = secrets.token_hex(16)
        self._pool: Pool | None = None
        self._keyring: Keyring | None = None
        self._guard: PinGuard | None = None
        self._environment_pins: dict[str, EnvironmentPin] = {}

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching token or PIN."""
        found = faults(config, Config)
        return found or settings_of(decode(config, Config))[1]

    async def configure(self, config: Body) -> None:
        """Open the token and prove its keys; a failure leaves an earlier configuration serving.

        Raises:
            ConfigError: the configuration has faults.
            InvalidInputError: the module may not be loaded.
            TokenError: token, PIN or keys are not what they have to be.
        """
        raw = decode(config, Config)
        settings, found = settings_of(raw)
        if settings is None:
            raise ConfigError(config.file or NAME, found)
        module = await asyncio.to_thread(check_module_path, settings.module)
        owner = await asyncio.to_thread(self._owner, raw)
        guard = PinGuard(self._pin_source(raw, settings))
        if self._guard is not None:
            guard.inherit(self._guard)
        self._guard = guard
        opening = Opening(
            Launch(self._environment(raw, settings)), {"module": module, **settings.token}, guard
        )
        pool = Pool(opening, _limits(raw), self._host.log)
        facts = await pool.start()
        keyring = Keyring(
            pool,
            owner,
            StateFile(self._host.data_dir, owner),
            policy=_policy(raw, settings),
            instance=self._instance,
            clock=self._host.clock,
            log=self._host.log,
        )
        try:
            await keyring.open()
        except BaseException:
            await _close(keyring, pool)
            raise
        old_keyring, old_pool = self._keyring, self._pool
        self._keyring, self._pool = keyring, pool
        self._host.log.info("hsm is open", hsm=facts.device)
        if old_keyring is not None and old_pool is not None:
            await _close(old_keyring, old_pool)

    async def generate_key(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Make a key in the token."""
        if self._keyring is None:
            raise NotReadyError("failed to generate key: not configured")
        return await self._keyring.generate(key_id, key_type)

    async def get_public_key(self, key_id: str) -> KeyInfo:
        """Return one key."""
        return info_of(self._ready().get(key_id))

    async def get_public_keys(self) -> list[KeyInfo]:
        """Return all keys, oldest first, after asking the token."""
        return [info_of(entry) for entry in await self._ready().all()]

    async def sign_data(self, key_id: str, digest: bytes, options: SignOptions) -> KeySignature:
        """Have the token sign a digest; the signature is verified before it is returned."""
        return await self._ready().sign(key_id, digest, options)

    async def key_evidence(self, key_id: str) -> KeyEvidence:
        """Return where a key is and what the token says about it now."""
        return await self._ready().evidence(key_id)

    async def close(self) -> None:
        """Log out and end the workers."""
        keyring, pool = self._keyring, self._pool
        self._keyring = self._pool = None
        if keyring is not None and pool is not None:
            await _close(keyring, pool)

    @property
    def worker_pids(self) -> list[int]:
        """Return the process ids of the workers, for operators' eyes."""
        return [] if self._pool is None else self._pool.worker_pids

    def _ready(self) -> Keyring:
        if self._keyring is None:
            raise NotReadyError("not configured")
        return self._keyring

    def _owner(self, config: Config) -> Owner:
        # Both sides of one machine may share a token: an agent's keys are never a server's.
        identifier = config.key_identifier_value or self._identifier_from_file(config)
        side = "" if self._host.side is Side.SERVER else "agent:"
        return Owner(self._host.trust_domain.name, side + identifier)

    def _identifier_from_file(self, config: Config) -> str:
        named = config.key_identifier_file
        path = Path(named) if named is not None else self._host.data_dir / _IDENTIFIER_FILE
        try:
            content = read_bounded(path, _MAX_IDENTIFIER_FILE_BYTES, "key identifier file")
            identifier = content.decode("ascii").strip()
        except NoFileError:
            identifier = str(uuid.uuid4())
            create_file(path, identifier.encode("ascii"), "key identifier file")
        except UnicodeDecodeError as e:
            raise NotReadyError(f"key identifier file {path} does not hold an identifier") from e
        if not _is_identifier(identifier):
            raise NotReadyError(f"key identifier file {path} does not hold an identifier")
        return identifier

    def _pin_source(self, config: Config, settings: Settings) -> PinSource:
        if config.pin_env is None:
            return FilePin(Path(settings.pin_file or ""))
        # The variable is gone once read, so a later configuration needs what was read then.
        known = self._environment_pins.get(config.pin_env)
        if known is None or config.pin_env in os.environ:
            known = self._environment_pins[config.pin_env] = EnvironmentPin(config.pin_env)
        return known

    def _environment(self, config: Config, settings: Settings) -> dict[str, str]:
        inherited = {n: v for n, v in os.environ.items() if n != config.pin_env}
        return {**inherited, **settings.environment}


def _limits(config: Config) -> Limits:
    return Limits(
        workers=config.workers,
        queue=config.queue,
        start_s=config.start_timeout.total_seconds(),
        sign_s=config.sign_timeout.total_seconds(),
        generate_s=config.generate_timeout.total_seconds(),
    )


def _policy(config: Config, settings: Settings) -> Policy:
    return Policy(
        key_types=settings.key_types,
        accept_token=config.accept_token,
        accept_key_loss=config.accept_key_loss,
        accept_weak_keys=frozenset(config.accept_weak_keys),
    )


async def _close(keyring: Keyring, pool: Pool) -> None:
    await pool.close()
    await keyring.close()


def build(host: HostInfo) -> Pkcs11KeyManager:
    """Make the plugin."""
    return Pkcs11KeyManager(host)
