"""Plugins of a host: built or started, configured, told of changes, closed in reverse order.

Which built-ins exist is told by a table that the host hands in, so nothing here names a plugin. A
block with `plugin_cmd` is an external plugin, which takes the place of a built-in of its name.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from spire_hw.config import hcl
from spire_hw.errors import (
    ConfigError,
    ConfigFault,
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    PluginError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.files import read_bounded
from spire_hw.plugin.hostservices import HostServices
from spire_hw.plugin.info import Builder, HostInfo, Plugin, PluginKind
from spire_hw.plugin.section import PluginConfig, Rules, check_counts

if TYPE_CHECKING:
    from spire_hw.config.hcl import Body
    from spire_hw.goplugin.external import ExternalPlugin
    from spire_hw.goplugin.launch import Limits
    from spire_hw.goplugin.place import Place
    from spire_hw.rpc.probes import Check

_MAX_DATA_FILE_BYTES: Final = hcl.MAX_CHARS
_DIGEST_CHARS: Final = 32

# Which built-in has this name; NotFoundError when there is none.
Table = Callable[[PluginKind, str], Builder]
# The names there are, for a helpful message.
Names = Callable[[PluginKind], Iterable[str]]


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


@dataclass(frozen=True, slots=True)
class External:
    """What external plugins of a host need besides what all plugins do.

    Attributes:
        services: what they are offered.
        environ: the host's environment, of which they see a part.
        limits: how patient the host is with them, None for the usual.
    """

    services: HostServices = field(default_factory=HostServices)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    limits: Limits | None = None


class Catalog:
    """All plugins of a host."""

    def __init__(self, slots: Sequence[_Slot], host: HostInfo, place: Place | None) -> None:
        self._slots = list(slots)
        self._place = place
        self._log = host.log
        self._changing = asyncio.Lock()

    @classmethod
    async def load(
        cls,
        configs: Sequence[PluginConfig],
        table: Table,
        host: HostInfo,
        rules: Rules,
        *,
        names: Names | None = None,
        external: External | None = None,
    ) -> Catalog:
        """Build or start, check and configure every enabled plugin, in the order of the file.

        Args:
            configs: what `read_plugins` gave.
            table: finds built-ins.
            host: what plugins are told; each gets its log bound to its type and name.
            rules: `SERVER_RULES` or `AGENT_RULES`.
            names: names of built-ins, for hints.
            external: for external plugins.

        Raises:
            ConfigError: faults of the section and of all plugins' configurations.
            SpireHwError: a plugin could not be made ready; those before it were closed again.
        """
        workshop = _Workshop(table, host, rules, names, external or External())
        slots, faults = workshop.build(configs)
        catalog = cls(slots, host, workshop.place)
        try:
            await catalog._make_ready(faults, configs[0].file if configs else "")
        except BaseException:
            await catalog.close()
            raise
        return catalog

    async def _make_ready(self, faults: list[ConfigFault], file: str) -> None:
        if faults:
            raise ConfigError(file or "configuration", faults)
        for slot in self._slots:
            await slot.make_ready()
            self._tell_ready(slot)

    def _tell_ready(self, slot: _Slot) -> None:
        config = slot.config
        fields = {"plugin_name": config.name, "plugin_type": config.kind.value}
        self._log.info(
            "Configured plugin",
            external=bool(config.cmd),
            reconfigurable=bool(config.data_file),
            **fields,
        )
        if config.kind is PluginKind.NOTIFIER:
            self._log.warning(
                "Notifier plugins are deprecated, use a BundlePublisher",
                alert=True,
                alert_type="deprecated_service",
                **fields,
            )

    def all(self, kind: PluginKind) -> list[Loaded]:
        """Return the plugins of a kind in the order of the file."""
        return [slot.loaded for slot in self._slots if slot.config.kind is kind]

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

    def checks(self) -> dict[str, Check]:
        """Return health checks: whether each external plugin is up, by `plugin.<type>(<name>)`."""
        return {
            f"plugin.{slot.config.prefix}": slot.external.check
            for slot in self._slots
            if slot.external is not None
        }

    async def reconfigure(self) -> None:
        """Read the data files again and configure the plugins whose data have changed.

        What goes wrong is logged; that plugin keeps its configuration and is tried next time.
        """
        async with self._changing:
            for slot in self._slots:
                if slot.config.data_file:
                    await self._reconfigure(slot)

    async def _reconfigure(self, slot: _Slot) -> None:
        config = slot.config
        log = self._log.bind(plugin_name=config.name, plugin_type=config.kind.value)
        try:
            data = await asyncio.to_thread(_load_data, config)
            if data.digest == slot.data.digest:
                return
            await slot.configure(data)
        except SpireHwError as e:
            text = "Failed to configure plugin, it keeps its configuration"
            log.error(text, error=e.message)  # noqa: TRY400 - the message says it all
        else:
            log.info("Plugin was configured anew", file=config.data_file)

    async def close(self) -> None:
        """Close all plugins, the last one first; one that fails does not keep the others open."""
        while self._slots:
            slot = self._slots.pop()
            try:
                await slot.close()
            except Exception as e:  # noqa: BLE001 - the others must be closed too
                self._log.error(
                    "Failed to close plugin",
                    plugin_name=slot.config.name,
                    plugin_type=slot.config.kind.value,
                    error=str(e),
                )
        if self._place is not None:
            await asyncio.to_thread(self._place.close)
            self._place = None


async def check_plugins(
    configs: Sequence[PluginConfig],
    table: Table,
    host: HostInfo,
    rules: Rules,
    *,
    names: Names | None = None,
    external: External | None = None,
) -> list[ConfigFault]:
    """Return all faults of the plugins without making any ready; no network, no device.

    External plugins are started, asked and stopped: only they know what is wrong.
    """
    workshop = _Workshop(table, host, rules, names, external or External())
    slots, faults = workshop.build(configs)
    catalog = Catalog(slots, host, workshop.place)
    try:
        for slot in slots:
            faults += await slot.ask_for_faults()
    finally:
        await catalog.close()
    return sorted(faults, key=lambda f: f.line)


# -- one plugin -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Data:
    """A plugin's configuration: the text an external one gets, the tree a built-in gets."""

    text: str
    body: Body

    @property
    def digest(self) -> str:
        """Return what tells one text from another, as upstream does."""
        return hashlib.sha512(self.text.encode()).hexdigest()[:_DIGEST_CHARS]


@dataclass(slots=True)
class _Slot:
    """One plugin of the file: either built in or external."""

    config: PluginConfig
    data: _Data
    builtin: Plugin | None = None
    external: ExternalPlugin | None = None

    @property
    def loaded(self) -> Loaded:
        plugin = self.builtin if self.external is None else self.external.contract
        return Loaded(self.config.kind, self.config.name, plugin)

    async def make_ready(self) -> None:
        if self.external is not None:
            await self.external.open()
        await self.configure(self.data)

    async def configure(self, data: _Data) -> None:
        config = self.config
        try:
            if self.external is not None:
                await self.external.configure(data.text)
            elif self.builtin is not None:
                await self.builtin.configure(data.body)
        except ConfigError as e:
            raise ConfigError(config.file or e.file, _prefixed(config, e)) from e
        except PluginError:
            raise
        except SpireHwError as e:
            if self.external is not None and e.kind is ErrorKind.INVALID_ARGUMENT:
                raise ConfigError(config.file, _prefixed(config, e)) from e
            raise PluginError(config.prefix, e) from e
        self.data = data

    async def ask_for_faults(self) -> list[ConfigFault]:
        if self.external is None:
            return []
        try:
            await self.external.open()
            notes = await self.external.validate(self.data.text)
        except SpireHwError as e:
            return _prefixed(self.config, e)
        return [ConfigFault(self.config.line, f"{self.config.prefix}: {note}") for note in notes]

    async def close(self) -> None:
        if self.external is not None:
            await self.external.close()
        elif self.builtin is not None:
            await self.builtin.close()


@dataclass(slots=True)
class _Workshop:
    """Makes plugins out of blocks; none is started or configured yet."""

    table: Table
    host: HostInfo
    rules: Rules
    names: Names | None
    external: External
    place: Place | None = None

    def build(self, configs: Sequence[PluginConfig]) -> tuple[list[_Slot], list[ConfigFault]]:
        """Return the plugins that could be made and everything that is wrong."""
        faults = check_counts(configs, self.rules)
        slots: list[_Slot] = []
        for config in configs:
            if not config.enabled or config.kind not in self.rules:
                continue
            try:
                slot = self._slot(config)
            except SpireHwError as e:
                faults.extend(_prefixed(config, e))
                continue
            slots.append(slot)
            if slot.builtin is not None:
                faults.extend(
                    ConfigFault(f.line or config.line, f"{config.prefix}: {f.message}")
                    for f in slot.builtin.validate(slot.data.body)
                )
        return slots, sorted(faults, key=lambda f: f.line)

    def _slot(self, config: PluginConfig) -> _Slot:
        log = self.host.log.bind(plugin_type=config.kind.value, plugin_name=config.name)
        host = dataclasses.replace(self.host, log=log)
        if config.cmd:
            return _Slot(config, _load_data(config), external=self._external(config, host))
        builtin = self._builder(config)(host)
        return _Slot(config, _load_data(config), builtin=builtin)

    def _external(self, config: PluginConfig, host: HostInfo) -> ExternalPlugin:
        # Hosts without external plugins need none of it.
        from spire_hw.goplugin.external import ExternalPlugin  # noqa: PLC0415
        from spire_hw.goplugin.place import Place  # noqa: PLC0415

        if self.place is None:
            self.place = Place.open()
        given = self.external
        return ExternalPlugin(
            config, host, given.services, self.place, environ=given.environ, limits=given.limits
        )

    def _builder(self, config: PluginConfig) -> Builder:
        try:
            return self.table(config.kind, config.name)
        except NotFoundError as e:
            known = sorted(self.names(config.kind)) if self.names is not None else []
            if not known or any(name in e.message for name in known):
                raise
            raise NotFoundError(f"{e.message}; there are {', '.join(known)}") from e
        except ImportError as e:
            raise UnavailableError(f"needs a library that is not installed: {e}") from e


def _load_data(config: PluginConfig) -> _Data:
    if not config.data_file:
        return _Data(config.data.to_hcl(), config.data)
    path = Path(config.data_file)
    raw = read_bounded(path, _MAX_DATA_FILE_BYTES, "plugin_data_file")
    try:
        text = raw.decode()
    except UnicodeDecodeError as e:
        raise InvalidInputError(f"plugin_data_file {path} is not UTF-8 text") from e
    return _Data(text, hcl.parse(text, str(path)))


def plugin_data(config: PluginConfig) -> Body:
    """Return a plugin's configuration, from its own file where it has one.

    Raises:
        InvalidInputError: the file cannot be read.
    """
    return _load_data(config).body


def _prefixed(config: PluginConfig, error: SpireHwError) -> list[ConfigFault]:
    if isinstance(error, ConfigError):
        place = f"{error.file}: " if config.data_file else ""
        return [
            ConfigFault(f.line or config.line, f"{config.prefix}: {place}{f.message}")
            for f in error.faults
        ]
    return [ConfigFault(config.line, PluginError(config.prefix, error).message)]
