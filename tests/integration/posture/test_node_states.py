"""A machine that changes while it runs: from its TPM to its workload, and back."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import DeniedError, SpireHwError
from spire_hw_sim.programs import try_run
from spire_hw_sim.workload import Workload, refusal
from tests.integration.posture.conftest import GOOD, extended

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.posture.conftest import Estate

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(180)]

# What policy tolerates is told as drift.
SERVED = {"attested", "drifted"}
CHANGED = extended(b"boot", b"evil")


async def end_of(stream: AsyncIterator[object]) -> None:
    """Read a stream to its end."""
    async for _ in stream:
        continue


async def test_drift_takes_the_identity_away_and_a_wider_policy_gives_it_back(
    estate: Estate,
) -> None:
    rules = 'pcr_changed_without_reset = "accept"'
    estate.allow(GOOD, drift=rules)
    estate.start()
    node = estate.node
    await node.fetch_soon()
    async with Workload(node.socket) as workload:
        async with workload.x509_svids() as stream:
            await anext(stream)
            node.tpm.extend_pcr(4, b"evil")
            with pytest.raises(DeniedError, match=r"quarantined \(pcr_mismatch"):
                await anext(stream)
        with pytest.raises(DeniedError, match="pcr_mismatch"):
            await workload.jwt_svid(["a"])
        assert await estate.state() == "quarantined"
        health = try_run("spire-hw-agent", "healthcheck", "-socketPath", node.socket)
        assert health.returncode == 1
        assert "pcr_mismatch" in health.stderr

        # Neither a server nor an agent that starts anew forgets it.
        estate.site.server.kill()
        estate.start_server()
        with pytest.raises(DeniedError, match="pcr_mismatch"):
            await workload.x509_svid()
        node.agent.kill()
    node.start()
    async with Workload(node.socket) as workload:
        await refusal(workload.x509_svid, "pcr_mismatch")
    assert await estate.state() == "quarantined"

    estate.allow(GOOD, CHANGED, drift=rules)
    estate.site.server.send(signal.SIGUSR1)
    await node.fetch_soon()
    assert await estate.state() in SERVED
    assert "Traceback" not in node.log.read_text() + estate.site.log.read_text()
    assert node.agent.stop() == 0


async def test_a_pcr_that_changes_without_a_reset_is_a_ban(estate: Estate) -> None:
    estate.allow(GOOD, CHANGED)
    estate.start()
    node = estate.node
    await node.fetch_soon()
    async with Workload(node.socket) as workload, workload.x509_svids() as stream:
        await anext(stream)
        node.tpm.extend_pcr(4, b"evil")
        with pytest.raises(SpireHwError):
            await anext(stream)
    assert node.agent.program.wait_for_exit(20) == 4
    assert "agent evict" in node.agent.log()
    assert await estate.state() == "banned"
    # Nothing the node does by itself lifts it.
    node.tpm.reset()
    estate.site.boot(node.tpm)
    node.start()
    assert node.agent.program.wait_for_exit(30) == 4
    estate.site.command("agent", "evict", "-spiffeID", node.id)
    node.start()
    node.wait_in_use()


async def test_a_machine_that_booted_something_else_is_not_served_until_it_boots_well(
    estate: Estate,
) -> None:
    # The kernel is that of the machine under the tests: it stays the same.
    estate.allow(GOOD, drift='tpm_reset_without_reboot = "accept"')
    estate.start()
    node = estate.node
    await node.fetch_soon()
    assert node.agent.stop() == 0
    for _ in range(2):  # the second time it is known already
        node.tpm.reset()
        for pcr in range(8):
            node.tpm.extend_pcr(pcr, b"other")
        node.start()
        async with Workload(node.socket) as workload:
            await refusal(workload.x509_svid, "pcr_mismatch")
        assert await estate.state() == "quarantined"
        assert node.agent.stop() == 0
    node.tpm.reset()
    estate.site.boot(node.tpm)
    node.start()
    await node.fetch_soon()
    assert await estate.state() in SERVED


async def test_a_node_that_falls_silent_is_stale_and_heals_when_it_speaks_again(
    estate: Estate,
) -> None:
    estate.allow(GOOD)
    estate.start('stale_after = 2 stale_action = "quarantine"')
    node = estate.node
    await node.fetch_soon()
    async with Workload(node.socket) as workload:
        async with workload.x509_svids() as stream:
            await anext(stream)
            node.tpm.pause()
            try:
                with pytest.raises(DeniedError, match="stale"):
                    await anext(stream)
                assert await estate.state() == "quarantined"
            finally:
                node.tpm.resume()
        await node.fetch_soon()
    assert await estate.state() == "attested"


async def test_heartbeats_go_on_under_the_next_svid(estate: Estate) -> None:
    estate.allow(GOOD, drift='pcr_changed_without_reset = "accept"')
    estate.start(keys='agent_ttl = "20s"')
    node = estate.node
    await node.fetch_soon()
    async with Workload(node.socket) as workload, workload.x509_svids() as stream:
        await anext(stream)
        node.wait_in_use(after=node.agent.log().index("Agent SVID in use") + 1)
        node.tpm.extend_pcr(4, b"evil")
        with pytest.raises(DeniedError, match="pcr_mismatch"):
            await end_of(stream)
    assert "The server refused this agent" not in node.agent.log().split("quarantined")[0]
    assert "stream failed" not in node.agent.log()
