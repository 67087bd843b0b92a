"""Attested agents."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import click
from google.protobuf import wrappers_pb2

from spire_hw._pb import server_agent_pb2, types_pb2
from spire_hw.cli.flags import DURATION, F, GoGroup, flag
from spire_hw.cli.output import complain, count_of, epoch, go_time, table
from spire_hw.cli.run import batch_code
from spire_hw.clock import SystemClock
from spire_hw.errors import SpireHwError
from spire_hw_server.cli import agentposture
from spire_hw_server.cli.connect import (
    MATCH_NAMES,
    admin_flags,
    id_message,
    id_text,
    selector_match,
)

if TYPE_CHECKING:
    from spire_hw._pb.hw_posture_pb2 import NodePosture
    from spire_hw.cli.admin import Admin, Session

_AGENT: Final = server_agent_pb2.DESCRIPTOR.services_by_name["Agent"]
_LABEL_WIDTH: Final = 18
_PAGE: Final = 1000
# As upstream has it, these conditions take a value: `-banned true` and `-banned=true`, never alone.
_EITHER: Final = click.Choice(["true", "false"])


@click.group("agent", cls=GoGroup)
def group() -> None:
    """Attested agents."""


def _filter_flags(command: F) -> F:
    for add in (
        flag("attestationType", "Only agents attested this way, such as tpm.", default=""),
        flag("banned", "Only agents that are banned, or are not.", type=_EITHER),
        flag("canReattest", "Only agents that can attest again, or cannot.", type=_EITHER),
        flag("expiresBefore", "Only agents whose SVID expires before this time.", default=""),
        flag(
            "matchSelectorsOn",
            "How selectors are compared.",
            type=click.Choice(MATCH_NAMES),
            default="superset",
        ),
        flag("selector", "Only agents with this type:value selector.", repeated=True),
    ):
        command = add(command)
    return command


def _fill(
    message: Any,
    *,
    attestation_type: str,
    banned: str | None,
    can_reattest: str | None,
    expires_before: str,
    match_selectors_on: str,
    selector: tuple[str, ...],
) -> None:
    """Put the conditions of the flags into the filter of a list or count request."""
    message.by_attestation_type = attestation_type
    message.by_expires_before = expires_before
    if banned is not None:
        message.by_banned.CopyFrom(wrappers_pb2.BoolValue(value=banned == "true"))
    if can_reattest is not None:
        wanted = wrappers_pb2.BoolValue(value=can_reattest == "true")
        message.by_can_reattest.CopyFrom(wanted)
    if selector:
        message.by_selector_match.CopyFrom(selector_match(selector, match_selectors_on))


async def _list(
    session: Session, request: server_agent_pb2.ListAgentsRequest
) -> server_agent_pb2.ListAgentsResponse:
    found = server_agent_pb2.ListAgentsResponse()
    request.page_size = _PAGE
    while True:
        page = await session.call(_AGENT, "ListAgents", request)
        found.agents.extend(page.agents)
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


@group.command(
    "list",
    examples="""
    spire-hw-server agent list
    spire-hw-server agent list -attestationType tpm -banned=false
    spire-hw-server agent list -selector tpm:pub_hash:2f0e...c41 -output json
    """,
)
@_filter_flags
@admin_flags
def list_agents(admin: Admin, **conditions: Any) -> None:
    """List attested agents."""
    request = server_agent_pb2.ListAgentsRequest()
    request.filter.SetInParent()
    _fill(request.filter, **conditions)

    async def work(session: Session) -> tuple[list[types_pb2.Agent], dict[str, NodePosture]]:
        found = (await _list(session, request)).agents
        return list(found), await agentposture.fetch_states(session)

    agents, states = admin.run(work)

    def pretty() -> None:
        if not agents:
            click.echo("No attested agents found")
            return
        click.echo(f"Found {count_of(len(agents), 'attested agent', 'attested agents')}:\n")
        for agent in agents:
            click.echo(agent_text(agent, states.get(id_text(agent.id))))

    values = {"agents": agentposture.states_of(agents, states), "next_page_token": ""}
    admin.printer.value(values, pretty)


@group.command("count", examples="spire-hw-server agent count -attestationType tpm")
@_filter_flags
@admin_flags
def count(admin: Admin, **conditions: Any) -> None:
    """Count attested agents."""
    request = server_agent_pb2.CountAgentsRequest()
    request.filter.SetInParent()
    _fill(request.filter, **conditions)
    answer = admin.call(_AGENT, "CountAgents", request)
    text = count_of(answer.count, "attested agent", "attested agents")
    admin.printer.message(answer, lambda: click.echo(text))


def _id_flag(command: F) -> F:
    return flag("spiffeID", "SPIFFE ID of the agent.", default="")(command)


@group.command(
    "show",
    examples="spire-hw-server agent show -spiffeID spiffe://example.org/spire/agent/tpm/2f0e...c41",
)
@_id_flag
@admin_flags
def show(admin: Admin, spiffe_id: str) -> None:
    """Show one attested agent."""
    request = server_agent_pb2.GetAgentRequest(id=id_message(spiffe_id))

    async def work(session: Session) -> tuple[types_pb2.Agent, NodePosture | None]:
        found = await session.call(_AGENT, "GetAgent", request)
        return found, await agentposture.fetch_state(session, id_text(found.id))

    agent, state = admin.run(work)

    def pretty() -> None:
        click.echo("Found an attested agent given its SPIFFE ID\n")
        click.echo(agent_text(agent, state) + table(agentposture.detail_rows(state), _LABEL_WIDTH))
        rows = [("Selectors", f"{s.type}:{s.value}") for s in agent.selectors]
        click.echo(table(rows, _LABEL_WIDTH), nl=False)

    admin.printer.value(agentposture.with_state(agent, state), pretty)


@group.command(
    "evict",
    examples="spire-hw-server agent evict -spiffeID spiffe://example.org/spire/agent/tpm/2f0e...c41",
)
@_id_flag
@admin_flags
def evict(admin: Admin, spiffe_id: str) -> None:
    """Forget an agent; it may attest again."""
    request = server_agent_pb2.DeleteAgentRequest(id=id_message(spiffe_id))
    answer = admin.call(_AGENT, "DeleteAgent", request)
    admin.printer.message(answer, lambda: click.echo("Agent evicted successfully"))


@group.command(
    "ban",
    examples="spire-hw-server agent ban -spiffeID spiffe://example.org/spire/agent/tpm/2f0e...c41",
)
@_id_flag
@admin_flags
def ban(admin: Admin, spiffe_id: str) -> None:
    """Refuse an agent from now on; `agent evict` lets it attest again."""
    request = server_agent_pb2.BanAgentRequest(id=id_message(spiffe_id))
    answer = admin.call(_AGENT, "BanAgent", request)
    admin.printer.message(answer, lambda: click.echo("Agent banned successfully"))


@group.command(
    "purge",
    examples="""
    spire-hw-server agent purge -dryRun
    spire-hw-server agent purge -expiredFor 48h
    """,
)
@flag("dryRun", "Print what would be purged and do nothing.", type=bool, default=False)
@flag(
    "expiredFor",
    "How long the agent's SVID must have been expired.",
    type=DURATION,
    default=timedelta(hours=720),
)
@admin_flags
@click.pass_context
def purge(ctx: click.Context, /, admin: Admin, *, dry_run: bool, expired_for: timedelta) -> None:
    """Forget agents that expired long ago and can attest again."""
    before = SystemClock().now() - expired_for

    async def work(session: Session) -> list[dict[str, Any]]:
        request = server_agent_pb2.ListAgentsRequest(
            filter={"by_can_reattest": wrappers_pb2.BoolValue(value=True)},
            output_mask=types_pb2.AgentMask(x509svid_expires_at=True),
        )
        found = (await _list(session, request)).agents
        old = [agent for agent in found if epoch(agent.x509svid_expires_at) < before]
        return [await _purge_one(session, agent, dry_run=dry_run) for agent in old]

    results = admin.run(work)
    admin.printer.value(
        {"expired_agents": results}, lambda: _print_purged(results, dry_run=dry_run)
    )
    failed = sum("error" in result for result in results)
    ctx.exit(batch_code(len(results) - failed, failed))


async def _purge_one(session: Session, agent: types_pb2.Agent, *, dry_run: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"agent_id": id_text(agent.id), "deleted": False}
    if dry_run:
        return result
    try:
        await session.call(_AGENT, "DeleteAgent", server_agent_pb2.DeleteAgentRequest(id=agent.id))
        result["deleted"] = True
    except SpireHwError as e:
        result["error"] = e.message
    return result


def _print_purged(results: list[dict[str, Any]], *, dry_run: bool) -> None:
    if not results:
        click.echo("No agents to purge.")
        return
    click.echo(f"Found {count_of(len(results), 'expired agent', 'expired agents')}\n")
    done = [r for r in results if r["deleted"] or dry_run]
    failed = [r for r in results if "error" in r]
    if done:
        click.echo("Agents that can be purged:" if dry_run else "Agents purged:")
        for result in done:
            click.echo(table([("SPIFFE ID", result["agent_id"])], _LABEL_WIDTH), nl=False)
    if failed:
        complain("Agents not purged:")
        for result in failed:
            rows = [("SPIFFE ID", result["agent_id"]), ("Error", result["error"])]
            complain(table(rows, _LABEL_WIDTH).rstrip("\n"))


for _command in (agentposture.evidence, agentposture.quarantine, agentposture.release):
    group.add_command(_command)


def agent_text(agent: types_pb2.Agent, state: NodePosture | None = None) -> str:
    """Return the lines about an agent, in upstream's layout."""
    rows = [
        ("SPIFFE ID", id_text(agent.id)),
        ("Attestation type", agent.attestation_type),
        ("Expiration time", go_time(agent.x509svid_expires_at)),
        ("Banned", "true") if agent.banned else ("Serial number", agent.x509svid_serial_number),
        ("Can re-attest", "true" if agent.can_reattest else "false"),
    ]
    if agent.agent_version:
        rows.append(("Agent version", agent.agent_version))
    rows += agentposture.state_rows(state)
    return table(rows, _LABEL_WIDTH)
