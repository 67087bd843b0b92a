"""Our built-in plugins as external plugins of another host, such as an unmodified SPIRE server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError, NotFoundError
from spire_hw.goplugin import guest
from spire_hw.plugin.info import PluginKind, Side
from spire_hw_plugins import builtin

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from spire_hw.plugin.info import HostInfo, Plugin

# The server's half is part of the server, and hosts take no external plugin of this name.
_HOSTS_OWN: Final = (PluginKind.NODE_ATTESTOR, "join_token")


def available() -> list[tuple[PluginKind, str]]:
    """Return kind and name of every built-in that can be an external plugin."""
    found = {(kind, name) for kind, name, _ in builtin.TABLE} - {_HOSTS_OWN}
    return sorted(found, key=lambda row: (row[0].value, row[1]))


def sides_of(kind: PluginKind, name: str) -> tuple[Side, ...]:
    """Return the hosts a built-in fits.

    Raises:
        NotFoundError: there is no such built-in.
        InvalidInputError: it cannot be an external plugin.
    """
    if (kind, name) == _HOSTS_OWN:
        raise InvalidInputError(f"{kind.value} {name} is part of every host, no external plugin")
    found = tuple(side for side in Side if (kind, name, side) in builtin.TABLE)
    if not found:
        known = ", ".join(f"{k.value} {n}" for k, n in available())
        raise NotFoundError(f"no built-in {kind.value} {name[:64]!a}; there are {known}")
    return found


def serve(kind: PluginKind, name: str, sides: Sequence[Side], data_dir: Path) -> int:
    """Serve a built-in to the host that started this process; return an exit status.

    Args:
        kind: plugin kind.
        name: of the built-in.
        sides: hosts it shall fit, from `sides_of`.
        data_dir: where it keeps what it has to remember, if anything.
    """

    def build(host: HostInfo) -> Plugin:
        return builtin.lookup(kind, name, host.side)(host)

    return guest.serve(kind, build, sides=sides, data_dir=data_dir)
