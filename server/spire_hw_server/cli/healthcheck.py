"""Is the server well?"""

from __future__ import annotations

import click
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from spire_hw.cli.flags import GoCommand, flag
from spire_hw.cli.output import complain
from spire_hw.cli.run import exit_code
from spire_hw.errors import SpireHwError
from spire_hw_server.cli.connect import Admin, admin_flags

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]


@click.command("healthcheck", cls=GoCommand, examples="spire-hw-server healthcheck -verbose")
@flag("shallow", "Perform a less stringent check.", type=bool, default=False)
@flag("verbose", "Print what is done.", type=bool, default=False)
@admin_flags
@click.pass_context
def healthcheck(ctx: click.Context, /, admin: Admin, *, shallow: bool, verbose: bool) -> None:
    """Tell whether the server is healthy; exit status 0 when it is."""
    del shallow  # upstream's flag; there is one depth
    if verbose and not admin.printer.as_json:
        click.echo("Checking server health...")
    try:
        answer = admin.call(_HEALTH, "Check", health_pb2.HealthCheckRequest())
    except SpireHwError as e:
        if admin.printer.as_json:
            raise
        complain(f"Error: server is unhealthy: {e.message}")
        ctx.exit(exit_code(e))
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    word = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    def pretty() -> None:
        if serving:
            click.echo("Server is healthy.")
        else:
            complain(f"Error: server is unhealthy: server returned status {word}")

    admin.printer.message(answer, pretty)
    if not serving:
        ctx.exit(1)
