"""JWT-SVIDs made by hand."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spire_hw._pb import server_svid_pb2
from spire_hw.cli.flags import DURATION, GoGroup, flag
from spire_hw.cli.output import complain, rfc3339
from spire_hw_server.cli.connect import admin_flags, id_message
from spire_hw_server.cli.x509 import is_capped, seconds, write_private

if TYPE_CHECKING:
    from spire_hw.cli.admin import Admin

_SVID = server_svid_pb2.DESCRIPTOR.services_by_name["SVID"]


@click.group("jwt", cls=GoGroup)
def group() -> None:
    """JWT-SVIDs."""


@group.command(
    "mint",
    examples="""
    spire-hw-server jwt mint -spiffeID spiffe://example.org/web -audience db
    spire-hw-server jwt mint -spiffeID spiffe://example.org/web -audience db -ttl 1m -write token
    """,
)
@flag("audience", "Audience claim of the SVID.", repeated=True)
@flag("spiffeID", "SPIFFE ID of the JWT-SVID.", default="")
@flag("ttl", "TTL of the JWT-SVID.", type=DURATION, default=timedelta())
@flag("write", "File to write the token to instead of standard output.", default="")
@admin_flags
def mint(
    admin: Admin, audience: tuple[str, ...], spiffe_id: str, ttl: timedelta, write: str
) -> None:
    """Mint a JWT-SVID."""
    request = server_svid_pb2.MintJWTSVIDRequest(
        id=id_message(spiffe_id), audience=audience, ttl=seconds(ttl)
    )
    if not audience:
        raise click.UsageError("at least one -audience is required")
    answer = admin.call(_SVID, "MintJWTSVID", request)
    if is_capped(answer.svid.expires_at, ttl):
        expires = rfc3339(answer.svid.expires_at)
        complain(f'JWT-SVID lifetime was capped shorter than specified ttl; expires "{expires}"')
    if write:
        write_private(Path(write), answer.svid.token.encode())
        click.echo(f"JWT-SVID written to {write}")
        return
    admin.printer.message(answer, lambda: click.echo(answer.svid.token))
