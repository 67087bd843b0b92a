"""An operator's mishaps with a node's TPM: gone, hanging, reset, cleared, exchanged."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw_sim.site import WORKLOAD, wait_until
from tests.integration.tpm.leaks import loaded

if TYPE_CHECKING:
    from spire_hw_sim.site import Node, Run, Site

pytestmark = pytest.mark.asyncio


def handles(run: Run, number: signal.Signals) -> bool:
    """Tell whether a process has a handler for a signal."""
    status = Path(f"/proc/{run.pid}/status").read_text()
    caught = int(re.findall(r"SigCgt:\s+([0-9a-f]+)", status)[0], 16)
    return bool(caught >> (number - 1) & 1)


async def still_serves(node: Node) -> None:
    """Check that the workload is given its SVID."""
    assert WORKLOAD in {str(svid.spiffe_id) for svid in await node.fetch()}


async def test_a_tpm_that_is_gone_is_told_and_used_again_when_it_is_back(
    site: Site, node: Node
) -> None:
    await node.fetch_soon()
    after = len(node.agent.log())
    node.tpm.kill()
    site.server.kill()
    site.start_server()
    site.wait_ready()
    said = node.agent.wait_for("level=(error|warning).*TPM", after=after)
    assert "swtpm" in said
    assert "check that" in said or "TPM" in said
    await still_serves(node)
    assert "Traceback" not in node.agent.log()[after:]
    node.tpm.start()
    site.boot(node.tpm)
    seen = len(site.server.log())
    site.command(
        *("entry", "create", "-parentID", node.id, "-spiffeID", "spiffe://site.example/after"),
        *("-selector", f"unix:uid:{os.getuid()}"),
    )
    svids = await node.fetch_soon(90, at_least=2)
    assert {str(s.spiffe_id) for s in svids} == {WORKLOAD, "spiffe://site.example/after"}
    assert "AttestAgent" not in site.server.log()[seen:]
    assert node.agent.stop() == 0
    assert loaded(node.tpm) == []


async def test_sigterm_ends_an_agent_whose_tpm_hangs(site: Site, node: Node) -> None:
    await node.fetch_soon()
    node.tpm.pause()
    try:
        site.server.kill()
        site.start_server()
        site.wait_ready()
        await still_serves(node)
        assert node.agent.stop(10) == 0
        node.start()
        wait_until("it handles SIGTERM", lambda: handles(node.agent, signal.SIGTERM))
        assert node.agent.stop(10) == 0
        assert "Traceback" not in node.agent.log()
    finally:
        node.tpm.resume()


async def test_a_power_cycle_changes_nothing(site: Site, node: Node) -> None:
    before, keys = node.id, node.key_files()
    node.agent.kill()
    node.tpm.reset(clean=False)
    site.boot(node.tpm)
    node.start()
    line = node.wait_in_use()
    assert before in line
    assert node.key_files() == keys
    await node.fetch_soon()
    assert node.agent.stop() == 0


async def test_after_a_clear_the_node_attests_again_as_itself(site: Site, node: Node) -> None:
    before, keys = node.id, node.key_files()
    node.agent.kill()
    node.tpm.commands.clear()
    node.start()
    line = node.wait_in_use()
    assert before in line
    told = node.agent.wait_for("level=warning.*key")
    assert "Traceback" not in node.agent.log()
    assert told
    assert node.key_files() != keys
    await node.fetch_soon()
    assert node.agent.stop() == 0
    assert loaded(node.tpm) == []


async def test_a_clear_while_the_agent_runs_is_survived(site: Site, node: Node) -> None:
    await node.fetch_soon()
    before, after = node.id, len(node.agent.log())
    node.tpm.commands.clear()
    site.server.kill()
    site.start_server()
    site.wait_ready()
    line = node.wait_in_use(60, after=after)
    assert before in line
    await still_serves(node)
    assert "Traceback" not in node.agent.log()[after:]


async def test_another_tpm_is_another_node(site: Site, node: Node) -> None:
    ours, stranger = node.tpm, site.power_on("stranger")
    before = node.id
    assert node.agent.stop() == 0
    node.tpm = stranger
    try:
        node.start()
        assert node.agent.program.wait_for_exit(30) == 4
        ek_hash = node.agent.wait_for("msg=attesting.*ek_hash=").split("ek_hash=")[1].split()[0]
        assert re.search(r"(?m)^Error: .*endorsement key is not registered", node.agent.log())
        assert f"tpm allow {ek_hash}" in site.server.log()
        site.enrol(stranger)
        node.start()
        assert before not in node.wait_in_use()
        assert node.agent.stop() == 0
    finally:
        node.tpm = ours
    node.start()
    assert before in node.wait_in_use()
    await node.fetch_soon()


async def test_no_tpm_at_the_start(site: Site, node: Node) -> None:
    assert node.agent.stop() == 0
    node.tpm.kill()
    node.start()
    assert node.agent.program.wait_for_exit(30) == 3
    log = node.agent.log()
    assert re.search(r"(?m)^Error: .*no TPM answers at swtpm.*check that", log), log
    assert "Traceback" not in log
