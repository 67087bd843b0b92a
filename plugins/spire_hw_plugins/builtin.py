"""The table of built-in plugins: which module makes which, loaded when first asked for.

Hosts reach plugins through here alone. Nothing is imported until its row is used, so an agent
without a TPM never loads a TPM library. `join_token` has an agent half only: the server's tokens
live in its admission.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final, cast

from spire_hw.config.schema import nearest
from spire_hw.errors import NotFoundError
from spire_hw.plugin.info import PluginKind, Side

if TYPE_CHECKING:
    from spire_hw.plugin.info import Builder

_ROOT: Final = "spire_hw_plugins"
_SERVER, _AGENT = Side.SERVER, Side.AGENT

TABLE: Final[dict[tuple[PluginKind, str, Side], str]] = {
    (PluginKind.KEY_MANAGER, "memory", _SERVER): "keymanager.memory",
    (PluginKind.KEY_MANAGER, "memory", _AGENT): "keymanager.memory",
    (PluginKind.KEY_MANAGER, "disk", _SERVER): "keymanager.disk",
    (PluginKind.KEY_MANAGER, "disk", _AGENT): "keymanager.disk",
    (PluginKind.KEY_MANAGER, "tpm", _SERVER): "keymanager.tpm",
    (PluginKind.KEY_MANAGER, "tpm", _AGENT): "keymanager.tpm",
    (PluginKind.KEY_MANAGER, "pkcs11", _SERVER): "keymanager.pkcs11",
    (PluginKind.KEY_MANAGER, "remote", _SERVER): "keymanager.remote.manager",
    (PluginKind.NODE_ATTESTOR, "join_token", _AGENT): "nodeattestor.join_token",
    (PluginKind.NODE_ATTESTOR, "tpm", _SERVER): "nodeattestor.tpm.server",
    (PluginKind.NODE_ATTESTOR, "tpm", _AGENT): "nodeattestor.tpm.agent",
    (PluginKind.NODE_ATTESTOR, "tpm_devid", _SERVER): "nodeattestor.tpm_devid.server",
    (PluginKind.NODE_ATTESTOR, "tpm_devid", _AGENT): "nodeattestor.tpm_devid.agent",
    (PluginKind.NODE_ATTESTOR, "x509pop", _SERVER): "nodeattestor.x509pop.server",
    (PluginKind.NODE_ATTESTOR, "x509pop", _AGENT): "nodeattestor.x509pop.agent",
    (PluginKind.UPSTREAM_AUTHORITY, "disk", _SERVER): "upstreamauthority.disk",
    (PluginKind.UPSTREAM_AUTHORITY, "pkcs11", _SERVER): "upstreamauthority.pkcs11",
    (PluginKind.WORKLOAD_ATTESTOR, "unix", _AGENT): "workloadattestor.unix",
}


def names(kind: PluginKind, side: Side) -> list[str]:
    """Return the names of the built-ins of a kind on one side, sorted."""
    return sorted(name for k, name, s in TABLE if (k, s) == (kind, side))


def lookup(kind: PluginKind, name: str, side: Side) -> Builder:
    """Return what builds a built-in.

    Args:
        kind: plugin kind.
        name: its label in the configuration.
        side: which host asks.

    Raises:
        NotFoundError: no such built-in on this side; the message names the closest one, or the
            side that has it.
    """
    path = TABLE.get((kind, name, side))
    if path is None:
        raise NotFoundError(_missing(kind, name, side))
    module = importlib.import_module(f"{_ROOT}.{path}")
    return cast("Builder", module.build)


def _missing(kind: PluginKind, name: str, side: Side) -> str:
    known = names(kind, side)
    head = f"no built-in {kind.value} {name[:64]!a} on the {side.value}"
    other = _AGENT if side is _SERVER else _SERVER
    if name in names(kind, other):
        return f"{head}; it exists on the {other.value} only"
    if not known:
        return f"{head}; there is none of this kind"
    return head + (nearest(name, known) or f"; there are {', '.join(known)}")
