"""Configuration of KeyManager `pkcs11`: read, checked as a whole, nothing opened."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Final, Literal

from pydantic import Field

from spire_hw.config.duration import parse_duration
from spire_hw.config.schema import GoDuration, Model, at_least
from spire_hw.errors import ConfigFault, InvalidInputError
from spire_hw.key import KeyType
from spire_hw.pkcs11.cluster.placement import Mode
from spire_hw.pkcs11.keyring.importing import Import
from spire_hw.pkcs11.pool.place import Faults, Place, Text, TokenConfig, place_of

_MAX_IDENTIFIER: Final = 64
# What names or is about one token: said once for each when there are several.
_OF_ONE: Final = (*TokenConfig.model_fields, "accept_token", "accept_key_loss", "imports")


class ImportConfig(Model):
    """A key that somebody else made on the token.

    Attributes:
        uri: RFC 7512 URI that names it by object, id or both.
        label: its label instead.
    """

    uri: Text | None = None
    label: Text | None = None


class MemberConfig(TokenConfig):
    """One of several tokens.

    Attributes:
        accept_token: as in the plugin_data, for this token.
        accept_key_loss: likewise.
        imports: likewise.
    """

    accept_token: str = ""
    accept_key_loss: bool = False
    imports: dict[str, ImportConfig] = Field(default_factory=dict, alias="import")


class Config(TokenConfig):
    """The plugin_data; see the module's text.

    Attributes:
        tokens: several tokens by name, in place of the settings that name one.
        mode: what several tokens are to each other: `same_keys` or `spread`.
        lost_after: how long one of several may be away before its keys are replaced on another.
        allow_single_copy: with `same_keys`, make keys that are on one token until they are copied.
        workers: signing worker processes; one more does the slow work.
        queue: signatures that may wait for a worker.
        start_timeout: how long the token may be away at start.
        sign_timeout: how long a worker may be silent over a batch of signatures.
        generate_timeout: how long a key generation may take.
        probe_interval: how long a token that fails is left alone between two tries.
        generations_per_day: how often one key id may be made anew; 0 lifts the limit.
        generation_burst: how often one after the other.
        max_keys: how many key ids may have a key, on each token.
        key_types: key types that may be generated; all four when empty.
        accept_token: serial number of a token that may replace the one used so far.
        accept_key_loss: go on although keys are gone; take it out again after one start.
        accept_weak_keys: key ids whose origin in the token need not be proven.
        retain_replaced: how long replaced keys are kept, unused; 0 destroys them at once.
        imports: keys made elsewhere, by the key id under which they are used.
    """

    tokens: dict[str, MemberConfig] = Field(default_factory=dict, alias="token")
    mode: Literal["", "same_keys", "spread"] = ""
    lost_after: Annotated[GoDuration, at_least(timedelta(0))] = parse_duration("30s")
    allow_single_copy: bool = True
    key_identifier_file: Text | None = None
    key_identifier_value: Text | None = None
    workers: Annotated[int, Field(ge=1, le=32)] = 1
    queue: Annotated[int, Field(ge=1, le=65536)] = 1024
    start_timeout: GoDuration = parse_duration("30s")
    sign_timeout: GoDuration = parse_duration("10s")
    generate_timeout: GoDuration = parse_duration("2m")
    probe_interval: Annotated[GoDuration, at_least(timedelta(seconds=1))] = parse_duration("30s")
    generations_per_day: Annotated[int, Field(ge=0, le=1_000_000)] = 12
    generation_burst: Annotated[int, Field(ge=1, le=1_000_000)] = 4
    max_keys: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    key_types: list[str] = Field(default_factory=list)
    accept_token: str = ""
    accept_key_loss: bool = False
    accept_weak_keys: list[str] = Field(default_factory=list)
    retain_replaced: Annotated[GoDuration, at_least(timedelta(0))] = timedelta(0)
    imports: dict[str, ImportConfig] = Field(default_factory=dict, alias="import")


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """One token that holds together.

    Attributes:
        place: the token.
        name: what it is called among several, "" for the only one.
        accept_token: serial number of a token that may replace the one used so far.
        accept_key_loss: go on although keys are gone.
        imports: keys made elsewhere.
    """

    place: Place
    name: str = ""
    accept_token: str = ""
    accept_key_loss: bool = False
    imports: tuple[Import, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration that holds together.

    Attributes:
        tokens: in the order of the configuration; a single one has no name.
        mode: what several are to each other, None for a single one.
        key_types: types that may be generated.
    """

    tokens: tuple[TokenSettings, ...]
    mode: Mode | None
    key_types: frozenset[KeyType]


def settings_of(config: Config) -> tuple[Settings | None, list[ConfigFault]]:
    """Return the settings, None when there are faults, and the faults."""
    found = Faults(config)
    tokens, mode = _tokens_of(config, found)
    if config.key_identifier_file is not None and config.key_identifier_value is not None:
        found.add(
            "key_identifier_value",
            "key_identifier_file and key_identifier_value exclude each other",
        )
    _check_identifier(config, found)
    key_types = _key_types_of(config, found)
    if found.found:
        return None, sorted(found.found, key=lambda fault: fault.line)
    return Settings(tokens, mode, key_types), []


def _tokens_of(config: Config, found: Faults) -> tuple[tuple[TokenSettings, ...], Mode | None]:
    if not config.tokens:
        if config.mode:
            found.add("mode", 'mode is for several tokens: token "..." { ... } blocks')
        one = _token_of(config, found, "")
        return (() if one is None else (one,)), None
    for name in _OF_ONE:
        if config.given(name):
            key = {"imports": "import"}.get(name, name)
            found.add(name, f"{key} belongs into the token blocks when there are any")
    if len(config.tokens) == 1:
        found.add("tokens", "a single token needs no token block; several need two or more")
    if not config.mode:
        found.add(
            "tokens",
            "mode is required with several tokens: same_keys when each has the same keys, spread "
            "when devices cannot share keys",
        )
    members = []
    for name, block in config.tokens.items():
        if not is_identifier(name) or name.startswith("."):
            found.add("tokens", f"token name {name!a} must be letters, digits, - _ .")
        inner = Faults(block)
        one = _token_of(block, inner, name)
        found.found += [ConfigFault(f.line, f'token "{name}": {f.message}') for f in inner.found]
        if one is not None:
            members.append(one)
    return tuple(members), Mode(config.mode) if config.mode else None


def _token_of(config: Config | MemberConfig, found: Faults, name: str) -> TokenSettings | None:
    place = place_of(config, found)
    imports = _imports_of(config, found)
    if place is None:
        return None
    return TokenSettings(place, name, config.accept_token, config.accept_key_loss, imports)


def _check_identifier(config: Config, found: Faults) -> None:
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


def _imports_of(config: Config | MemberConfig, found: Faults) -> tuple[Import, ...]:
    imports = []
    for key_id, one in config.imports.items():
        where = f'import "{key_id}"'
        if (one.uri is None) == (one.label is None):
            found.add("imports", f"{where}: exactly one of uri and label is needed")
        elif one.label is not None:
            imports.append(Import(key_id, f'label "{one.label}"', label=one.label))
        elif one.uri is not None:
            try:
                imports.append(Import.of_uri(key_id, one.uri))
            except InvalidInputError as e:
                found.add("imports", f"{where}: {e.message}")
    return tuple(imports)


def _key_types_of(config: Config, found: Faults) -> frozenset[KeyType]:
    types = set()
    for name in config.key_types:
        try:
            types.add(KeyType.parse(name))
        except InvalidInputError as e:
            found.add("key_types", e.message)
    return frozenset(types) or frozenset(KeyType)
