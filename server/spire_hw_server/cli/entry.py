"""Registration entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click
from google.protobuf import wrappers_pb2

from spire_hw._pb import server_entry_pb2, types_pb2
from spire_hw.cli.flags import F, GoGroup, flag
from spire_hw.cli.output import complain, count_of
from spire_hw.cli.run import batch_code
from spire_hw.errors import ErrorKind
from spire_hw.spiffeid import SERVER_PATH
from spire_hw_server.cli.connect import (
    MATCH_NAMES,
    admin_flags,
    id_message,
    id_text,
    selector_match,
    selector_messages,
)
from spire_hw_server.cli.entrydata import entry_text, load_entries, read_json, trust_domain_name

if TYPE_CHECKING:
    from spire_hw.cli.admin import Admin, Session

_ENTRY: Final = server_entry_pb2.DESCRIPTOR.services_by_name["Entry"]
_PAGE: Final = 500


@click.group("entry", cls=GoGroup)
def group() -> None:
    """Registration entries: who gets which identity."""


_SHAPE_FLAGS: Final = (
    flag("admin", "The SPIFFE ID may use the server's APIs.", type=bool, default=False, dest="as_admin"),
    flag(
        "disableX509SVIDPrefetch",
        "Agents fetch the X509-SVID only when it is asked for.",
        type=bool,
        default=False,
    ),
    flag("dns", "DNS name to put into SVIDs.", repeated=True),
    flag("downstream", "The entry is for a downstream server.", type=bool, default=False),
    flag("entryExpiry", "When the entry is dropped, seconds since the epoch.", type=int, default=0),
    flag("federatesWith", "Trust domain to federate with.", repeated=True),
    flag("hint", "Told to the workload, to choose among identities.", default=""),
    flag("jwtSVIDIncludeJTI", "JWT-SVIDs get an ID of their own.", type=bool, default=False),
    flag("jwtSVIDTTL", "Life of JWT-SVIDs in seconds; 0 is the server's default.", type=int, default=0),
    flag("parentID", "SPIFFE ID of the agent or node alias this entry belongs to.", default=""),
    flag("selector", "A type:value selector.", repeated=True),
    flag("spiffeID", "The SPIFFE ID that is given out.", default=""),
    flag("storeSVID", "The SVID goes to an SVIDStore plugin.", type=bool, default=False),
    flag("x509SVIDTTL", "Life of X509-SVIDs in seconds; 0 is the server's default.", type=int, default=0),
    flag("entryID", "The entry's ID.", default=""),
    flag("data", "JSON file with entries, - for standard input; other flags are ignored.", default=""),
)  # fmt: skip


def _shape_flags(command: F) -> F:
    for add in _SHAPE_FLAGS:
        command = add(command)
    return command


def _entry(values: dict[str, Any]) -> types_pb2.Entry:
    """Return the entry that flags describe."""
    if not values["selector"]:
        raise click.UsageError("at least one -selector is required")
    for name, key in (("x509SVIDTTL", "x509_svid_ttl"), ("jwtSVIDTTL", "jwt_svid_ttl")):
        if not 0 <= values[key] < 2**31:
            raise click.UsageError(f"-{name} must be a positive number of seconds")
    entry = types_pb2.Entry(
        id=values["entry_id"],
        spiffe_id=id_message(values["spiffe_id"]),
        parent_id=id_message(values["parent_id"], "parent ID"),
        selectors=selector_messages(values["selector"]),
        x509_svid_ttl=values["x509_svid_ttl"],
        jwt_svid_ttl=values["jwt_svid_ttl"],
        federates_with=[trust_domain_name(t) for t in values["federates_with"]],
        admin=values["as_admin"],
        downstream=values["downstream"],
        expires_at=values["entry_expiry"],
        dns_names=values["dns"],
        store_svid=values["store_svid"],
        hint=values["hint"],
    )
    if values["disable_x509_svid_prefetch"]:
        entry.additional_attributes.disable_x509_svid_prefetch = True
    if values["jwt_svid_include_jti"]:
        entry.additional_attributes.jwt_svid_include_jti = True
    return entry


def code_name(code: int) -> str:
    """Return a status code as Go prints it: `AlreadyExists`."""
    if code == 0:
        return "OK"
    try:
        name = ErrorKind(code).name
    except ValueError:
        return f"Code({code})"
    return "".join(word.capitalize() for word in name.split("_"))


def _report_batch(
    ctx: click.Context, admin: Admin, verb: str, answer: Any, entries: list[types_pb2.Entry]
) -> None:
    """Print the results of a batch, failed ones on standard error, and exit with their status."""
    good = [r for r in answer.results if r.status.code == 0]
    bad = [(r, e) for r, e in zip(answer.results, entries, strict=False) if r.status.code]

    def pretty() -> None:
        for result in good:
            click.echo(entry_text(result.entry))
        for result, entry in bad:
            status = f'(code: {code_name(result.status.code)}, msg: "{result.status.message}")'
            complain(f"Failed to {verb} the following entry {status}:")
            complain(entry_text(entry))
        if bad:
            complain(f"Error: {len(good)} {verb}d, {len(bad)} failed")

    admin.printer.message(answer, pretty)
    ctx.exit(batch_code(len(good), len(bad)))


@group.command(
    "create",
    examples="""
    spire-hw-server entry create -parentID spiffe://example.org/spire/agent/tpm/2f0e...c41 \\
        -spiffeID spiffe://example.org/web -selector unix:uid:1000
    spire-hw-server entry create -node -spiffeID spiffe://example.org/rack-4 \\
        -selector tpm:pub_hash:2f0e...c41
    spire-hw-server entry create -data entries.json
    """,
)
@_shape_flags
@flag(
    "node",
    "The entry names nodes, not workloads; its parent is the server.",
    type=bool,
    default=False,
)
@admin_flags
@click.pass_context
def create(ctx: click.Context, /, admin: Admin, *, node: bool, data: str, **values: Any) -> None:
    """Create registration entries."""
    if data:
        entries = load_entries(data)
    else:
        if node and values["federates_with"]:
            raise click.UsageError("node entries cannot federate")
        if node:
            own = id_message(values["spiffe_id"])
            values["parent_id"] = f"spiffe://{own.trust_domain}{SERVER_PATH}"
        entries = [_entry(values)]
    request = server_entry_pb2.BatchCreateEntryRequest(entries=entries)
    answer = admin.call(_ENTRY, "BatchCreateEntry", request)
    _report_batch(ctx, admin, "create", answer, entries)


@group.command(
    "update",
    examples="""
    spire-hw-server entry update -entryID 6f2d... -parentID spiffe://example.org/rack-4 \\
        -spiffeID spiffe://example.org/web -selector unix:uid:1001
    """,
)
@_shape_flags
@admin_flags
@click.pass_context
def update(ctx: click.Context, /, admin: Admin, *, data: str, **values: Any) -> None:
    """Replace registration entries, found by their IDs, as a whole."""
    if not data and not values["entry_id"]:
        raise click.UsageError("an -entryID is required")
    entries = load_entries(data) if data else [_entry(values)]
    request = server_entry_pb2.BatchUpdateEntryRequest(entries=entries)
    answer = admin.call(_ENTRY, "BatchUpdateEntry", request)
    _report_batch(ctx, admin, "update", answer, entries)


@group.command(
    "delete",
    examples="""
    spire-hw-server entry delete -entryID 6f2d...
    spire-hw-server entry delete -file ids.json
    """,
)
@flag("entryID", "The ID of the entry to delete.", default="")
@flag("file", 'JSON file {"ids": [...]}, - for standard input.', default="")
@admin_flags
@click.pass_context
def delete(ctx: click.Context, /, admin: Admin, entry_id: str, file: str) -> None:
    """Delete registration entries."""
    if bool(entry_id) == bool(file):
        raise click.UsageError("one of -entryID and -file is required")
    ids = _read_ids(file) if file else [entry_id]
    request = server_entry_pb2.BatchDeleteEntryRequest(ids=ids)
    answer = admin.call(_ENTRY, "BatchDeleteEntry", request)
    bad = [r for r in answer.results if r.status.code]

    def pretty() -> None:
        for result in answer.results:
            if result.status.code == 0:
                click.echo(f"Deleted entry with ID: {result.id}")
        for result in bad:
            status = f'(code: {code_name(result.status.code)}, msg: "{result.status.message}")'
            complain(f"Failed to delete entry with ID {result.id} {status}")
        if bad:
            complain(f"Error: {len(answer.results) - len(bad)} deleted, {len(bad)} failed")

    admin.printer.message(answer, pretty)
    ctx.exit(batch_code(len(answer.results) - len(bad), len(bad)))


def _read_ids(path: str) -> list[str]:
    held = read_json(path)
    ids = held.get("ids") if isinstance(held, dict) else None
    if not isinstance(ids, list) or not ids or not all(isinstance(i, str) for i in ids):
        raise click.UsageError(f'{path} must be an object with a list of text "ids"')
    return ids


_MATCH: Final = click.Choice(MATCH_NAMES)
_CONDITION_FLAGS: Final = (
    flag("downstream", "Only entries of downstream servers.", type=bool, default=False),
    flag("federatesWith", "Only entries that federate with this trust domain.", repeated=True),
    flag("hint", "Only entries with this hint.", default=""),
    flag("matchFederatesWithOn", "How trust domains are compared.", type=_MATCH, default="superset"),
    flag("matchSelectorsOn", "How selectors are compared.", type=_MATCH, default="superset"),
    flag("parentID", "Only entries of this parent.", default=""),
    flag("selector", "Only entries with this type:value selector.", repeated=True),
    flag("spiffeID", "Only entries for this SPIFFE ID.", default=""),
)  # fmt: skip


def _condition_flags(command: F) -> F:
    for add in _CONDITION_FLAGS:
        command = add(command)
    return command


def _fill(message: Any, values: dict[str, Any]) -> None:
    """Put the conditions of the flags into the filter of a list or count request."""
    if values["spiffe_id"]:
        message.by_spiffe_id.CopyFrom(id_message(values["spiffe_id"]))
    if values["parent_id"]:
        message.by_parent_id.CopyFrom(id_message(values["parent_id"]))
    if values["selector"]:
        message.by_selectors.CopyFrom(
            selector_match(values["selector"], values["match_selectors_on"])
        )
    if values["federates_with"]:
        match = types_pb2.FederatesWithMatch(
            trust_domains=[trust_domain_name(t) for t in values["federates_with"]],
            match=f"MATCH_{values['match_federates_with_on'].upper()}",
        )
        message.by_federates_with.CopyFrom(match)
    if values["hint"]:
        message.by_hint.CopyFrom(wrappers_pb2.StringValue(value=values["hint"]))
    if values["downstream"]:
        message.by_downstream.CopyFrom(wrappers_pb2.BoolValue(value=True))


@group.command(
    "show",
    examples="""
    spire-hw-server entry show
    spire-hw-server entry show -spiffeID spiffe://example.org/web
    spire-hw-server entry show -selector unix:uid:1000 -output json
    """,
)
@_condition_flags
@flag("entryID", "The ID of the entry to show; no other condition goes with it.", default="")
@admin_flags
def show(admin: Admin, entry_id: str, **values: Any) -> None:
    """Show registration entries."""
    conditions = ("spiffe_id", "parent_id", "selector", "federates_with", "hint", "downstream")
    if entry_id and any(values[key] for key in conditions):
        raise click.UsageError("-entryID cannot be combined with other conditions")
    request = server_entry_pb2.ListEntriesRequest(page_size=_PAGE)
    request.filter.SetInParent()
    _fill(request.filter, values)

    async def work(session: Session) -> server_entry_pb2.ListEntriesResponse:
        found = server_entry_pb2.ListEntriesResponse()
        if entry_id:
            one = server_entry_pb2.GetEntryRequest(id=entry_id)
            found.entries.append(await session.call(_ENTRY, "GetEntry", one))
            return found
        while True:
            page = await session.call(_ENTRY, "ListEntries", request)
            found.entries.extend(page.entries)
            request.page_token = page.next_page_token
            if not request.page_token:
                return found

    answer = admin.run(work)
    for entry in answer.entries:
        # Servers keep them in any order; whoever compares outputs wants one.
        entry.selectors.sort(key=lambda selector: (selector.type, selector.value))
    ordered = sorted(answer.entries, key=_order)
    del answer.entries[:]
    answer.entries.extend(ordered)

    def pretty() -> None:
        click.echo(f"Found {count_of(len(ordered), 'entry', 'entries')}")
        for entry in ordered:
            click.echo(entry_text(entry))

    admin.printer.message(answer, pretty)


def _order(entry: types_pb2.Entry) -> tuple[Any, ...]:
    selectors = [(s.type, s.value) for s in entry.selectors]
    return id_text(entry.spiffe_id), id_text(entry.parent_id), len(selectors), selectors, entry.id


@group.command(
    "count", examples="spire-hw-server entry count -parentID spiffe://example.org/rack-4"
)
@_condition_flags
@admin_flags
def count(admin: Admin, **values: Any) -> None:
    """Count registration entries."""
    request = server_entry_pb2.CountEntriesRequest()
    request.filter.SetInParent()
    _fill(request.filter, values)
    answer = admin.call(_ENTRY, "CountEntries", request)
    text = count_of(answer.count, "registration entry", "registration entries")
    admin.printer.message(answer, lambda: click.echo(text))
