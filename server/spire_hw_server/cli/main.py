"""The `spire-hw-server` program: all commands, and the entry point."""

from __future__ import annotations

import sys
from importlib.metadata import version

import click

from spire_hw.cli.flags import GoGroup
from spire_hw.cli.run import run as run_program
from spire_hw_server.cli import agent, bundle, entry, healthcheck, jwt, run, token, tpm, x509

PROGRAM = "spire-hw-server"


def _version(ctx: click.Context, _param: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        click.echo(version("spire-hw"), err=True)
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
    """SPIFFE server: attests nodes by their TPM and signs SVIDs with keys in an HSM."""


root.add_command(run.run)
root.add_command(run.validate)
root.add_command(healthcheck.healthcheck)
for _group in (
    token.group,
    entry.group,
    agent.group,
    bundle.group,
    x509.group,
    jwt.group,
    tpm.group,
):
    root.add_command(_group)


def main() -> None:
    """Run the program and exit with its status."""
    sys.exit(run_program(root, PROGRAM))
