"""The entry point of `spire-hw-plugin`."""

from __future__ import annotations

import sys

from spire_hw.cli.run import run
from spire_hw_plugins.cli.commands import PROGRAM, root


def main() -> None:
    """Run the program and exit with its status."""
    sys.exit(run(root, PROGRAM))
