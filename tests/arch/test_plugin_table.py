"""Modules that are loaded by name, which no static rule can see."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from spire_hw.clock import SystemClock
from spire_hw.config import hcl
from spire_hw.log import get_logger
from spire_hw.plugin.custody import KeyStatementSource
from spire_hw.plugin.info import HostInfo, Plugin, PluginKind, Side
from spire_hw.plugin.keymanager import KeyEvidenceSource, KeyManager, TpmKeys
from spire_hw.plugin.nodeattestor import AgentNodeAttestor, ServerNodeAttestor
from spire_hw.plugin.upstreamauthority import UpstreamAuthority
from spire_hw.plugin.workloadattestor import WorkloadAttestor
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins import builtin

CONTRACTS: dict[tuple[PluginKind, Side], type[Any]] = {
    (PluginKind.KEY_MANAGER, Side.SERVER): KeyManager,
    (PluginKind.KEY_MANAGER, Side.AGENT): KeyManager,
    (PluginKind.NODE_ATTESTOR, Side.SERVER): ServerNodeAttestor,
    (PluginKind.NODE_ATTESTOR, Side.AGENT): AgentNodeAttestor,
    (PluginKind.UPSTREAM_AUTHORITY, Side.SERVER): UpstreamAuthority,
    (PluginKind.WORKLOAD_ATTESTOR, Side.AGENT): WorkloadAttestor,
}
DOCS = Path(__file__).parents[2] / "docs" / "plugins"

every_row = pytest.mark.parametrize(
    "row", builtin.TABLE, ids=lambda r: f"{r[0].value}-{r[1]}-{r[2].value}"
)
Row = tuple[PluginKind, str, Side]


class NoEks:
    async def is_ek_allowed(self, ek_hash: str) -> bool:
        return False


def host_of(side: Side, data_dir: Path) -> HostInfo:
    return HostInfo(
        side=side,
        trust_domain=TrustDomain.parse("example.org"),
        data_dir=data_dir,
        log=get_logger("test"),
        clock=SystemClock(),
        ek_list=NoEks() if side is Side.SERVER else None,
    )


def methods_of(contract: type[Any]) -> dict[str, Any]:
    return {
        name: member
        for name, member in inspect.getmembers(contract, inspect.isfunction)
        if not name.startswith("_")
    }


def assert_satisfies(plugin: object, contract: type[Any]) -> None:
    for name, wanted in methods_of(contract).items():
        made = getattr(plugin, name, None)
        assert made is not None, f"{name} is missing"
        assert inspect.iscoroutinefunction(made) == inspect.iscoroutinefunction(wanted), name
        names = list(inspect.signature(wanted).parameters)[1:]
        assert list(inspect.signature(made).parameters) == names, name


@every_row
def test_every_row_builds_what_its_contract_asks_for(row: Row, tmp_path: Path) -> None:
    kind, name, side = row
    plugin = builtin.lookup(kind, name, side)(host_of(side, tmp_path))
    assert_satisfies(plugin, Plugin)
    assert_satisfies(plugin, CONTRACTS[kind, side])


@every_row
def test_building_a_plugin_touches_nothing(row: Row, tmp_path: Path) -> None:
    kind, name, side = row
    builtin.lookup(kind, name, side)(host_of(side, tmp_path))
    assert not list(tmp_path.iterdir())


def test_optional_abilities_are_whole_where_they_are_offered(tmp_path: Path) -> None:
    offered = set()
    for kind, name, side in builtin.TABLE:
        if kind is not PluginKind.KEY_MANAGER:
            continue
        plugin = builtin.lookup(kind, name, side)(host_of(side, tmp_path))
        for ability in (TpmKeys, KeyEvidenceSource, KeyStatementSource):
            if isinstance(plugin, ability):
                assert_satisfies(plugin, ability)
                offered.add((name, ability.__name__))
    assert offered >= {
        ("tpm", "TpmKeys"),
        ("tpm", "KeyEvidenceSource"),
        ("tpm", "KeyStatementSource"),
        ("disk", "KeyEvidenceSource"),
        ("memory", "KeyEvidenceSource"),
        ("pkcs11", "KeyEvidenceSource"),
    }


@every_row
def test_every_plugin_refuses_a_key_it_does_not_know(row: Row, tmp_path: Path) -> None:
    kind, name, side = row
    plugin = builtin.lookup(kind, name, side)(host_of(side, tmp_path))
    faults = plugin.validate(hcl.parse("no_such_key = 1"))
    assert any("no_such_key" in fault.message for fault in faults)


@every_row
def test_every_plugin_has_a_page(row: Row) -> None:
    kind, name, side = row
    common = f"{kind.value.lower()}_{name}.md"
    assert (DOCS / common).exists() or (DOCS / f"{side.value}_{common}").exists()


def test_every_module_of_the_plugins_that_builds_is_in_the_table() -> None:
    root = Path(builtin.__file__).parent
    listed = set(builtin.TABLE.values())
    for path in root.rglob("*.py"):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        module = (
            importlib.import_module(f"spire_hw_plugins.{name}")
            if "build" in path.read_text()
            else None
        )
        if module is not None and inspect.isfunction(getattr(module, "build", None)):
            assert name in listed
