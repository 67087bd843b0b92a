"""The `spire-hw-agent` program: all commands, and the entry point."""

from __future__ import annotations

import sys

import click

from spire_hw import __version__
from spire_hw.cli.flags import GoGroup
from spire_hw.cli.run import run as run_program
from spire_hw_agent.cli import api, healthcheck, run, tpm

PROGRAM = "spire-hw-agent"


def _version(ctx: click.Context, _param: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        click.echo(__version__, err=True)
        ctx.exit(0)


@click.group(cls=GoGroup)
@click.option(
    "-version",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Print the version and exit.",
)
def root() -> None:
    """SPIFFE agent: attests this node by its TPM and serves SVIDs to its workloads."""


root.add_command(run.run)
root.add_command(run.validate)
root.add_command(healthcheck.healthcheck)
root.add_command(api.group)
root.add_command(tpm.group)


def main() -> None:
    """Run the program and exit with its status."""
    sys.exit(run_program(root, PROGRAM))
