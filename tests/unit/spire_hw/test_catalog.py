from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from spire_hw.catalog import Catalog, check_plugins
from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body, parse
from spire_hw.errors import (
    ConfigError,
    ConfigFault,
    NotFoundError,
    PluginError,
    UnavailableError,
)
from spire_hw.log import get_logger
from spire_hw.plugin.info import Builder, HostInfo, Plugin, PluginKind, Side
from spire_hw.plugin.section import (
    AGENT_RULES,
    SERVER_RULES,
    PluginConfig,
    check_counts,
    parse_plugins,
    read_plugins,
)
from spire_hw.spiffeid import TrustDomain

if TYPE_CHECKING:
    from pathlib import Path


class Scripted:
    """A plugin that notes what is done to it and fails on demand."""

    def __init__(self, name: str, events: list[str]) -> None:
        self._name = name
        self._events = events

    def validate(self, config: Body) -> list[ConfigFault]:
        return [ConfigFault(config.line_of("bad"), "bad is bad")] if config.get("bad") else []

    async def configure(self, config: Body) -> None:
        self._events.append(f"configure {self._name}")
        if config.get("away"):
            raise UnavailableError("device is away")

    async def close(self) -> None:
        self._events.append(f"close {self._name}")
        if self._name == "rude":
            raise RuntimeError("will not close")


class World:
    def __init__(self, tmp_path: Path) -> None:
        self.events: list[str] = []
        self.host = HostInfo(
            side=Side.SERVER,
            trust_domain=TrustDomain("example.org"),
            data_dir=tmp_path,
            log=get_logger("catalog"),
            clock=SystemClock(),
        )

    def table(self, kind: PluginKind, name: str) -> Builder:
        if name not in self.names(kind):
            raise NotFoundError(f"no built-in {kind.value} {name}")

        def build(host: HostInfo) -> Plugin:
            assert host.trust_domain.name == "example.org"
            return Scripted(name, self.events)

        return build

    def names(self, _kind: PluginKind) -> list[str]:
        return ["disk", "memory", "rude"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def plugins(text: str) -> list[PluginConfig]:
    return parse_plugins(parse(text, "s.conf"))


def test_every_key_of_a_block_is_read() -> None:
    checksum = "aB" * 32
    (made,) = plugins(
        f"""NodeAttestor "x" {{
            plugin_cmd = "/bin/x" plugin_args = ["-v"] plugin_checksum = "{checksum}"
            enabled = false plugin_data {{ a = 1 }}
        }}"""
    )
    assert (made.kind, made.name, made.cmd) == (PluginKind.NODE_ATTESTOR, "x", "/bin/x")
    assert made.args == ("-v",)
    assert made.checksum == checksum.lower()
    assert made.data.get("a") == 1
    assert not made.enabled
    assert made.prefix == "nodeattestor(x)"
    assert (made.file, made.line) == ("s.conf", 1)


def test_nested_and_json_shapes_keep_their_order() -> None:
    text = '{"WorkloadAttestor": [{"unix": {}}, {"docker": {"plugin_data": {}}}, {"systemd": {}}]}'
    assert [p.name for p in plugins(text)] == ["unix", "docker", "systemd"]


def test_all_faults_of_the_section_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        plugins(
            """KeyManger "x" {}
            KeyManager "a" { plugn_data {} }
            KeyManager "b" { plugin_checksum = "zz" }
            KeyManager "c" { plugin_data {} plugin_data_file = "x" }
            KeyManager { stray = 1 }
            stray = 2
            KeyManager "d" "e" {}
            """
        )
    found = [f.message for f in caught.value.faults]
    expected = [
        'did you mean "KeyManager"',
        'did you mean "plugin_data"',
        "64 hex digits",
        "not both",
        "needs the plugin's name",
        "is not a plugin block",
        "takes one name",
    ]
    assert len(found) == len(expected)
    for words in expected:
        assert any(words in f for f in found), words


def test_the_data_store_stands_among_the_plugins_of_a_server() -> None:
    body = parse('DataStore "sql" { plugin_data { a = 1 } } KeyManager "disk" {}')
    found, stores, faults = read_plugins(body, with_store=True)
    assert [p.name for p in found] == ["disk"]
    assert stores[0].name == "sql"
    assert stores[0].data.get("a") == 1
    assert not faults
    assert read_plugins(body)[2][0].message.startswith('unknown plugin type "DataStore"')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "needs exactly 1 KeyManager, found 0"),
        ('KeyManager "a" {} KeyManager "b" {}', "takes at most 1 KeyManager, found 2"),
        ('KeyManager "a" {} KeyManager "a" { enabled = false }', ""),
        ('KeyManager "a" {} NodeAttestor "x" {} NodeAttestor "x" {}', "configured twice"),
        ('KeyManager "a" {} WorkloadAttestor "unix" {}', "do not belong here"),
        (
            'KeyManager "a" {} UpstreamAuthority "x" {} UpstreamAuthority "y" {}',
            "at most 1 Upstream",
        ),
    ],
)
def test_counts_of_a_server(text: str, words: str) -> None:
    found = [f.message for f in check_counts(plugins(text), SERVER_RULES)]
    assert bool(found) is bool(words)
    assert any(words in f for f in found) or not words


def test_counts_of_an_agent() -> None:
    text = 'KeyManager "a" {} NodeAttestor "x" {} WorkloadAttestor "unix" {} SVIDStore "s" {}'
    assert check_counts(plugins(text), AGENT_RULES) == []
    assert len(check_counts([], AGENT_RULES)) == 3


@pytest.mark.asyncio
async def test_plugins_are_configured_in_order_and_closed_in_reverse(world: World) -> None:
    configs = plugins('NodeAttestor "rude" {} KeyManager "disk" {} NodeAttestor "memory" {}')
    catalog = await Catalog.load(configs, world.table, world.host, SERVER_RULES)
    assert catalog.one(PluginKind.KEY_MANAGER).prefix == "keymanager(disk)"
    assert [p.name for p in catalog.all(PluginKind.NODE_ATTESTOR)] == ["rude", "memory"]
    assert catalog.named(PluginKind.NODE_ATTESTOR, "memory").name == "memory"
    with pytest.raises(NotFoundError):
        catalog.named(PluginKind.NODE_ATTESTOR, "disk")
    with pytest.raises(NotFoundError):
        catalog.one(PluginKind.NOTIFIER)
    await catalog.close()
    await catalog.close()
    assert world.events == [
        "configure rude",
        "configure disk",
        "configure memory",
        "close memory",
        "close disk",
        "close rude",
    ]


@pytest.mark.asyncio
async def test_a_plugin_that_fails_takes_the_others_down_and_is_named(world: World) -> None:
    configs = plugins('KeyManager "disk" {} NodeAttestor "memory" { plugin_data { away = true } }')
    with pytest.raises(PluginError, match=r"^nodeattestor\(memory\): device is away$"):
        await Catalog.load(configs, world.table, world.host, SERVER_RULES)
    assert world.events[-2:] == ["close memory", "close disk"]


@pytest.mark.asyncio
async def test_all_plugin_faults_come_at_once_before_anything_is_made_ready(world: World) -> None:
    text = """KeyManager "disc" {}
    KeyManager "disk" { plugin_data { bad = 1 } }
    NodeAttestor "memory" { plugin_data_file = "/nowhere/x" }
    NodeAttestor "rude" { plugin_data {
        bad = 1 } }
    """
    with pytest.raises(ConfigError) as caught:
        await Catalog.load(plugins(text), world.table, world.host, SERVER_RULES, names=world.names)
    found = caught.value.faults
    expected = {
        (2, "plugins takes at most 1 KeyManager, found 2"),
        (1, "keymanager(disc): no built-in KeyManager disc; there are disk, memory, rude"),
        (2, "keymanager(disk): bad is bad"),
        (
            3,
            "nodeattestor(memory): plugin_data_file /nowhere/x cannot be read: No such file or directory",
        ),
        (5, "nodeattestor(rude): bad is bad"),
    }
    assert {(f.line, f.message) for f in found} == expected
    assert world.events == ["close rude", "close disk"]


@pytest.mark.asyncio
async def test_data_files_are_read_and_their_faults_name_them(world: World, tmp_path: Path) -> None:
    file = tmp_path / "data.hcl"
    file.write_text("away = true")
    configs = plugins(f'KeyManager "disk" {{ plugin_data_file = "{file}" }}')
    with pytest.raises(PluginError):
        await Catalog.load(configs, world.table, world.host, SERVER_RULES)
    file.write_text("a = ")
    faults = await check_plugins(configs, world.table, world.host, SERVER_RULES)
    assert len(faults) == 1
    assert str(file) in faults[0].message


@pytest.mark.asyncio
async def test_checking_makes_nothing_ready(world: World) -> None:
    configs = plugins('KeyManager "disk" { plugin_data { away = true } }')
    assert await check_plugins(configs, world.table, world.host, SERVER_RULES) == []
    assert world.events == ["close disk"]


def test_plugin_data_stay_out_of_reprs() -> None:
    (made,) = plugins('KeyManager "x" { plugin_data { pin = "1234" } }')
    assert "1234" not in repr(made)
