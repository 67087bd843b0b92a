"""Bundles: the server's own, and those of foreign trust domains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from spire_hw._pb import server_bundle_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.bundle.document import encode_document, encode_pem, parse_document, parse_pem
from spire_hw.cli.files import read_input
from spire_hw.cli.flags import F, GoGroup, flag
from spire_hw.cli.output import count_of
from spire_hw.errors import InvalidInputError, NotReadyError, SpireHwError
from spire_hw.rpc.convert import bundle_from_pb, bundle_to_pb
from spire_hw.rpc.status import item_error
from spire_hw.spiffeid import TrustDomain
from spire_hw_server.cli.connect import admin_flags

if TYPE_CHECKING:
    from spire_hw.bundle.bundle import Bundle
    from spire_hw.cli.admin import Admin, Session

_BUNDLE: Final = pb.DESCRIPTOR.services_by_name["Bundle"]
_FORMATS: Final = click.Choice(["pem", "spiffe"])
_MODES: Final = click.Choice(["restrict", "dissociate", "delete"])
_PAGE: Final = 100
_MAX_BYTES: Final = 4 << 20
_RULE: Final = "*" * 40


@click.group("bundle", cls=GoGroup)
def group() -> None:
    """The authorities of the trust domain, and of those it federates with."""


def _format_flag(command: F) -> F:
    text = "pem for X.509 authorities, spiffe for the whole document."
    return flag("format", text, type=_FORMATS, default="pem")(command)


def _id_flag(command: F) -> F:
    return flag("id", "Trust domain, such as spiffe://example.org.", default="")(command)


def _trust_domain(text: str) -> TrustDomain:
    if not text:
        raise click.UsageError("a trust domain is required (-id)")
    return TrustDomain.parse(text.removeprefix("spiffe://"))


def _text(bundle: Bundle, form: str) -> str:
    return (
        f"{encode_document(bundle).decode()}\n" if form == "spiffe" else encode_pem(bundle).decode()
    )


@group.command(
    "show",
    examples="""
    spire-hw-server bundle show > bootstrap.pem
    spire-hw-server bundle show -format spiffe
    """,
)
@_format_flag
@admin_flags
def show(admin: Admin, format: str) -> None:  # noqa: A002 - upstream's flag
    """Print the server's own bundle."""
    answer = admin.call(_BUNDLE, "GetBundle", pb.GetBundleRequest())
    admin.printer.message(
        answer, lambda: click.echo(_text(bundle_from_pb(answer), format), nl=False)
    )


@group.command(
    "list",
    examples="""
    spire-hw-server bundle list
    spire-hw-server bundle list -id spiffe://partner.example -format spiffe
    """,
)
@_id_flag
@_format_flag
@admin_flags
def list_bundles(admin: Admin, id: str, format: str) -> None:  # noqa: A002 - upstream's flags
    """Print the bundles of foreign trust domains, or of one."""
    if id:
        request = pb.GetFederatedBundleRequest(trust_domain=_trust_domain(id).name)
        one = admin.call(_BUNDLE, "GetFederatedBundle", request)
        admin.printer.message(one, lambda: click.echo(_text(bundle_from_pb(one), format), nl=False))
        return
    answer = admin.run(_list)

    def pretty() -> None:
        bundles = [bundle_from_pb(message) for message in answer.bundles]
        texts = [f"{_RULE}\n* {b.trust_domain}\n{_RULE}\n{_text(b, format)}" for b in bundles]
        click.echo("\n".join(texts), nl=False)

    admin.printer.message(answer, pretty)


async def _list(session: Session) -> pb.ListFederatedBundlesResponse:
    found = pb.ListFederatedBundlesResponse()
    request = pb.ListFederatedBundlesRequest(page_size=_PAGE)
    while True:
        page = await session.call(_BUNDLE, "ListFederatedBundles", request)
        found.bundles.extend(page.bundles)
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


@group.command(
    "set",
    examples="""
    spire-hw-server bundle set -id spiffe://partner.example -path partner.pem
    spire-hw-server bundle set -id partner.example -format spiffe < partner.json
    """,
)
@_id_flag
@flag("path", "File with the bundle; standard input without it.", default="")
@_format_flag
@admin_flags
def set_bundle(admin: Admin, id: str, path: str, format: str) -> None:  # noqa: A002 - upstream's flags
    """Store the bundle of a foreign trust domain, in place of what is there."""
    trust_domain = _trust_domain(id)
    parse = parse_document if format == "spiffe" else parse_pem
    bundle = parse(trust_domain, _read(path))
    request = pb.BatchSetFederatedBundleRequest(bundle=[bundle_to_pb(bundle)])
    answer = admin.call(_BUNDLE, "BatchSetFederatedBundle", request)
    _check(answer.results[0].status, f"cannot set the bundle of {trust_domain}")
    admin.printer.message(answer, lambda: click.echo("bundle set."))


def _read(path: str) -> bytes:
    try:
        return read_input(path or "-", _MAX_BYTES)
    except NotReadyError as e:
        raise InvalidInputError(e.message) from e


@group.command(
    "delete",
    examples="""
    spire-hw-server bundle delete -id spiffe://partner.example
    spire-hw-server bundle delete -id spiffe://partner.example -mode dissociate
    """,
)
@_id_flag
@flag(
    "mode",
    "When entries federate with it: restrict fails, dissociate detaches them, delete deletes them.",
    type=_MODES,
    default="restrict",
)
@admin_flags
def delete(admin: Admin, id: str, mode: str) -> None:  # noqa: A002 - upstream's flag
    """Delete the bundle of a foreign trust domain."""
    trust_domain = _trust_domain(id)
    request = pb.BatchDeleteFederatedBundleRequest(
        trust_domains=[trust_domain.name],
        mode=mode.upper(),
    )
    answer = admin.call(_BUNDLE, "BatchDeleteFederatedBundle", request)
    _check(answer.results[0].status, f"cannot delete the bundle of {trust_domain}")
    admin.printer.message(answer, lambda: click.echo("bundle deleted."))


def _check(status: types_pb2.Status, what: str) -> None:
    error = item_error(status)
    if error is not None:
        raise SpireHwError(f"{what}: {error.message}", kind=error.kind) from error


@group.command("count", examples="spire-hw-server bundle count")
@admin_flags
def count(admin: Admin) -> None:
    """Count bundles, the server's own included."""
    answer = admin.call(_BUNDLE, "CountBundles", pb.CountBundlesRequest())
    admin.printer.message(answer, lambda: click.echo(count_of(answer.count, "bundle", "bundles")))
