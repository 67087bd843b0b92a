"""Which token, through which module, with whose PIN: from configuration to a worker's first request.

Settings of one token look the same wherever one is configured; what is done there is decided by
who reads them. Nothing is opened here but the source of the PIN.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import StringConstraints

from spire_hw.config.hcl import Body
from spire_hw.config.schema import Model
from spire_hw.errors import ConfigFault, InvalidInputError
from spire_hw.pkcs11 import uri as pkcs11_uri
from spire_hw.pkcs11.module import check_module_path
from spire_hw.pkcs11.pool.pin import (
    ENTERED,
    OF_THIS_PROCESS,
    DevicePin,
    EnvironmentPin,
    FilePin,
    PinGuard,
    PinSource,
    Refusals,
    TerminalPins,
)
from spire_hw.pkcs11.pool.process import WORKER, Launch
from spire_hw.pkcs11.pool.seat import Opening
from spire_hw.pkcs11.profile import PROFILES, USER, ProfileChoice
from spire_hw.pkcs11.profileconfig import ProfileOverrides, choice_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

Text = Annotated[str, StringConstraints(min_length=1)]
SCHEME: Final = "pkcs11:"
_NAMED: Final = frozenset({"token", "serial"})
_NARROWING: Final = frozenset({"model", "manufacturer", "slot-description", "slot-manufacturer"})
_OBJECT: Final = "object"


class TokenConfig(Model):
    """Settings that name one token.

    Attributes:
        module_path: the vendor's PKCS#11 library.
        token_label: label of the token.
        token_serial: its serial number.
        uri: RFC 7512 URI that names token, module or PIN file instead.
        pin_file: file that holds the user PIN.
        pin_env: environment variable that holds it; cleared once read.
        protected_login: it is entered at the token's own key pad or reader instead.
        pin_prompt: it is entered at the terminal from which the program is started, once.
        login_as: whose PIN it is: the token's user, or one who may use keys and make none.
        environment: additions to the environment of the worker processes.
        profile: what kind of token it is; the token's own words decide when empty.
        profile_overrides: single fields of the profile that are otherwise here.
    """

    module_path: Text | None = None
    token_label: Text | None = None
    token_serial: Text | None = None
    uri: Text | None = None
    pin_file: Text | None = None
    pin_env: Text | None = None
    protected_login: bool = False
    pin_prompt: bool = False
    login_as: Literal["user", "crypto-user"] = USER
    environment: Body = Body.empty()
    profile: str = ""
    profile_overrides: ProfileOverrides = ProfileOverrides()


class PinFrom(Enum):
    """Where a PIN comes from."""

    FILE = "file"
    ENVIRONMENT = "environment"
    DEVICE = "device"
    TERMINAL = "terminal"


@dataclass(frozen=True, slots=True)
class Place:
    """One token, and on it perhaps one key, as configured.

    Attributes:
        module: path of the module as configured.
        token: the fields of a worker's OPEN request but for module and PIN.
        pin_from: where the PIN comes from.
        pin_name: path of the file or name of the variable it comes from, "" for neither.
        environment: additions to the workers' environment.
        object_label: CKA_LABEL of a key the URI names.
        object_id: CKA_ID of a key the URI names.
        ignored: query attributes of the URI that mean nothing here.
    """

    module: str
    token: Mapping[str, object]
    pin_from: PinFrom
    pin_name: str = ""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    object_label: str | None = None
    object_id: bytes | None = None
    ignored: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """Return what tells the token from others, for people."""
        words = [f'"{self.token["label"]}"'] if self.token.get("label") else []
        narrowing = (("serial", self.token.get("serial")), ("slot", self.token.get("slot_id")))
        words += [f"{name} {value}" for name, value in narrowing if value is not None]
        words += [f'{name} "{value}"' for name, value in self._narrowing]
        words += [f"({login})"] if (login := self.token.get("login_as", USER)) != USER else []
        return f"token {' '.join(words)}"

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Return what tells the token, and whose PIN it is, from others, as configured."""
        names = ("label", "serial", "slot_id", "login_as")
        return self.module, *map(self.token.get, names), *self._narrowing

    @property
    def _narrowing(self) -> list[tuple[str, str]]:
        uri = self.token.get("uri")
        return sorted(uri.items()) if isinstance(uri, dict) else []


class Faults:
    """Collects what is wrong with a configuration whose fields are right one by one."""

    def __init__(self, config: Model) -> None:
        self._config = config
        self.found: list[ConfigFault] = []

    def add(self, name: str, message: str) -> None:
        """Note a fault of a field."""
        self.found.append(ConfigFault(self._config.line(name), message))


def place_of(config: TokenConfig, found: Faults, *, with_key: bool = False) -> Place | None:
    """Return the token that settings name; None when that is not clear.

    Args:
        config: the settings.
        found: gets the faults.
        with_key: the URI may name a key as well.
    """
    before = len(found.found)
    parsed = _uri_of(config, found, with_key=with_key)
    module = config.module_path or parsed.module_path
    if module is None:
        found.add("module_path", "module_path is required (or module-path in uri)")
    elif not module.startswith("/"):
        found.add("module_path", "module_path must be absolute")
    label, serial = config.token_label or parsed.token, config.token_serial or parsed.serial
    narrowing = {n: v for n, v in parsed.attributes.items() if n in _NARROWING}
    if label is None and serial is None and not narrowing and parsed.slot_id is None:
        found.add("token_label", "token_label, token_serial or uri is required")
    pins = _pins_of(config, parsed)
    if len(pins) != 1:
        found.add(
            "pin_file",
            "exactly one of pin_file, pin_env, the uri's pin-source, protected_login and pin_prompt "
            "is needed",
        )
    environment = _environment_of(config, found)
    profile = choice_of(config.profile, config.profile_overrides, found.add)
    named = PROFILES.get(config.profile)
    if config.login_as != USER and named is not None and named.crypto_user is None:
        found.add(
            "login_as", f"profile {named.name} knows no {config.login_as}; leave login_as out"
        )
    if module is None or len(found.found) > before:
        return None
    token: dict[str, object] = {
        "label": label,
        "serial": serial,
        "uri": narrowing,
        "slot_id": parsed.slot_id,
        "login_as": config.login_as,
        "profile": profile.to_dict(),
    }
    return Place(
        module,
        token,
        *pins[0],
        environment,
        parsed.attributes.get(_OBJECT),
        parsed.id,
        parsed.ignored,
    )


def _pins_of(config: TokenConfig, uri: pkcs11_uri.Pkcs11Uri) -> list[tuple[PinFrom, str]]:
    """Return every source of a PIN that settings name."""
    named = (
        (PinFrom.FILE, config.pin_file),
        (PinFrom.FILE, uri.pin_file),
        (PinFrom.ENVIRONMENT, config.pin_env),
        (PinFrom.DEVICE, "" if config.protected_login else None),
        (PinFrom.TERMINAL, "" if config.pin_prompt else None),
    )
    return [(source, name) for source, name in named if name is not None]


def place_of_uri(text: str, *, may_ask: bool = False) -> Place:
    """Return the place of a key by a URI that says everything: key, token, module and PIN file.

    Args:
        text: the URI.
        may_ask: without a PIN file the PIN is asked for at the terminal.

    Raises:
        InvalidInputError: it does not; the message says what is missing.

    Spec: RFC 7512.
    """
    parsed = pkcs11_uri.parse(text)
    if parsed.attributes.get(_OBJECT) is None and parsed.id is None:
        raise InvalidInputError("pkcs11 URI names no key: object= or id= is required")
    if parsed.token is None and parsed.serial is None:
        raise InvalidInputError("pkcs11 URI names no token: token= or serial= is required")
    if parsed.module_path is None:
        raise InvalidInputError("pkcs11 URI names no module: ?module-path= is required")
    if parsed.pin_file is None and not may_ask:
        raise InvalidInputError("pkcs11 URI names no PIN file: &pin-source=file:/... is required")
    odd = sorted(set(parsed.attributes) - _NAMED - _NARROWING - {_OBJECT})
    odd += ["type"] if parsed.names_other_object else []
    if odd:
        raise InvalidInputError(f"pkcs11 URI attribute {odd[0]} cannot be used here")
    token: dict[str, object] = {
        "label": parsed.token,
        "serial": parsed.serial,
        "uri": {n: v for n, v in parsed.attributes.items() if n in _NARROWING},
        "slot_id": parsed.slot_id,
        "login_as": USER,
        "profile": ProfileChoice().to_dict(),
    }
    return Place(
        parsed.module_path,
        token,
        PinFrom.TERMINAL if parsed.pin_file is None else PinFrom.FILE,
        parsed.pin_file or "",
        object_label=parsed.attributes.get(_OBJECT),
        object_id=parsed.id,
        ignored=parsed.ignored,
    )


class Pins:
    """Gives each token its PIN; workers of one token start in turns over new configurations, too.

    Args:
        refusals: what is known of PINs; as a rule what the whole process knows.
        entered: what was entered at the terminal; likewise.
    """

    def __init__(
        self, refusals: Refusals = OF_THIS_PROCESS, entered: TerminalPins = ENTERED
    ) -> None:
        self._refusals = refusals
        self._entered = entered
        self._turns: dict[tuple[Hashable, ...], asyncio.Lock] = {}
        self._environment: dict[str, EnvironmentPin] = {}

    def guard(self, place: Place) -> PinGuard:
        """Return what hands out the PIN of a token."""
        turn = self._turns.setdefault(place.key, asyncio.Lock())
        return PinGuard(self._source(place), self._refusals, turn)

    def _source(self, place: Place) -> PinSource:
        match place.pin_from:
            case PinFrom.DEVICE:
                return DevicePin()
            case PinFrom.FILE:
                return FilePin(Path(place.pin_name))
            case PinFrom.ENVIRONMENT:
                return self._variable(place.pin_name)
            case PinFrom.TERMINAL:
                return self._entered.of(place.key, place.words)

    def _variable(self, name: str) -> EnvironmentPin:
        # It is gone once read, so a later configuration needs what was read then.
        known = self._environment.get(name)
        if known is None or name in os.environ:
            known = self._environment[name] = EnvironmentPin(name)
        return known


async def opening_of(place: Place, guard: PinGuard, command: Sequence[str] = WORKER) -> Opening:
    """Return how workers for a token are started; the module is looked at, not loaded.

    Args:
        place: the token.
        guard: its PIN.
        command: see `spire_hw.pkcs11.pool.process.Launch`.

    Raises:
        InvalidInputError: the module may not be loaded.
    """
    module = await asyncio.to_thread(check_module_path, place.module)
    secret = place.pin_name if place.pin_from is PinFrom.ENVIRONMENT else ""
    inherited = {n: v for n, v in os.environ.items() if n != secret}
    launch = Launch({**inherited, **place.environment}, command)
    return Opening(launch, {"module": module, **place.token}, guard, ignored=place.ignored)


def _uri_of(config: TokenConfig, found: Faults, *, with_key: bool) -> pkcs11_uri.Pkcs11Uri:
    if config.uri is None:
        return pkcs11_uri.Pkcs11Uri()
    try:
        parsed = pkcs11_uri.parse(config.uri)
    except InvalidInputError as e:
        found.add("uri", e.message)
        return pkcs11_uri.Pkcs11Uri()
    allowed = _NAMED | _NARROWING | ({_OBJECT} if with_key else set())
    odd = sorted(set(parsed.attributes) - allowed)
    if parsed.id is not None and not with_key:
        odd.append("id")
    if parsed.module_name is not None:
        odd.append("module-name")
    if parsed.names_other_object or (parsed.type is not None and not with_key):
        odd.append("type")
    if odd:
        what = "a key or a token" if with_key else "a token"
        found.add("uri", f"uri must name {what}; {', '.join(odd)} cannot be used here")
    for name, attribute in (("token_label", "token"), ("token_serial", "serial")):
        if getattr(config, name) is not None and attribute in parsed.attributes:
            found.add(name, f"{name} and the uri's {attribute} exclude each other")
    if config.module_path is not None and parsed.module_path is not None:
        found.add("module_path", "module_path and the uri's module-path exclude each other")
    return parsed


def _environment_of(config: TokenConfig, found: Faults) -> dict[str, str]:
    environment = {}
    for item in config.environment.items:
        value = getattr(item, "value", None)
        key = getattr(item, "key", "")
        if not isinstance(value, str) or not key or "=" in key or "\0" in key + value:
            found.add("environment", 'environment holds NAME = "text" only')
        else:
            environment[key] = value
    return environment
