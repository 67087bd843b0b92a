"""Postures from end to end: real sockets, a real store, machines whose TPMs are emulated."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw._pb import hw_posture_pb2 as pb
from spire_hw._pb import server_agent_pb2, server_entry_pb2
from spire_hw.errors import DeniedError, DeniedReason, ErrorKind, NotReadyError, SpireHwError
from spire_hw.posture.document import decode_evidence
from spire_hw.posture.verdict import NodeState
from spire_hw_sim.servers import AGENT, ENTRY, TIMEOUT_S
from spire_hw_sim.watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from spire_hw_sim.beater import Beater
    from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio

MINUTE = timedelta(minutes=1)


@pytest_asyncio.fixture
async def site(short_dir: Path, clock: SimClock) -> AsyncIterator[Watch]:
    made = Watch(short_dir, clock)
    yield made
    await made.close()


async def sync(beater: Beater) -> None:
    async with await beater.agent.channel() as channel:
        path = ENTRY + "GetAuthorizedEntries"
        answer = server_entry_pb2.GetAuthorizedEntriesResponse
        await channel.unary(
            path, server_entry_pb2.GetAuthorizedEntriesRequest(), answer, timeout_s=TIMEOUT_S
        )


async def refusal(work: Awaitable[object]) -> SpireHwError:
    with pytest.raises(SpireHwError) as caught:
        await work
    return caught.value


async def eventually(site: Watch, is_so: Callable[[], Awaitable[bool]]) -> None:
    """Let time pass until something has happened in the background."""
    async with asyncio.timeout(TIMEOUT_S):
        while not await is_so():
            await site.pass_time(timedelta(seconds=1))
            await asyncio.sleep(0.01)


async def test_attestation_stores_what_was_proved(site: Watch) -> None:
    await site.start()
    beater = await site.machine()
    site.allow(beater)
    await site.server.reconfigure()
    await beater.attest()
    state = await site.state(beater)
    assert (state.state, state.policy, state.policy_version) == ("attested", "web", 1)
    assert state.last_good_at == state.last_seen_at == int(site.clock.now().timestamp())
    (record,) = await site.history(beater)
    assert (record.occasion, record.verdict, record.state) == ("attestation", "accept", "attested")
    request = pb.GetEvidenceRequest(agent_id=beater.id.text, id=record.id)
    one = await site.admin("GetEvidence", request, pb.GetEvidenceResponse)
    evidence = decode_evidence(one.document)
    assert evidence.pcrs["sha256", 4] == beater.node.tpm.pcrs["sha256", 4]
    assert evidence.counters is not None
    assert evidence.counters.reset_count == beater.node.tpm.reset_count
    latest = await site.admin(
        "GetEvidence", pb.GetEvidenceRequest(agent_id=beater.id.text), pb.GetEvidenceResponse
    )
    assert decode_evidence(latest.document).pcrs == evidence.pcrs


async def test_good_heartbeats_leave_times_and_nothing_else(site: Watch) -> None:
    await site.start()
    beater = await site.known()
    async with site.streaming(beater) as stream:
        for _ in range(3):
            said = await site.beat(stream)
            assert (said.state, said.reasons, said.reattest) == (NodeState.ATTESTED, (), False)
            assert said.next_s is not None
            assert 53 < said.next_s < 67
        assert (await site.state(beater)).connected
    state = await site.state(beater)
    assert state.last_good_at == int(site.clock.now().timestamp())
    assert len(await site.history(beater)) == 1
    await site.stop()
    await site.start()
    assert (await site.state(beater)).last_good_at == state.last_good_at


async def test_drift_takes_the_identity_away_and_the_way_back_is_open(site: Watch) -> None:
    await site.start()
    beater = await site.machine()
    site.allow(beater)
    await site.server.reconfigure()
    await beater.attest()
    good = dict(beater.node.tpm.pcrs)
    async with site.streaming(beater) as stream:
        beater.reboot()
        beater.measure(4, b"evil")
        said = await site.beat(stream)
        assert said.state is NodeState.QUARANTINED
        assert said.reasons == ("pcr_mismatch",)
        denied = await refusal(sync(beater))
        assert isinstance(denied, DeniedError)
        assert denied.reason is None
        assert denied.message == "agent is in quarantine: pcr_mismatch"
        assert (await site.state(beater)).state == "quarantined"
        again = await refusal(beater.attest())
        assert again.kind is ErrorKind.PERMISSION_DENIED
        assert "node: quarantined: pcr_mismatch" in again.message
        assert (await site.beat(stream)).state is NodeState.QUARANTINED
        assert [r.occasion for r in await site.history(beater)] == ["heartbeat", "attestation"]

        beater.reboot()
        beater.node.tpm.pcrs = good
        said = await site.beat(stream)
        assert (said.state, said.reasons, said.reattest) == (NodeState.ATTESTED, (), True)
        await sync(beater)
    assert (await site.state(beater)).state == "attested"


async def test_quarantined_node_heals_by_attesting(site: Watch) -> None:
    await site.start()
    beater = await site.machine()
    site.allow(beater)
    await site.server.reconfigure()
    await beater.attest()
    good = dict(beater.node.tpm.pcrs)
    await site.pass_time(MINUTE, beater)
    beater.reboot()
    beater.measure(4, b"evil")
    await refusal(beater.attest())
    assert (await site.state(beater)).state == "quarantined"
    beater.reboot()
    beater.node.tpm.pcrs = good
    await site.pass_time(MINUTE, beater)
    await beater.attest()
    await sync(beater)
    assert (await site.state(beater)).state == "attested"


async def test_pcr_that_changes_without_a_reset_bans(site: Watch) -> None:
    await site.start()
    beater = await site.known()
    async with site.streaming(beater) as stream:
        beater.measure(7, b"evil")
        assert (await site.beat(stream)).state is NodeState.BANNED
        ended = await refusal(stream.state())
        assert isinstance(ended, DeniedError)
        assert ended.reason is DeniedReason.AGENT_BANNED
    await site.stop()
    await site.start()
    beater.port = beater.agent.port = site.server.port
    denied = await refusal(beater.attest())
    assert denied.kind is ErrorKind.PERMISSION_DENIED
    state = await site.state(beater)
    assert (state.state, list(state.reasons)) == ("banned", ["pcr_changed_without_reset"])


async def test_evicting_a_banned_node_forgets_its_past(site: Watch) -> None:
    await site.start()
    beater = await site.known()
    async with site.streaming(beater) as stream:
        beater.node.tpm.reset_count -= 1
        assert (await site.beat(stream)).reasons == ("tpm_replaced",)
    await refusal(beater.attest())
    request = server_agent_pb2.DeleteAgentRequest(
        id={"trust_domain": "example.org", "path": beater.id.path}
    )
    await site.operator.channel.unary(
        AGENT + "DeleteAgent", request, pb.NodePosture, timeout_s=TIMEOUT_S
    )
    await beater.attest()
    assert (await site.state(beater)).state == "attested"
    (record,) = await site.history(beater)
    assert record.id == 1
    async with site.streaming(beater) as stream:
        assert (await site.beat(stream)).reasons == ()


async def test_state_changes_are_pushed_to_a_resting_stream(site: Watch) -> None:
    await site.start()
    beater = await site.known()
    async with site.streaming(beater) as stream:
        shown = await site.by_hand("Quarantine", beater, "looks odd")
        assert (shown.state, shown.by_operator) == ("quarantined", True)
        said = await stream.state()
        assert (said.state, said.reasons) == (NodeState.QUARANTINED, ("operator",))
        # Good evidence does not lift it, in whatever way it comes.
        assert (await site.beat(stream)).state is NodeState.QUARANTINED
        again = await refusal(beater.attest())
        assert again.message.endswith("node: quarantined: operator")
        await site.by_hand("Release", beater)
        assert (await stream.state()).state is NodeState.ATTESTED
        await sync(beater)
        again = await refusal(site.by_hand("Release", beater))
        assert again.kind is ErrorKind.FAILED_PRECONDITION
    occasions = [r.occasion for r in await site.history(beater)]
    assert occasions == ["operator", "operator", "attestation"]


async def test_ban_and_eviction_by_an_operator_end_the_stream(site: Watch) -> None:
    await site.start()
    banned, evicted = await site.known(), await site.known()
    async with site.streaming(banned) as one, site.streaming(evicted) as other:
        for method, beater, kind in (
            ("BanAgent", banned, server_agent_pb2.BanAgentRequest),
            ("DeleteAgent", evicted, server_agent_pb2.DeleteAgentRequest),
        ):
            request = kind(id={"trust_domain": "example.org", "path": beater.id.path})
            await site.operator.channel.unary(
                AGENT + method, request, pb.NodePosture, timeout_s=TIMEOUT_S
            )
        assert (await one.state()).state is NodeState.BANNED
        assert getattr(await refusal(one.state()), "reason", None) is DeniedReason.AGENT_BANNED
        reason = getattr(await refusal(other.state()), "reason", None)
        assert reason is DeniedReason.AGENT_NOT_ATTESTED
    assert (await site.state(banned)).state == "banned"


async def test_new_svid_and_new_stream_end_the_old_stream_well(site: Watch) -> None:
    await site.start()
    beater = await site.known()
    async with site.streaming(beater) as old, site.streaming(beater) as new:
        assert await old.raw.receive() is None
        await beater.attest()
        assert await new.raw.receive() is None


async def test_server_that_goes_down_ends_resting_streams_well(site: Watch) -> None:
    await site.start()
    beater = await site.known()
    async with site.streaming(beater) as stream:
        said, _ = await asyncio.gather(stream.raw.receive(), site.stop())
    assert said is None


async def test_silent_node_becomes_stale_also_after_a_restart(site: Watch) -> None:
    await site.start()
    beater = await site.known()
    await site.pass_time(2 * MINUTE)
    assert (await site.state(beater)).state == "attested"
    await site.stop()
    await site.pass_time(10 * MINUTE)
    await site.start()
    beater.port = beater.agent.port = site.server.port
    # Nobody could show anything while the server was away.
    await site.pass_time(timedelta(minutes=2))
    assert (await site.state(beater)).state == "attested"
    await site.pass_time(timedelta(minutes=2))

    async def is_stale() -> bool:
        return (await site.state(beater)).state == "stale"

    await eventually(site, is_stale)
    assert list((await site.state(beater)).reasons) == ["stale"]
    await sync(beater)
    beater.tick(1000)
    async with site.streaming(beater) as stream:
        assert (await site.beat(stream)).state is NodeState.ATTESTED


async def test_silent_node_can_be_cut_off(site: Watch) -> None:
    site.settings = 'stale_action = "quarantine" stale_after = 2'
    await site.start()
    beater = await site.known()
    await site.pass_time(timedelta(minutes=3), beater)

    async def is_cut_off() -> bool:
        return (await site.state(beater)).state == "quarantined"

    await eventually(site, is_cut_off)
    assert "stale" in (await refusal(sync(beater))).message
    async with site.streaming(beater) as stream:
        assert (await site.beat(stream)).state is NodeState.ATTESTED
    await sync(beater)


async def test_changed_policy_is_held_against_stored_evidence_at_once(site: Watch) -> None:
    await site.start()
    beater, other = await site.machine(), await site.machine()
    other.measure(4, b"another kernel")
    site.allow(beater, other)
    await site.server.reconfigure()
    await beater.attest()
    await other.attest()
    async with site.streaming(beater) as stream:
        site.allow(other)
        await site.server.reconfigure()
        said = await stream.state()
        assert (said.state, said.reasons) == (NodeState.QUARANTINED, ("pcr_mismatch",))
        assert (await site.state(other)).state == "attested"
        assert (await site.history(beater))[0].occasion == "policy_update"
        site.allow(beater, other)
        await site.server.reconfigure()
        # It is asked soon, not a minute later.
        said = await site.beat(stream, timedelta(seconds=11))
        assert (said.state, said.reattest) == (NodeState.ATTESTED, True)
    await sync(beater)


async def test_policies_changed_while_the_server_was_away_count(site: Watch) -> None:
    await site.start()
    beater = await site.machine()
    site.allow(beater)
    await site.server.reconfigure()
    await beater.attest()
    await site.stop()
    other = replace(beater)
    other.measure(4, b"x")
    site.allow(other)
    await site.start()

    async def is_cut_off() -> bool:
        return (await site.state(beater)).state == "quarantined"

    await eventually(site, is_cut_off)


async def test_where_policies_are_required_deleting_the_last_lets_nobody_in(site: Watch) -> None:
    site.settings = "require_policy = true"
    await site.start()
    beater = await site.machine()
    assert "no_policy" in (await refusal(beater.attest())).message
    site.allow(beater)
    await site.server.reconfigure()
    await beater.attest()
    site.forget_policy()
    await site.server.reconfigure()
    assert "no_policy" in (await refusal(beater.attest())).message


async def test_node_without_a_policy_is_refused_and_not_stored(site: Watch) -> None:
    await site.start()
    beater = await site.machine()
    site.allow(beater, rules='nodes { selectors = ["manufacturer:id:00000000"] }')
    await site.server.reconfigure()
    denied = await refusal(beater.attest())
    assert denied.kind is ErrorKind.FAILED_PRECONDITION
    assert "no_policy" in denied.message
    with pytest.raises(SpireHwError):
        await site.state(beater)


async def test_newer_policy_is_applied_to_an_answer_that_was_on_its_way(site: Watch) -> None:
    await site.start()
    beater, other = await site.machine(), await site.machine()
    other.measure(4, b"another kernel")
    site.allow(beater)
    await site.server.reconfigure()

    async def between() -> None:
        site.allow(other)
        await site.server.reconfigure()

    beater.between = between
    denied = await refusal(beater.attest())
    assert "pcr_mismatch" in denied.message
    assert denied.kind is ErrorKind.PERMISSION_DENIED


async def test_reset_without_a_boot_holds_until_the_next_boot(site: Watch) -> None:
    site.settings = 'min_boot_time = "2m"'
    await site.start()
    beater = await site.known()
    async with site.streaming(beater) as stream:
        beater.reboot()
        said = await site.beat(stream)
        assert (said.state, said.reasons) == (
            NodeState.QUARANTINED,
            ("tpm_reset_without_reboot",),
        )
        for _ in range(3):
            assert (await site.beat(stream)).state is NodeState.QUARANTINED
        beater.reboot()
        assert (await site.beat(stream)).state is NodeState.ATTESTED


async def test_accepted_deviation_is_shown_until_the_node_attests_anew(site: Watch) -> None:
    site.settings = 'drift { pcr_changed_without_reset = "accept" }'
    await site.start()
    beater = await site.known()
    async with site.streaming(beater) as stream:
        beater.measure(7, b"known to be harmless")
        said = await site.beat(stream)
        assert (said.state, said.reattest) == (NodeState.DRIFTED, True)
        assert said.reasons == ("pcr_changed_without_reset",)
        await sync(beater)
        said = await site.beat(stream)
        assert (said.state, said.reattest) == (NodeState.DRIFTED, False)
    await beater.attest()
    assert (await site.state(beater)).state == "attested"


async def test_two_servers_with_one_database_agree(site: Watch, clock: SimClock) -> None:
    first = await site.start("a")
    beater = await site.known()
    await site.start("b")
    del first
    async with site.streaming(beater) as stream:
        # Asked of the other server than the one that holds the stream.
        await site.by_hand("Quarantine", beater)
        async with asyncio.TaskGroup() as group:
            said = group.create_task(stream.state())
            while not said.done():
                await clock.advance(timedelta(seconds=1))
                await asyncio.sleep(0.01)
        assert said.result().state is NodeState.QUARANTINED


async def test_heartbeats_can_be_switched_off(site: Watch) -> None:
    site.settings = 'heartbeat_interval = "0s"'
    await site.start()
    beater = await site.known()
    async with asyncio.timeout(TIMEOUT_S), beater.stream() as stream:
        said = await stream.state()
        assert (said.state, said.next_s) == (NodeState.ATTESTED, None)
        await site.by_hand("Quarantine", beater)
        assert (await stream.state()).state is NodeState.QUARANTINED


async def test_states_are_listed_page_by_page(site: Watch) -> None:
    await site.start()
    beaters = [await site.known() for _ in range(3)]
    await site.by_hand("Quarantine", beaters[1])
    found: list[pb.NodePosture] = []
    request = pb.ListStatesRequest(page_size=2)
    while True:
        page = await site.admin("ListStates", request, pb.ListStatesResponse)
        found.extend(page.nodes)
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    assert [n.agent_id for n in found] == [b.id.text for b in beaters]
    assert [n.state for n in found] == ["attested", "quarantined", "attested"]
    request = pb.ListStatesRequest(states=["quarantined"])
    page = await site.admin("ListStates", request, pb.ListStatesResponse)
    assert [n.agent_id for n in page.nodes] == [beaters[1].id.text]
    wrong = await refusal(
        site.admin("ListStates", pb.ListStatesRequest(states=["x"]), pb.ListStatesResponse)
    )
    assert wrong.kind is ErrorKind.INVALID_ARGUMENT


async def test_release_is_refused_while_the_policy_does_not_hold(site: Watch) -> None:
    await site.start()
    beater, other = await site.machine(), await site.machine()
    other.measure(4, b"another kernel")
    site.allow(beater)
    await site.server.reconfigure()
    await beater.attest()
    await site.by_hand("Quarantine", beater)
    site.allow(other)
    await site.server.reconfigure()
    denied = await refusal(site.by_hand("Release", beater))
    assert denied.kind is NotReadyError.kind
    assert "pcr_mismatch" in denied.message
