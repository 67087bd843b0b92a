"""The `plugins` section to configured plugins, and their end in reverse order.

What stands in `plugin_data` is each plugin's own business. Which built-ins exist is told by a
table that the host hands in, so nothing here names a plugin.

Source: upstream's plugin blocks and counts (KeyManager exactly one, and so on).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

from spire_hw.config import hcl
from spire_hw.config.hcl import Body
from spire_hw.config.schema import Checked, Field, Model, check, nearest
from spire_hw.errors import (
    ConfigError,
    ConfigFault,
    InvalidInputError,
    NotFoundError,
    PluginError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.plugin.info import Builder, HostInfo, Plugin, PluginKind

_MAX_DATA_FILE_BYTES: Final = hcl.MAX_CHARS
_SHA256_HEX: Final = re.compile(r"[0-9a-fA-F]{64}")

# Which built-in has this name; NotFoundError when there is none.
Table = Callable[[PluginKind, str], Builder]
# The names there are, for a helpful message.
Names = Callable[[PluginKind], Iterable[str]]


@dataclass(frozen=True, slots=True)
class PluginConfig:
    """One plugin block.

    Attributes:
        kind: what it is.
        name: its label.
        data: what stands in `plugin_data`; empty when `data_file` is given.
        enabled: false leaves the plugin out.
        cmd: path of an external plugin, "" for a built-in; `args` and `checksum` go with it.
        data_file: path of a file that holds the data.
        file: where the block stands, with its line.
    """

    kind: PluginKind
    name: str
    data: Body = field(default_factory=Body.empty, repr=False)
    enabled: bool = True
    cmd: str = ""
    args: tuple[str, ...] = ()
    checksum: str = ""
    data_file: str = ""
    file: str = ""
    line: int = 0

    @property
    def prefix(self) -> str:
        """Return how messages name it, such as `keymanager(tpm)`."""
        return f"{self.kind.value.lower()}({self.name})"


@dataclass(frozen=True, slots=True)
class Count:
    """How many plugins of a kind a host wants; `most` None means any number."""

    least: int = 0
    most: int | None = None


Rules = Mapping[PluginKind, Count]

SERVER_RULES: Final[Rules] = {
    PluginKind.KEY_MANAGER: Count(1, 1),
    PluginKind.NODE_ATTESTOR: Count(),
    PluginKind.UPSTREAM_AUTHORITY: Count(0, 1),
    PluginKind.NOTIFIER: Count(),
    PluginKind.BUNDLE_PUBLISHER: Count(),
    PluginKind.CREDENTIAL_COMPOSER: Count(),
}
AGENT_RULES: Final[Rules] = {
    PluginKind.KEY_MANAGER: Count(1, 1),
    PluginKind.NODE_ATTESTOR: Count(1, 1),
    PluginKind.WORKLOAD_ATTESTOR: Count(1),
    PluginKind.SVID_STORE: Count(),
}


def _checksum(value: str) -> str:
    if value and not _SHA256_HEX.fullmatch(value):
        raise InvalidInputError("must be a SHA-256 in 64 hex digits")
    return value.lower()


class _PluginBlock(Model):
    plugin_cmd: str = ""
    plugin_args: list[str] = Field(default_factory=list)
    plugin_checksum: Annotated[str, Checked(_checksum)] = ""
    plugin_data: Body = Body.empty()
    plugin_data_file: str = ""
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """The `DataStore "sql"` block, which is no plugin but stands among them."""

    name: str
    data: Body = field(repr=False)
    line: int = 0


_STORE: Final = "DataStore"


def parse_plugins(body: Body) -> list[PluginConfig]:
    """Return the plugins of a `plugins` section in the order of the file, disabled ones too.

    Raises:
        ConfigError: with all faults.
    """
    found, _, faults = read_plugins(body)
    if faults:
        raise ConfigError(body.file or "configuration", faults)
    return found


def read_plugins(
    body: Body, *, with_store: bool = False
) -> tuple[list[PluginConfig], list[StoreConfig], list[ConfigFault]]:
    """Return plugins, data stores (where the host has one) and all faults of the section."""
    kinds = {k.value.lower(): k for k in PluginKind}
    names = [k.value for k in PluginKind] + ([_STORE] if with_store else [])
    plugins: list[PluginConfig] = []
    stores: list[StoreConfig] = []
    faults: list[ConfigFault] = []
    for item in body.items:
        if isinstance(item, hcl.Item):
            line, key = item.line, item.key
            faults.append(ConfigFault(line, f'"{key}" in plugins is not a plugin block'))
            continue
        key = item.keys[0]
        alone = Body((item,), item.line, body.file)
        for stray in alone.unlabelled(key):
            message = f'{key} needs the plugin\'s name: {key} "..." {{ plugin_data {{ ... }} }}'
            faults.append(ConfigFault(stray.line, message))
        is_store = with_store and key.lower() == _STORE.lower()
        kind = kinds.get(key.lower())
        if kind is None and not is_store:
            hint = nearest(key, names)
            faults.append(ConfigFault(item.line, f'unknown plugin type "{key}"{hint}'))
            continue
        for block in alone.labelled(key):
            made, wrong = _read_block(block, kind, body.file)
            faults.extend(wrong)
            if isinstance(made, PluginConfig):
                plugins.append(made)
            elif made is not None:
                stores.append(made)
    return plugins, stores, faults


def _read_block(
    block: hcl.Block, kind: PluginKind | None, file: str
) -> tuple[PluginConfig | StoreConfig | None, list[ConfigFault]]:
    title = f"{block.keys[0]} {hcl.quote(block.keys[1])}"
    if len(block.keys) > 2:  # noqa: PLR2004 - kind and name
        return None, [ConfigFault(block.line, f"{title} takes one name")]
    raw, faults = check(block.body, _PluginBlock, block.line)
    faults = [ConfigFault(f.line, f"{title}: {f.message}") for f in faults]
    if raw is None:
        return None, faults
    if raw.plugin_data_file and raw.given("plugin_data"):
        message = f"{title}: give plugin_data or plugin_data_file, not both"
        return None, [ConfigFault(raw.line("plugin_data_file"), message)]
    name = block.keys[1]
    if kind is None:
        if raw.plugin_cmd or raw.plugin_data_file or not raw.enabled:
            faults.append(ConfigFault(block.line, f"{title}: only plugin_data can be set"))
        return StoreConfig(name, raw.plugin_data, block.line), faults
    made = PluginConfig(
        kind=kind,
        name=name,
        data=raw.plugin_data,
        enabled=raw.enabled,
        cmd=raw.plugin_cmd,
        args=tuple(raw.plugin_args),
        checksum=raw.plugin_checksum,
        data_file=raw.plugin_data_file,
        file=file,
        line=block.line,
    )
    return made, faults


def check_counts(configs: Sequence[PluginConfig], rules: Rules) -> list[ConfigFault]:
    """Return what breaks a host's rules on kinds and numbers among the enabled plugins."""
    enabled = [c for c in configs if c.enabled]
    faults: list[ConfigFault] = []
    seen: set[tuple[PluginKind, str]] = set()
    for config in enabled:
        title = f'{config.kind.value} "{config.name}"'
        if config.kind not in rules:
            faults.append(
                ConfigFault(config.line, f"{title}: plugins of this type do not belong here")
            )
        elif (config.kind, config.name) in seen:
            faults.append(ConfigFault(config.line, f"{title} is configured twice"))
        seen.add((config.kind, config.name))
    numbers = Counter(kind for kind, _ in seen)
    for kind, count in rules.items():
        if numbers[kind] < count.least:
            wanted = "exactly" if count.least == count.most else "at least"
            faults.append(
                ConfigFault(
                    0, f"plugins needs {wanted} {count.least} {kind.value}, found {numbers[kind]}"
                )
            )
        if count.most is not None and numbers[kind] > max(count.most, count.least):
            line = [c.line for c in enabled if c.kind is kind][count.most]
            message = f"plugins takes at most {count.most} {kind.value}, found {numbers[kind]}"
            faults.append(ConfigFault(line, message))
    return faults


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configured plugin; `plugin` offers the contract of its kind."""

    kind: PluginKind
    name: str
    plugin: Any

    @property
    def prefix(self) -> str:
        """Return how messages name it, such as `keymanager(tpm)`."""
        return f"{self.kind.value.lower()}({self.name})"


class Catalog:
    """All plugins of a host."""

    def __init__(self, plugins: Sequence[Loaded], host: HostInfo) -> None:
        self._plugins = list(plugins)
        self._log = host.log

    @classmethod
    async def load(
        cls,
        configs: Sequence[PluginConfig],
        table: Table,
        host: HostInfo,
        rules: Rules,
        *,
        names: Names | None = None,
    ) -> Catalog:
        """Build, check and configure every enabled plugin, in the order of the file.

        Args:
            configs: what `parse_plugins` gave.
            table: finds built-ins.
            host: what plugins are told; each gets its log bound to its type and name.
            rules: `SERVER_RULES` or `AGENT_RULES`.
            names: names of built-ins, for hints.

        Raises:
            ConfigError: faults of the section and of all plugins' configurations.
            PluginError: a plugin could not be made ready; those before it were closed again.
        """
        built, faults = _build(configs, table, host, rules, names)
        catalog = cls([Loaded(c.kind, c.name, p) for c, p, _ in built], host)
        try:
            await catalog._make_ready(built, faults, configs[0].file if configs else "")
        except BaseException:
            await catalog.close()
            raise
        return catalog

    async def _make_ready(
        self, built: Sequence[_Built], faults: list[ConfigFault], file: str
    ) -> None:
        if faults:
            raise ConfigError(file or "configuration", faults)
        for config, plugin, data in built:
            await _configure(config, plugin, data)
            self._log.info(
                "Configured plugin",
                external=False,
                plugin_name=config.name,
                plugin_type=config.kind.value,
                reconfigurable=False,
            )

    def all(self, kind: PluginKind) -> list[Loaded]:
        """Return the plugins of a kind in the order of the file."""
        return [p for p in self._plugins if p.kind is kind]

    def one(self, kind: PluginKind) -> Loaded:
        """Return the only plugin of a kind.

        Raises:
            NotFoundError: there is none.
        """
        found = self.all(kind)
        if not found:
            raise NotFoundError(f"no {kind.value} is configured")
        return found[0]

    def named(self, kind: PluginKind, name: str) -> Loaded:
        """Return a plugin by name.

        Raises:
            NotFoundError: it is not configured.
        """
        for plugin in self.all(kind):
            if plugin.name == name:
                return plugin
        raise NotFoundError(f'no {kind.value} "{name}" is configured')

    async def close(self) -> None:
        """Close all plugins, the last one first; one that fails does not keep the others open."""
        while self._plugins:
            loaded = self._plugins.pop()
            try:
                await loaded.plugin.close()
            except Exception as e:  # noqa: BLE001 - the others must be closed too
                self._log.error(
                    "Failed to close plugin",
                    plugin_name=loaded.name,
                    plugin_type=loaded.kind.value,
                    error=str(e),
                )


async def check_plugins(
    configs: Sequence[PluginConfig],
    table: Table,
    host: HostInfo,
    rules: Rules,
    *,
    names: Names | None = None,
) -> list[ConfigFault]:
    """Return all faults of the plugins without making any ready; no network, no device."""
    built, faults = _build(configs, table, host, rules, names)
    await Catalog([Loaded(c.kind, c.name, p) for c, p, _ in built], host).close()
    return faults


_Built = tuple[PluginConfig, Plugin, Body]


def _build(
    configs: Sequence[PluginConfig],
    table: Table,
    host: HostInfo,
    rules: Rules,
    names: Names | None,
) -> tuple[list[_Built], list[ConfigFault]]:
    faults = check_counts(configs, rules)
    built: list[_Built] = []
    for config in configs:
        if not config.enabled or config.kind not in rules:
            continue
        if config.cmd:
            message = f"{config.prefix}: external plugins are not available yet; remove plugin_cmd"
            faults.append(ConfigFault(config.line, message))
            continue
        try:
            plugin = _make(config, table, host, names)
            data = _load_data(config)
        except SpireHwError as e:
            faults.extend(_prefixed(config, e))
            continue
        built.append((config, plugin, data))
        faults.extend(
            ConfigFault(f.line or config.line, f"{config.prefix}: {f.message}")
            for f in plugin.validate(data)
        )
    return built, sorted(faults, key=lambda f: f.line)


def _make(config: PluginConfig, table: Table, host: HostInfo, names: Names | None) -> Plugin:
    try:
        builder = table(config.kind, config.name)
    except NotFoundError as e:
        known = sorted(names(config.kind)) if names is not None else []
        if not known or any(name in e.message for name in known):
            raise
        raise NotFoundError(f"{e.message}; there are {', '.join(known)}") from e
    except ImportError as e:
        raise UnavailableError(f"needs a library that is not installed: {e}") from e
    log = host.log.bind(plugin_type=config.kind.value, plugin_name=config.name)
    return builder(dataclasses.replace(host, log=log))


def _load_data(config: PluginConfig) -> Body:
    if not config.data_file:
        return config.data
    path = Path(config.data_file)
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MAX_DATA_FILE_BYTES + 1)
        text = raw.decode()
    except OSError as e:
        raise UnavailableError(f"plugin_data_file {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise InvalidInputError(f"plugin_data_file {path} is not UTF-8 text") from e
    return hcl.parse(text, str(path))


async def _configure(config: PluginConfig, plugin: Plugin, data: Body) -> None:
    try:
        await plugin.configure(data)
    except ConfigError as e:
        raise ConfigError(config.file or e.file, _prefixed(config, e)) from e
    except PluginError:
        raise
    except SpireHwError as e:
        raise PluginError(config.prefix, e) from e


def _prefixed(config: PluginConfig, error: SpireHwError) -> list[ConfigFault]:
    if isinstance(error, ConfigError):
        place = f"{error.file}: " if config.data_file else ""
        return [
            ConfigFault(f.line or config.line, f"{config.prefix}: {place}{f.message}")
            for f in error.faults
        ]
    return [ConfigFault(config.line, f"{config.prefix}: {error.message}")]
