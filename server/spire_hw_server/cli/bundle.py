"""Bundles."""

from __future__ import annotations

import click

from spire_hw._pb import server_bundle_pb2
from spire_hw.bundle.document import encode_document, encode_pem
from spire_hw.cli.flags import GoGroup, flag
from spire_hw.rpc.convert import bundle_from_pb
from spire_hw_server.cli.connect import Admin, admin_flags

_BUNDLE = server_bundle_pb2.DESCRIPTOR.services_by_name["Bundle"]
_FORMATS = click.Choice(["pem", "spiffe"])


@click.group("bundle", cls=GoGroup)
def group() -> None:
    """The authorities of the trust domain."""


@group.command(
    "show",
    examples="""
    spire-hw-server bundle show > bootstrap.pem
    spire-hw-server bundle show -format spiffe
    """,
)
@flag(
    "format",
    "pem for X.509 authorities, spiffe for the whole document.",
    type=_FORMATS,
    default="pem",
)
@admin_flags
def show(admin: Admin, format: str) -> None:  # noqa: A002 - upstream's flag
    """Print the server's own bundle."""
    answer = admin.call(_BUNDLE, "GetBundle", server_bundle_pb2.GetBundleRequest())

    def pretty() -> None:
        bundle = bundle_from_pb(answer)
        if format == "spiffe":
            click.echo(encode_document(bundle).decode())
        else:
            click.echo(encode_pem(bundle).decode(), nl=False)

    admin.printer.message(answer, pretty)
