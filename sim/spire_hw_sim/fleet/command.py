"""`spire-hw-sim fleet`: load a server with many nodes and report how it fared."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Final

import click

from spire_hw import memory
from spire_hw.aio.tasks import Tasks
from spire_hw.bundle.document import parse_pem
from spire_hw.errors import SpireHwError
from spire_hw.hardening import harden
from spire_hw.log import Level, LogSettings, configure
from spire_hw.spiffeid import TrustDomain
from spire_hw_sim.fleet.fleet import Fleet
from spire_hw_sim.fleet.keys import FleetKeys
from spire_hw_sim.fleet.tally import show

_SERVER: Final = re.compile(r"(.+):([0-9]{1,5})")


def _server(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, int]:
    found = _SERVER.fullmatch(text)
    if found is None:
        raise click.BadParameter(f"{text} is not ADDRESS:PORT")
    return found[1], int(found[2])


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--nodes", type=click.IntRange(1, 60_000), default=100, show_default=True)
@click.option("--server", callback=_server, default="127.0.0.1:8081", show_default=True)
@click.option("--trust-domain", default="example.org", show_default=True)
@click.option("--bundle", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--at-once", type=click.IntRange(1), default=8, show_default=True)
@click.option("--duration", type=click.FloatRange(0), help="Seconds; until Ctrl-C without it.")
@click.option("--attest-within", type=float, default=600, show_default=True, help="Seconds.")
@click.option("--output", "-output", type=click.Choice(["pretty", "json"]), default="pretty")
def fleet(
    directory: Path,
    *,
    nodes: int,
    server: tuple[str, int],
    trust_domain: str,
    bundle: Path | None,
    at_once: int,
    duration: float | None,
    attest_within: float,
    output: str,
) -> None:
    """Attest many light nodes and answer the server's heartbeats; their keys are in DIRECTORY.

    Without --bundle the directory is only prepared. The server needs a `tpm` attestor with the root
    certificate printed then as `endorsement_ca_path`, and `ratelimit { attestation = false }`. It
    sets the pace of the heartbeats. --duration counts from when the last node has attested, and so
    do the heartbeats in the report. The exit status is 1 when anything failed.
    """
    keys = FleetKeys(directory)
    if bundle is None:
        click.echo(f"roots  {keys.roots}")
        return
    configure(LogSettings(level=Level.ERROR), stream=sys.stderr)
    harden()
    believed = parse_pem(TrustDomain.parse(trust_domain), bundle.read_bytes())
    crew = Fleet(keys, nodes, address=server[0], port=server[1], bundle=believed, at_once=at_once)
    problem = ""
    try:
        asyncio.run(_observe(crew, duration, attest_within))
    except KeyboardInterrupt:
        problem = "" if duration is None else "interrupted"
    except SpireHwError as e:
        problem = e.message
    told = crew.told
    if output == "json":
        click.echo(json.dumps({**told, "problem": problem}))
    else:
        for line in crew.report():
            click.echo(line)
    if problem:
        raise click.ClickException(problem)
    if told["attestations"]["failed"] or told["heartbeats"]["failed"]:
        sys.exit(1)


async def _observe(crew: Fleet, duration_s: float | None, attest_within_s: float) -> None:
    """Let a fleet run for a while, with a line about it now and then."""
    shown = Tasks(lambda name, error: None)
    shown.start("progress", show(crew.line))
    try:
        async with crew:
            await crew.attested(attest_within_s)
            # A look for garbage over all that these nodes hold would be taken for the server's slowness.
            memory.settle()
            click.echo("all nodes attested", err=True)
            await crew.observe(duration_s)
    finally:
        await shown.close()
