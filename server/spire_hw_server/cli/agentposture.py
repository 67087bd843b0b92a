"""Attested agents: what their machines showed, quarantine and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw._pb import hw_posture_pb2 as pb
from spire_hw.cli.flags import F, GoCommand, flag
from spire_hw.cli.output import count_of, rfc3339, shown, table, to_dict
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.spiffeid import SpiffeId
from spire_hw_server.cli.connect import admin_flags, id_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from spire_hw._pb import types_pb2
    from spire_hw.cli.admin import Admin, Session

_POSTURE: Final = pb.DESCRIPTOR.services_by_name["PostureAdmin"]
_LABEL_WIDTH: Final = 18
_PAGE: Final = 1000
_NEVER: Final = "never"


async def fetch_states(session: Session) -> dict[str, pb.NodePosture]:
    """Return the states of all nodes by agent ID; none from a server that knows of none."""
    found: dict[str, pb.NodePosture] = {}
    request = pb.ListStatesRequest(page_size=_PAGE)
    try:
        while True:
            page = await session.call(_POSTURE, "ListStates", request)
            found.update({node.agent_id: node for node in page.nodes})
            request.page_token = page.next_page_token
            if not request.page_token:
                return found
    except SpireHwError as e:
        if e.kind is not ErrorKind.UNIMPLEMENTED:
            raise
        return {}


async def fetch_state(session: Session, agent_id: str) -> pb.NodePosture | None:
    """Return the state of one node; None from a server that knows of none."""
    try:
        request = pb.GetStateRequest(agent_id=agent_id)
        found: pb.NodePosture = await session.call(_POSTURE, "GetState", request)
    except SpireHwError as e:
        if e.kind is not ErrorKind.UNIMPLEMENTED:
            raise
        return None
    return found


def state_rows(node: pb.NodePosture | None) -> list[tuple[str, str]]:
    """Return the rows about a state for a list of agents; none while nothing is kept."""
    if node is None or not node.since:
        return []
    rows = [("State", node.state)]
    if node.reasons:
        rows.append(("Reasons", ", ".join(node.reasons)))
    return rows


def detail_rows(node: pb.NodePosture | None) -> list[tuple[str, str]]:
    """Return all rows about one node's machine."""
    if node is None or not node.since:
        return []
    rows = [("In this state", f"since {rfc3339(node.since)}")]
    if node.message:
        rows.append(("Message", node.message))
    rows.append(("Last good", _time(node.last_good_at)))
    rows.append(("Last seen", _time(node.last_seen_at)))
    if node.policy:
        rows.append(("Policy", f"{node.policy}@{node.policy_version}"))
    rows.append(("Heartbeat stream", "open" if node.connected else "none to this server"))
    return rows


def with_state(agent: types_pb2.Agent, node: pb.NodePosture | None) -> dict[str, Any]:
    """Return an agent as plain values; what is kept of its machine among them, when anything is."""
    values = to_dict(agent)
    if node is not None and node.since:
        values["state"] = node.state
        values["posture"] = to_dict(node)
    return values


def states_of(
    agents: Iterable[types_pb2.Agent], states: Mapping[str, pb.NodePosture]
) -> list[dict[str, Any]]:
    """Return agents as plain values, with their states."""
    return [with_state(agent, states.get(id_text(agent.id))) for agent in agents]


def _time(seconds: int) -> str:
    return rfc3339(seconds) if seconds else _NEVER


def _id(text: str) -> str:
    if not text:
        raise click.UsageError("a SPIFFE ID is required")
    return SpiffeId.parse(text).text


def _record_text(record: pb.EvidenceRecord) -> str:
    rows = [
        ("Number", str(record.id)),
        ("Time", rfc3339(record.made_at)),
        ("Occasion", record.occasion),
        ("Verdict", record.verdict),
        ("State after", record.state),
    ]
    if record.policy:
        rows.append(("Policy", f"{record.policy}@{record.policy_version}"))
    if record.summary:
        rows.append(("Summary", record.summary))
    if record.evidence_sha256:
        kept = "" if record.has_document else " (not kept whole)"
        rows.append(("Evidence SHA-256", record.evidence_sha256 + kept))
    rows += [("Finding", f"{f.message} [{f.code}] -> {f.action}") for f in record.findings]
    return table(rows, _LABEL_WIDTH)


@click.command(
    "evidence",
    cls=GoCommand,
    examples="""
    spire-hw-server agent evidence spiffe://example.org/spire/agent/tpm/2f0e...c41
    spire-hw-server agent evidence spiffe://example.org/spire/agent/tpm/2f0e...c41 -number 7
    spire-hw-server agent evidence spiffe://example.org/spire/agent/tpm/2f0e...c41 -latest
    """,
)
@click.argument("spiffe_id")
@flag("number", "Print the whole evidence with this number, as JSON.", type=int, default=0)
@flag("latest", "Print the last evidence that was accepted, as JSON.", type=bool, default=False)
@flag("limit", "At most so many lines of the history; 0 for all.", type=int, default=20)
@admin_flags
def evidence(admin: Admin, spiffe_id: str, *, number: int, latest: bool, limit: int) -> None:
    """Show what an agent's machine proved and what became of it, the newest first."""
    agent_id = _id(spiffe_id)
    if number < 0 or limit < 0:
        raise click.UsageError("-number and -limit must not be negative")
    if number or latest:
        request = pb.GetEvidenceRequest(agent_id=agent_id, id=number)
        document = admin.call(_POSTURE, "GetEvidence", request).document
        click.echo(shown(document.decode()))
        return
    answer = admin.call(
        _POSTURE, "ListEvidence", pb.ListEvidenceRequest(agent_id=agent_id, page_size=limit)
    )

    def pretty() -> None:
        if not answer.records:
            click.echo("No evidence found")
            return
        more = ", and older ones" if answer.next_page_token else ""
        click.echo(f"Found {count_of(len(answer.records), 'record', 'records')}{more}:\n")
        for record in answer.records:
            click.echo(_record_text(record))

    admin.printer.message(answer, pretty)


def _by_hand(command: F) -> F:
    command = flag("comment", "Why; kept in the history.", default="")(command)
    return flag("spiffeID", "SPIFFE ID of the agent.", default="")(command)


@click.command(
    "quarantine",
    cls=GoCommand,
    examples="""
    spire-hw-server agent quarantine -spiffeID spiffe://example.org/spire/agent/tpm/2f0e...c41
    """,
)
@_by_hand
@admin_flags
def quarantine(admin: Admin, spiffe_id: str, comment: str) -> None:
    """Take an agent's identity away until `agent release`."""
    request = pb.QuarantineRequest(agent_id=_id(spiffe_id), comment=comment)
    answer = admin.call(_POSTURE, "Quarantine", request)
    admin.printer.message(answer, lambda: click.echo("Agent is in quarantine"))


@click.command(
    "release",
    cls=GoCommand,
    examples="""
    spire-hw-server agent release -spiffeID spiffe://example.org/spire/agent/tpm/2f0e...c41
    """,
)
@_by_hand
@admin_flags
def release(admin: Admin, spiffe_id: str, comment: str) -> None:
    """Lift the quarantine of an agent whose machine was looked at."""
    request = pb.ReleaseRequest(agent_id=_id(spiffe_id), comment=comment)
    answer = admin.call(_POSTURE, "Release", request)
    admin.printer.message(answer, lambda: click.echo("Agent released"))
