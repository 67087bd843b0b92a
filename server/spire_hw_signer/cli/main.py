"""The entry point of `spire-hw-signer`; imports nothing heavy before signals are taken care of."""

from __future__ import annotations

import sys

from spire_hw.cli.early import end_quietly


def main() -> None:
    """Run the program and exit with its status."""
    end_quietly(sys.argv[1:])
    from spire_hw.cli.run import run  # noqa: PLC0415 - see above
    from spire_hw_signer.cli.commands import PROGRAM, root  # noqa: PLC0415 - likewise

    sys.exit(run(root, PROGRAM))
