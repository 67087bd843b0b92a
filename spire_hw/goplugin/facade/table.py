"""Which facade belongs to a plugin kind on one side; each is loaded when it is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final, cast

from spire_hw.errors import NotFoundError
from spire_hw.plugin.info import PluginKind, Side

if TYPE_CHECKING:
    from spire_hw.goplugin.facade.link import Link
    from spire_hw.rpc.service import Method

_BOTH, _AGENT, _SERVER = tuple(Side), (Side.AGENT,), (Side.SERVER,)
SIDES: Final[dict[PluginKind, tuple[Side, ...]]] = {
    PluginKind.KEY_MANAGER: _BOTH,
    PluginKind.NODE_ATTESTOR: _BOTH,
    PluginKind.WORKLOAD_ATTESTOR: _AGENT,
    PluginKind.SVID_STORE: _AGENT,
    PluginKind.UPSTREAM_AUTHORITY: _SERVER,
    PluginKind.NOTIFIER: _SERVER,
    PluginKind.BUNDLE_PUBLISHER: _SERVER,
    PluginKind.CREDENTIAL_COMPOSER: _SERVER,
}


def service_name(kind: PluginKind, side: Side) -> str:
    """Return the full name of the gRPC service of a kind, as Init answers it.

    Raises:
        NotFoundError: there are no such plugins on this side.
    """
    if side not in SIDES[kind]:
        raise NotFoundError(f"there are no {kind.value} plugins on the {side.value}")
    return f"spire.plugin.{side.value}.{kind.value.lower()}.v1.{kind.value}"


def remote(link: Link, side: Side) -> Any:
    """Return the contract of a kind over a connection to an external plugin."""
    return _module(link.kind, side).remote(link, side)


def methods(kind: PluginKind, plugin: object, side: Side) -> list[Method]:
    """Return the gRPC service of a kind over an object of its contract."""
    return cast("list[Method]", _module(kind, side).methods(plugin, side))


def _module(kind: PluginKind, side: Side) -> Any:
    service_name(kind, side)
    return importlib.import_module(f"spire_hw.goplugin.facade.{kind.value.lower()}")
