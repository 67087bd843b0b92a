"""`serve`: what a host starts; people do not."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from spire_hw.cli.flags import GoCommand, flag
from spire_hw.errors import InvalidInputError
from spire_hw.goplugin.guest import DATA_DIR
from spire_hw.plugin.info import PluginKind, Side
from spire_hw_plugins import serve as plugins

_KINDS: Final = {kind.value.lower(): kind for kind in PluginKind}


def kind_of(text: str) -> PluginKind:
    """Return the plugin kind of a word as in configuration files, in any case.

    Raises:
        InvalidInputError: no such kind.
    """
    found = _KINDS.get(text.lower())
    if found is None:
        known = ", ".join(kind.value for kind in PluginKind)
        raise InvalidInputError(f"plugin type {text[:64]!a} is unknown; use one of {known}")
    return found


@click.command(
    "serve",
    cls=GoCommand,
    help="Be one of our plugins under another host, which starts this command itself.",
    examples="""
    KeyManager "pkcs11" {
        plugin_cmd = "/opt/spire-hw/bin/spire-hw-plugin"
        plugin_args = ["serve", "KeyManager", "pkcs11"]
        plugin_data { module_path = "/usr/lib/softhsm/libsofthsm2.so" ... }
    }
    """,
)
@flag("dataDir", "Directory for what the plugin has to remember.", default=str(DATA_DIR))
@flag(
    "side",
    "Which host it is for; found out by itself where the plugin fits both.",
    type=click.Choice([side.value for side in Side]),
)
@click.argument("kind")
@click.argument("name")
@click.pass_context
def serve(ctx: click.Context, /, kind: str, name: str, side: str | None, data_dir: str) -> None:
    """Serve until the host ends it."""
    wanted = kind_of(kind)
    sides = plugins.sides_of(wanted, name)
    if side is not None:
        if Side(side) not in sides:
            raise InvalidInputError(f"{wanted.value} {name} is not for the {side}")
        sides = (Side(side),)
    ctx.exit(plugins.serve(wanted, name, sides, Path(data_dir)))
