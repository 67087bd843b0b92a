"""Is the agent well?"""

from __future__ import annotations

import click
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from spire_hw.cli.flags import GoCommand, flag
from spire_hw.cli.output import complain
from spire_hw.cli.run import exit_code
from spire_hw.errors import SpireHwError
from spire_hw_agent.cli.connect import Workload, workload_flags


@click.command("healthcheck", cls=GoCommand, examples="spire-hw-agent healthcheck -verbose")
@flag("shallow", "Perform a less stringent check.", type=bool, default=False)
@flag("verbose", "Print what is done.", type=bool, default=False)
@workload_flags
@click.pass_context
def healthcheck(ctx: click.Context, workload: Workload, *, shallow: bool, verbose: bool) -> None:
    """Tell whether the agent is healthy; exit status 0 when it is."""
    del shallow  # upstream's flag; there is one depth
    if verbose and not workload.printer.as_json:
        click.echo("Checking agent health...")
    try:
        answer = workload.run(
            lambda session: session.channel.unary(
                "/grpc.health.v1.Health/Check",
                health_pb2.HealthCheckRequest(),
                health_pb2.HealthCheckResponse,
                timeout_s=session.timeout_s,
            )
        )
    except SpireHwError as e:
        if workload.printer.as_json:
            raise
        complain(f"Error: agent is unhealthy: {e.message}")
        ctx.exit(exit_code(e))
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    word = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    def pretty() -> None:
        if serving:
            click.echo("Agent is healthy.")
        else:
            complain(f"Error: agent is unhealthy: agent returned status {word}")

    workload.printer.message(answer, pretty)
    if not serving:
        ctx.exit(1)
