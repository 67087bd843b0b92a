from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

import aiohttp
import pytest
import pytest_asyncio

from spire_hw.errors import DeniedError, NotReadyError, SpireHwError, UnavailableError
from spire_hw_sim.clock import SimClock
from spire_hw_sim.manufacturer import EkKind, Manufacturer
from spire_hw_sim.swtpm import Swtpm
from spire_hw_sim.workload import Workload, eventually, until
from spire_hw_sim.world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw.spiffeid import SpiffeId
    from spire_hw_agent.app import Agent

pytestmark = pytest.mark.asyncio


def agent_id(agent: Agent) -> SpiffeId:
    assert agent.identity.current is not None
    return agent.identity.current.spiffe_id


def stored(world: World, name: str = "a") -> dict[str, object]:
    found: dict[str, object] = json.loads(
        (world.directory / name / "data" / "agent-data.json").read_text()
    )
    return found


async def ends(agent: Agent) -> SpireHwError:
    with pytest.raises(SpireHwError) as caught:
        await agent.failed()
    return caught.value


# -- agents that cannot attest again ---------------------------------------------------


async def test_a_banned_agent_gives_everything_up_and_ends(world: World) -> None:
    async with await world.agent() as agent, Workload(world.socket()) as workload:
        await world.create_entry("/a", parent=agent_id(agent))
        await eventually(workload.x509_svid)
        async with workload.x509_svids() as stream:
            await anext(stream)
            await world.ban(agent_id(agent))
            error = await ends(agent)
            assert isinstance(error, DeniedError)
            with pytest.raises(DeniedError):
                await anext(stream)
        with pytest.raises(DeniedError):
            await workload.x509_svid()
        assert (agent.cache.svid_count, len(agent.cache.entries)) == (0, 0)
        assert stored(world)["svid"] == []


async def test_an_evicted_agent_with_a_join_token_ends_with_the_remedy(world: World) -> None:
    async with await world.agent() as agent:
        await world.evict(agent_id(agent))
        error = await ends(agent)
    assert isinstance(error, DeniedError)
    assert "enrol the node again" in error.message
    assert stored(world)["svid"] == []


async def test_an_svid_that_expires_while_the_server_is_away_ends_a_join_token_agent() -> None:
    clock = SimClock()
    async with asyncio.timeout(60), World(clock=clock) as world:
        async with await world.agent() as agent:
            await world.stop_server()
            ending = asyncio.Event()

            async def pass_time() -> None:
                while not ending.is_set():
                    await clock.advance(timedelta(minutes=2))
                    await asyncio.sleep(0.01)

            async with asyncio.TaskGroup() as group:
                group.create_task(pass_time())
                error = await ends(agent)
                ending.set()
        assert "enrol the node again, e.g. with a new join token" in error.message


async def test_without_a_token_an_agent_does_not_start(world: World) -> None:
    agent = await world.agent(join_token="")
    with pytest.raises(SpireHwError, match="join token was not provided"):
        await agent.start()
    await agent.close()


async def test_a_used_token_is_refused_at_once(world: World) -> None:
    token = await world.join_token()
    async with await world.agent("a", join_token=token):
        pass
    other = await world.agent("b", join_token=token)
    with pytest.raises(SpireHwError, match="join token"):
        await other.start()
    await other.close()
    assert not (world.directory / "b" / "data" / "agent-data.json").exists()


# -- restarts ------------------------------------------------------------------------------


async def test_a_restarted_agent_keeps_its_identity(world: World) -> None:
    async with await world.agent() as agent:
        before = agent.identity.current
    async with await world.agent() as agent:
        after = agent.identity.current
    assert before is not None
    assert after is not None
    assert before.chain == after.chain


async def test_an_agent_starts_without_its_server_and_serves_once_that_is_back(
    world: World,
) -> None:
    async with await world.agent() as agent:
        await world.create_entry("/a", parent=agent_id(agent))
    again = await world.agent()
    port = await world.stop_server()
    async with again, Workload(world.socket()) as workload:
        with pytest.raises(UnavailableError, match="starting"):
            await workload.x509_svid()
        assert not await again.is_healthy()
        await world.start_server(port)
        assert (await eventually(workload.x509_svid)).svids
        assert await again.is_healthy()


async def test_an_agent_enrols_once_its_server_is_there(world: World) -> None:
    agent = await world.agent()
    port = await world.stop_server()
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(agent.start())
        await until(lambda: world.socket().exists())
        async with Workload(world.socket()) as workload:
            with pytest.raises(UnavailableError):
                await workload.x509_svid()
        await world.start_server(port)
        await starting
    assert agent.identity.is_alive()
    await agent.close()


async def test_two_agents_do_not_share_a_data_directory(world: World) -> None:
    async with await world.agent():
        second = await world.agent()
        with pytest.raises(NotReadyError, match="in use by another agent"):
            await second.start()
        await second.close()


async def test_health_probes_over_http(world: World) -> None:
    keys = ""
    rest = 'health_checks { listener_enabled = true bind_address = "127.0.0.1" bind_port = 0 }'
    async with await world.agent(keys=keys, rest=rest) as agent, aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{agent.health_port}"

        async def ready() -> tuple[int, object]:
            async with http.get(f"{url}/ready") as answer:
                return answer.status, await answer.json()

        good = await eventually(ready, lambda r: r[0] == 200)
        assert good == (200, {"agent": {}, "agent.svid": {}})
        await world.ban(agent_id(agent))
        await ends(agent)
        status, details = await ready()
        assert status == 500
        assert "no SVID that is alive" in str(details)
        async with http.get(f"{url}/live") as answer:
            assert answer.status == 200


# -- agents that attest again -----------------------------------------------------------------

_TPM_SERVER = """
KeyManager "disk" { plugin_data { keys_path = "HOME/keys.json" } }
NodeAttestor "tpm" { plugin_data { ek_policy = "ca" endorsement_ca_path = "ROOTS" } }
"""
_TPM_AGENT = """
KeyManager "tpm" { plugin_data { tcti = "TCTI" } }
NodeAttestor "tpm" { plugin_data { tcti = "TCTI" } }
"""


class Node:
    """A world whose agent attests by TPM."""

    def __init__(self, world: World, tpm: Swtpm, clock: SimClock) -> None:
        self.world = world
        self.clock = clock
        self.plugins = _TPM_AGENT.replace("TCTI", tpm.tcti)

    async def agent(self, keys: str = "") -> Agent:
        return await self.world.agent(plugins=self.plugins, keys=keys)

    async def time_passes(self, seconds: float = 5) -> None:
        await self.clock.advance(timedelta(seconds=seconds))
        await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    maker = Manufacturer("Test TPM Works")
    clock = SimClock()
    async with AsyncExitStack() as stack:
        tpm = Swtpm(tmp_path / "tpm", persistent_ek=False)
        await asyncio.to_thread(tpm.start)
        stack.callback(tpm.stop)
        await asyncio.to_thread(maker.equip, tpm, (EkKind.ECC_P256,))
        for pcr in range(8):
            await asyncio.to_thread(tpm.extend_pcr, pcr, b"boot")
        roots = maker.write_roots(tmp_path / "roots.pem")
        await stack.enter_async_context(asyncio.timeout(90))
        plugins = _TPM_SERVER.replace("ROOTS", str(roots))
        world = await stack.enter_async_context(World(clock=clock, server_plugins=plugins))
        yield Node(world, tpm, clock)


@pytest.mark.tpm
async def test_an_evicted_agent_comes_back_without_a_restart(node: Node) -> None:
    world = node.world
    async with await node.agent() as agent, Workload(world.socket()) as workload:
        first = agent.identity.current
        await world.create_entry("/a", parent=agent_id(agent))
        while not agent.cache.svid_count:
            await node.time_passes()
        await world.evict(agent_id(agent))
        while agent.identity.current in {None, first}:
            await node.time_passes()
        assert (await workload.x509_svid()).svids
        await node.time_passes(10)
        assert await agent.is_healthy()


@pytest.mark.tpm
async def test_an_svid_that_expired_while_the_server_was_away_is_replaced(node: Node) -> None:
    async with await node.agent() as agent:
        first = agent.identity.current
        port = await node.world.stop_server()
        for _ in range(70):
            await node.time_passes(60)
        assert not agent.identity.is_alive()
        await node.world.start_server(port)
        while not agent.identity.is_alive():
            await node.time_passes()
        assert agent.identity.current is not first


@pytest.mark.tpm
@pytest.mark.parametrize("mode", ["auto", "never"])
async def test_another_authority_at_the_server(node: Node, mode: str) -> None:
    world = node.world
    keys = f'rebootstrap_mode = "{mode}" rebootstrap_delay = "2m"'
    async with await node.agent(keys) as agent, Workload(world.socket()) as workload:
        await world.create_entry("/a", parent=agent_id(agent))
        while not agent.cache.svid_count:
            await node.time_passes()
        before = stored(world)
        port = await world.stop_server()
        world.forget_server()
        await world.start_server(port)
        (world.directory / "a" / "bootstrap.pem").write_bytes(await world.bundle_pem())
        await world.create_entry("/a", parent=agent_id(agent))
        # Before the delay is over nothing happens; retries make it a little later.
        for _ in range(20):
            await node.time_passes()
        assert stored(world) == before
        for _ in range(60):
            await node.time_passes()
        changed = stored(world)["bundle"] != before["bundle"]
        assert changed == (mode == "auto")
        if not changed:
            return
        while not agent.cache.svid_count:
            await node.time_passes()
        roots = {r.der for r in (await world.bundle()).x509_authorities}
        assert (await workload.x509_svid()).svids[0].bundle in roots
