from __future__ import annotations

import importlib
import sys

import pytest

from spire_hw.errors import NotFoundError
from spire_hw.plugin.info import PluginKind, Side
from spire_hw_plugins import builtin

KM, NA, WA = PluginKind.KEY_MANAGER, PluginKind.NODE_ATTESTOR, PluginKind.WORKLOAD_ATTESTOR


@pytest.mark.parametrize("row", builtin.TABLE, ids=lambda r: f"{r[0].value}-{r[1]}-{r[2].value}")
def test_every_row_names_a_module_with_its_name_and_builder(
    row: tuple[PluginKind, str, Side],
) -> None:
    kind, name, side = row
    builder = builtin.lookup(kind, name, side)
    assert callable(builder)
    module = importlib.import_module(f"spire_hw_plugins.{builtin.TABLE[row]}")
    assert name == module.NAME


def test_names_are_listed_by_kind_and_side() -> None:
    assert {"disk", "memory", "pkcs11"} <= set(builtin.names(KM, Side.SERVER))
    assert {"disk", "memory", "tpm"} <= set(builtin.names(KM, Side.AGENT))
    assert builtin.names(NA, Side.AGENT) == ["join_token", "tpm", "tpm_devid", "x509pop"]
    assert builtin.names(WA, Side.SERVER) == []


@pytest.mark.parametrize(
    ("kind", "name", "side", "words"),
    [
        (
            KM,
            "pkcs12",
            Side.SERVER,
            "no built-in KeyManager 'pkcs12' on the server; did you mean \"pkcs11\"?",
        ),
        (KM, "pkcs11", Side.AGENT, "it exists on the server only"),
        (NA, "join_token", Side.SERVER, "it exists on the agent only"),
        (WA, "unix", Side.SERVER, "it exists on the agent only"),
        (PluginKind.NOTIFIER, "x", Side.SERVER, "there is none of this kind"),
        (KM, "zzzzzz", Side.SERVER, "there are disk, memory, pkcs11"),
        (KM, "a\n" * 100, Side.SERVER, r"'a\na\n"),
    ],
)
def test_unknown_name_is_refused_helpfully(
    kind: PluginKind, name: str, side: Side, words: str
) -> None:
    with pytest.raises(NotFoundError) as caught:
        builtin.lookup(kind, name, side)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_server_half_of_tpm_loads_no_native_library() -> None:
    builtin.lookup(NA, "tpm", Side.SERVER)
    server = sys.modules["spire_hw_plugins.nodeattestor.tpm.server"]
    assert not any("tpm2_pytss" in str(value) for value in vars(server).values())
