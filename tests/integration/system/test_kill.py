"""kill -9 at any moment: everybody comes back by itself as the one it was."""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING

import psutil
import pytest

from spire_hw._pb import server_localauthority_pb2
from spire_hw.aio.tasks import Tasks
from spire_hw.errors import SpireHwError
from spire_hw_sim.servers import LOCAL_AUTHORITY, Operator
from spire_hw_sim.site import WORKLOAD, wait_until
from tests.integration.tpm.leaks import loaded

if TYPE_CHECKING:
    from spire_hw_sim.site import Node, Site

pytestmark = pytest.mark.asyncio


def all_gone(processes: list[psutil.Process]) -> bool:
    """Tell whether processes ended; one that waits for its reaper has."""
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            continue
    return True


def leftovers(site: Site) -> list[str]:
    """Return files that a clean server would not have."""
    known = {"db.sqlite3", "db.sqlite3-wal", "db.sqlite3-shm", "server.lock"}
    found = {p.name for p in site.data.iterdir()} - known
    return sorted(f for f in found if "tmp" in f or f.endswith((".new", "~")))


async def test_a_server_killed_at_random_moments_is_the_same_server(site: Site, node: Node) -> None:
    ids, keys = await site.authorities(), site.private_keys()
    files = {p.name for p in site.data.iterdir()}
    draw = random.Random(2612)  # noqa: S311 - repeatable, not secret
    stray: list[psutil.Process] = []
    stray += site.server.kill()
    for _ in range(6):
        site.start_server()
        await asyncio.sleep(draw.uniform(0.05, 2.0))
        stray += site.server.kill()
        assert "Traceback" not in site.server.log()
    site.start_server()
    site.wait_ready()
    assert await site.authorities() == ids
    assert site.private_keys() == keys
    wait_until("the killed servers' workers have ended", lambda: all_gone(stray), 10)
    assert {p.name for p in site.data.iterdir()} <= files
    assert WORKLOAD in {str(svid.spiffe_id) for svid in await node.fetch_soon()}
    after = len(node.agent.log())
    site.command(
        *("entry", "create", "-parentID", node.id, "-spiffeID", "spiffe://site.example/late"),
        *("-selector", "unix:uid:4242"),
    )
    assert "error" not in site.server.log()
    assert node.agent.is_running, node.agent.log()[after:]


async def test_a_server_killed_while_it_makes_its_first_ca_makes_one_ca(new_site: Site) -> None:
    moments = ["umask tightened|Configured|hsm", "hsm is open", "key_generated", "key_generated"]
    for moment in moments:
        new_site.start_server()
        new_site.server.wait_for(moment)
        new_site.server.kill()
    new_site.start_server()
    new_site.wait_ready()
    (x509, jwt), keys = await new_site.authorities(), new_site.private_keys()
    assert len(keys) <= 4
    assert leftovers(new_site) == []
    new_site.server.kill()
    new_site.start_server()
    new_site.wait_ready()
    assert await new_site.authorities() == (x509, jwt)
    assert new_site.private_keys() == keys
    assert new_site.server.stop() == 0


async def test_a_server_killed_during_rotation_keeps_to_published_authorities(
    site: Site, node: Node
) -> None:
    draw = random.Random(77)  # noqa: S311 - repeatable, not secret
    for _ in range(2):
        known = set((await site.authorities())[0])
        operator = Operator(site.socket)
        tasks = Tasks(lambda name, error: None)
        preparing = tasks.spawn(
            "prepare",
            operator.channel.unary(
                LOCAL_AUTHORITY + "PrepareX509Authority",
                server_localauthority_pb2.PrepareX509AuthorityRequest(),
                server_localauthority_pb2.PrepareX509AuthorityResponse,
                timeout_s=20,
            ),
        )
        await asyncio.sleep(draw.uniform(0.0, 0.15))
        site.server.kill()
        try:
            prepared = (await preparing).prepared_authority.authority_id
        except SpireHwError:
            prepared = ""
        await tasks.close()
        await operator.close()
        site.start_server()
        site.wait_ready()
        now = set((await site.authorities())[0])
        assert known <= now
        assert not prepared or prepared in now
        assert len(site.private_keys()) <= 6
    assert (await node.fetch_soon())[0].spiffe_id is not None


async def test_a_server_killed_while_a_node_attests_lets_it_in_afterwards(site: Site) -> None:
    other = site.node("late")
    other.start()
    other.agent.wait_for("Starting Workload")
    await asyncio.sleep(0.2)
    site.server.kill()
    await asyncio.sleep(0.5)
    assert other.agent.is_running, other.agent.log()
    site.start_server()
    site.wait_ready()
    other.wait_in_use()
    listed = site.command("agent", "list")
    assert listed.count(other.id) == 1
    assert other.agent.stop() == 0
    assert loaded(other.tpm) == []


async def test_an_agent_killed_at_random_moments_is_the_same_agent(site: Site, node: Node) -> None:
    await node.fetch_soon()
    svid = json.loads((node.data / "agent-data.json").read_text())["svid"]
    keys, attestations = node.key_files(), site.server.log().count("AttestAgent")
    assert keys
    draw = random.Random(4711)  # noqa: S311 - repeatable, not secret
    node.agent.kill()
    for _ in range(6):
        node.start()
        await asyncio.sleep(draw.uniform(0.05, 2.0))
        node.agent.kill()
        assert "Traceback" not in node.agent.log()
    node.start()
    node.wait_in_use()
    assert "attest" not in node.agent.log().replace("reattestable", "").lower().replace(
        "plugin_type=nodeattestor", ""
    ).replace("plugin_type=workloadattestor", "")
    assert (await node.fetch_soon())[0].spiffe_id is not None
    assert json.loads((node.data / "agent-data.json").read_text())["svid"] == svid
    assert node.key_files() == keys
    assert site.server.log().count("AttestAgent") == attestations
    assert sorted(p.name for p in node.data.iterdir() if p.name.endswith(".new")) == []
    assert node.agent.stop() == 0
    assert loaded(node.tpm) == []
