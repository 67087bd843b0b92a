"""The `plugins` section of a configuration file: which plugins, how many, what they are given.

What stands in `plugin_data` is each plugin's own business, and which built-ins exist that of a
table, so nothing here names a plugin but `join_token`, which is part of the hosts.

Source: upstream's plugin blocks and counts (KeyManager exactly one, and so on).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import AfterValidator, Field

from spire_hw.config import hcl
from spire_hw.config.hcl import Body
from spire_hw.config.schema import Model, check, nearest
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError
from spire_hw.plugin.info import PluginKind

if TYPE_CHECKING:
    from spire_hw.plugin.olddir import OldStyle

_SHA256_HEX: Final = re.compile(r"[0-9a-fA-F]{64}")
_JOIN_TOKEN: Final = (PluginKind.NODE_ATTESTOR, "join_token")


@dataclass(frozen=True, slots=True)
class PluginConfig:
    """One plugin block.

    Attributes:
        kind: what it is.
        name: its label.
        data: what stands in `plugin_data`; empty when `data_file` is given.
        enabled: false leaves the plugin out.
        cmd: path of an external plugin, "" for a built-in; `args`, `checksum` and `env` go with it.
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
    env: tuple[str, ...] = ()
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
    plugin_checksum: Annotated[str, AfterValidator(_checksum)] = ""
    plugin_env: list[str] = Field(default_factory=list)
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


def read_section(
    body: Body, old: OldStyle, rules: Rules, *, with_store: bool = False
) -> tuple[list[PluginConfig], list[StoreConfig], list[ConfigFault]]:
    """Return what the `plugins` sections of a file and its `plugin_dir` hold, and all faults.

    Args:
        body: the whole file.
        old: what the `plugin_dir` holds.
        rules: the host's, on kinds and numbers.
        with_store: the host has a data store.
    """
    blocks = body.blocks("plugins")
    if old.faults or not (blocks or old.blocks):
        return [], [], old.faults or [ConfigFault(0, '"plugins": is required')]
    items = tuple(i for b in blocks for i in b.body.items)
    section = Body((*items, *old.blocks), body.line_of("plugins"), body.file)
    plugins, stores, faults = read_plugins(section, with_store=with_store)
    return plugins, stores, [*faults, *check_counts(plugins, rules)]


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
    faults.extend(_external_faults(raw, title, kind, name))
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
        env=tuple(raw.plugin_env),
        data_file=raw.plugin_data_file,
        file=file,
        line=block.line,
    )
    return made, faults


def _external_faults(
    raw: _PluginBlock, title: str, kind: PluginKind | None, name: str
) -> list[ConfigFault]:
    if raw.plugin_cmd:
        if (kind, name) != _JOIN_TOKEN:
            return []
        message = f"{title} is part of server and agent and cannot be external; use another name"
        return [ConfigFault(raw.line("plugin_cmd"), message)]
    keys = ("plugin_args", "plugin_checksum", "plugin_env")
    return [
        ConfigFault(raw.line(key), f"{title}: {key} says nothing without plugin_cmd")
        for key in keys
        if getattr(raw, key)
    ]


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
