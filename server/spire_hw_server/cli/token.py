"""Join tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from spire_hw._pb import server_agent_pb2
from spire_hw.cli.flags import GoGroup, flag
from spire_hw_server.cli.connect import admin_flags, id_message

if TYPE_CHECKING:
    from spire_hw.cli.admin import Admin

_AGENT = server_agent_pb2.DESCRIPTOR.services_by_name["Agent"]


@click.group("token", cls=GoGroup)
def group() -> None:
    """Join tokens: let an agent in once."""


@group.command(
    "generate",
    examples="""
    spire-hw-server token generate -spiffeID spiffe://example.org/host/web-1
    spire-hw-server token generate -ttl 60 -output json
    """,
)
@flag("spiffeID", "An additional SPIFFE ID for the agent that uses the token.", default="")
@flag("ttl", "Life of the token in seconds.", type=int, default=600)
@admin_flags
def generate(admin: Admin, spiffe_id: str, ttl: int) -> None:
    """Generate a join token."""
    request = server_agent_pb2.CreateJoinTokenRequest(ttl=ttl)
    if spiffe_id:
        request.agent_id.CopyFrom(id_message(spiffe_id))
    token = admin.call(_AGENT, "CreateJoinToken", request)

    def pretty() -> None:
        click.echo(f"Token: {token.value}")
        if not spiffe_id:
            click.echo("Warning: Missing SPIFFE ID.")

    admin.printer.message(token, pretty)
