"""TPMs that may attest: enrolled by the hash of their endorsement key, or of a known maker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from spire_hw._pb import hw_admin_pb2
from spire_hw.cli.flags import GoGroup, flag
from spire_hw.cli.output import complain, count_of, epoch, relative, table
from spire_hw.cli.run import batch_code
from spire_hw.clock import SystemClock
from spire_hw.errors import AlreadyExistsError, InvalidInputError, NotFoundError
from spire_hw_server.cli import tpm_ca, tpm_enroll
from spire_hw_server.cli.connect import admin_flags
from spire_hw_server.cli.eksource import normalise_hash

if TYPE_CHECKING:
    from spire_hw.cli.admin import Admin, Session

_TPM: Final = hw_admin_pb2.DESCRIPTOR.services_by_name["Tpm"]
_LABEL_WIDTH: Final = 18
_PAGE: Final = 1000


@click.group("tpm", cls=GoGroup)
def group() -> None:
    """TPMs that may attest: enrolled ones, and their makers' CAs."""


group.add_command(tpm_ca.group)
group.add_command(tpm_enroll.enroll)


def _hashes(given: tuple[str, ...]) -> list[str]:
    if not given:
        raise click.UsageError("an endorsement key hash is required")
    try:
        return list(dict.fromkeys(normalise_hash(text) for text in given))
    except InvalidInputError as e:
        raise click.UsageError(e.message) from e


@group.command(
    "allow",
    examples="""
    spire-hw-server tpm allow 2f0e...c41 -comment "rack 4, web-1"
    """,
)
@click.argument("hashes", nargs=-1, metavar="HASH...")
@flag("comment", "Free text kept with the hash.", default="")
@flag("owner", "Who answers for the machine.", default="")
@admin_flags
def allow(admin: Admin, hashes: tuple[str, ...], comment: str, owner: str) -> None:
    """Let TPMs attest; enrolling one twice is no error."""
    wanted = _hashes(hashes)

    async def work(session: Session) -> hw_admin_pb2.ListEksResponse:
        done = hw_admin_pb2.ListEksResponse()
        for ek_hash in wanted:
            request = hw_admin_pb2.AllowEkRequest(ek_hash=ek_hash, comment=comment, owner=owner)
            try:
                done.eks.append(await session.call(_TPM, "AllowEk", request))
            except AlreadyExistsError:
                complain(f"TPM {ek_hash} was enrolled before.")
                done.eks.append(hw_admin_pb2.EnrolledEk(ek_hash=ek_hash))
        return done

    answer = admin.run(work)

    def pretty() -> None:
        for ek in answer.eks:
            click.echo(f"Allowed TPM with EK hash: {ek.ek_hash}")

    admin.printer.message(answer, pretty)


@group.command("deny", examples="spire-hw-server tpm deny 2f0e...c41")
@click.argument("hashes", nargs=-1, metavar="HASH...")
@admin_flags
@click.pass_context
def deny(ctx: click.Context, /, admin: Admin, hashes: tuple[str, ...]) -> None:
    """Take TPMs off the list; agents keep their SVIDs until they expire (see `agent evict`)."""
    wanted = _hashes(hashes)

    async def work(session: Session) -> tuple[list[str], list[str]]:
        denied, missing = [], []
        for ek_hash in wanted:
            try:
                await session.call(_TPM, "DenyEk", hw_admin_pb2.DenyEkRequest(ek_hash=ek_hash))
                denied.append(ek_hash)
            except NotFoundError:
                missing.append(ek_hash)
        return denied, missing

    denied, missing = admin.run(work)
    if missing and not denied:
        raise NotFoundError(f"not enrolled: {', '.join(missing)}")

    def pretty() -> None:
        for ek_hash in denied:
            click.echo(f"Denied TPM with EK hash: {ek_hash}")
        for ek_hash in missing:
            complain(f"Error: TPM {ek_hash} is not enrolled")

    admin.printer.value({"denied": denied, "not_found": missing}, pretty)
    ctx.exit(batch_code(len(denied), len(missing)))


@group.command(
    "list",
    examples="""
    spire-hw-server tpm list
    spire-hw-server tpm list -field eks.0.ek_hash
    """,
)
@admin_flags
def list_eks(admin: Admin) -> None:
    """List enrolled TPMs."""

    async def work(session: Session) -> hw_admin_pb2.ListEksResponse:
        found = hw_admin_pb2.ListEksResponse()
        request = hw_admin_pb2.ListEksRequest(page_size=_PAGE)
        while True:
            page = await session.call(_TPM, "ListEks", request)
            found.eks.extend(page.eks)
            request.page_token = page.next_page_token
            if not request.page_token:
                return found

    answer = admin.run(work)

    def pretty() -> None:
        if not answer.eks:
            click.echo("No TPMs are enrolled")
            return
        click.echo(f"Found {count_of(len(answer.eks), 'enrolled TPM', 'enrolled TPMs')}:\n")
        now = SystemClock().now()
        for ek in answer.eks:
            rows = [("EK hash", ek.ek_hash)]
            rows += [("Comment", ek.comment)] if ek.comment else []
            rows += [("Owner", ek.owner)] if ek.owner else []
            rows += [("Enrolled", relative(epoch(ek.created_at), now))] if ek.created_at else []
            click.echo(table(rows, _LABEL_WIDTH))

    admin.printer.message(answer, pretty)
