"""The real server and agent with external plugins of every kind they cannot do without."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import psutil
import pytest
from cryptography.hazmat.primitives.serialization import load_der_private_key

from spire_hw.clock import SystemClock
from spire_hw.errors import NotFoundError, NotReadyError, SpireHwError
from spire_hw.key import spki_der
from spire_hw.log import get_logger
from spire_hw.spiffeid import SpiffeId
from spire_hw.svid.x509svid import parse_x509_svid, verify_x509_svid
from spire_hw.x509.certificate import load_chain
from spire_hw_server.hostservices import ServerServices
from spire_hw_sim.workload import Workload, eventually, refusal
from spire_hw_sim.world import World

if TYPE_CHECKING:
    from tests.integration.plugins.conftest import Outside


@pytest.mark.asyncio
async def test_a_workload_gets_its_svid_through_external_plugins_alone(outside: Outside) -> None:
    server = outside.builtin("KeyManager", "kept", "disk", 'keys_path = "HOME/keys.json"')
    server += outside.block("NodeAttestor", "hello")
    async with World(server_plugins=server) as world:
        plugins = outside.builtin("KeyManager", "kept", "disk", 'directory = "HOME"')
        plugins += outside.block("NodeAttestor", "hello")
        plugins += outside.block("WorkloadAttestor", "mine")
        node = SpiffeId.parse("spiffe://sim.example/spire/agent/hello/node-1")
        await world.create_entry("/web", parent=node, selectors=[f"mine:uid:{os.getuid()}"])
        async with await world.agent(plugins=plugins) as agent:
            assert outside.told("NodeAttestor")[-1] == {"event": "attest", "agent": str(node)}
            async with Workload(world.socket()) as workload:
                answer = await eventually(workload.x509_svid)
            svid = parse_x509_svid(load_chain(answer.svids[0].x509_svid))
            assert str(svid.spiffe_id) == "spiffe://sim.example/web"
            catalog = agent._catalog
            assert catalog is not None
            assert list(catalog.checks()) == [
                "plugin.keymanager(kept)",
                "plugin.nodeattestor(hello)",
                "plugin.workloadattestor(mine)",
            ]
        port = await world.stop_server()
        before = (world.directory / "keys.json").read_bytes()
        await world.start_server(port)
        assert (world.directory / "keys.json").read_bytes() == before


@pytest.mark.asyncio
async def test_a_key_manager_that_was_killed_is_back_with_its_keys(outside: Outside) -> None:
    plugins = outside.builtin("KeyManager", "kept", "disk", 'keys_path = "HOME/keys.json"')
    async with World(server_plugins=plugins) as world:
        children = psutil.Process().children()
        (process,) = [c for c in children if "KeyManager" in c.cmdline()]
        process.kill()
        await refusal(world.server.identity.renew, "keymanager(kept): the plugin")
        await eventually(world.server.identity.renew)


@pytest.mark.asyncio
async def test_data_files_are_read_again_when_asked(outside: Outside) -> None:
    data = outside.directory / "data.hcl"
    data.write_text("a = 1 # first\n")
    block = outside.block("NodeAttestor", "hello", f'plugin_data_file = "{data}"')
    keys = 'KeyManager "disk" { plugin_data { keys_path = "HOME/keys.json" } }'
    async with World(server_plugins=keys + block) as world:
        told = outside.told("NodeAttestor")
        await world.server.reconfigure()
        assert outside.told("NodeAttestor") == told
        data.write_text("bad = 1")
        await world.server.reconfigure()
        assert outside.told("NodeAttestor") == told
        data.write_text("a = 2")
        await world.server.reconfigure()
        assert outside.told("NodeAttestor")[-1]["config"] == "a = 2\n"
    assert outside.told("NodeAttestor")[-1]["event"] == "close"


@pytest.mark.asyncio
async def test_join_token_cannot_be_taken_over(outside: Outside) -> None:
    block = outside.block("NodeAttestor", "join_token")
    keys = 'KeyManager "disk" { plugin_data { keys_path = "HOME/keys.json" } }'
    with pytest.raises(SpireHwError, match="is part of server and agent and cannot be external"):
        async with World(server_plugins=keys + block):
            pass


@pytest.mark.asyncio
async def test_what_a_server_offers_to_plugins() -> None:
    starting = ServerServices(clock=SystemClock(), log=get_logger("catalog")).offered
    assert starting.identity_provider is not None
    assert starting.agent_store is not None
    with pytest.raises(NotReadyError):
        await starting.identity_provider.fetch_x509_identity()
    with pytest.raises(NotReadyError):
        await starting.agent_store.check_known(
            SpiffeId.parse("spiffe://sim.example/spire/agent/x/y")
        )
    async with World() as world, await world.agent() as agent:
        offered = world.server._services.offered
        assert offered.identity_provider is not None
        assert offered.agent_store is not None
        found = await offered.identity_provider.fetch_x509_identity()
        svid = parse_x509_svid(found.chain)
        assert str(svid.spiffe_id) == "spiffe://sim.example/spire/server"
        key = load_der_private_key(found.private_key, None)
        assert spki_der(key.public_key()) == spki_der(svid.public_key)  # type: ignore[arg-type]
        assert verify_x509_svid(svid, found.bundle, SystemClock().now())
        current = agent.identity.current
        assert current is not None
        await offered.agent_store.check_known(current.spiffe_id)
        with pytest.raises(NotFoundError):
            await offered.agent_store.check_known(SpiffeId.parse(f"{current.spiffe_id}-other"))
