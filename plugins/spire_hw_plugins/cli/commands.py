"""All commands of `spire-hw-plugin`."""

from __future__ import annotations

from spire_hw import __version__
from spire_hw.cli.program import root_group
from spire_hw_plugins.cli import check, install, serve

PROGRAM = "spire-hw-plugin"

root = root_group("Plugins of spire-hw for SPIRE, and a test of any external plugin.", __version__)
root.add_command(serve.serve)
root.add_command(install.install)
root.add_command(check.check)
