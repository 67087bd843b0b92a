"""An external SVIDStore of a real agent gets what the entries say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import DeniedError
from spire_hw_sim.workload import Workload, eventually, refusal
from spire_hw_sim.world import _PLUGINS, World

if TYPE_CHECKING:
    from tests.integration.plugins.conftest import Outside


@pytest.mark.asyncio
async def test_a_store_follows_the_entries(outside: Outside) -> None:
    async with World() as world:
        plugins = _PLUGINS + outside.block("SVIDStore", "vault")
        async with await world.agent(plugins=plugins) as agent:
            current = agent.identity.current
            assert current is not None
            stores = agent._stores
            place = ["vault:name:web", "vault:region:north"]
            entry = await world.create_entry(
                "/web", parent=current.spiffe_id, selectors=place, store_svid=True
            )
            other = await world.create_entry(
                "/lost", parent=current.spiffe_id, selectors=["nowhere:x"], store_svid=True
            )
            async with Workload(world.socket()) as workload:
                # It is nobody's on this node.
                assert isinstance(await refusal(workload.x509_svid, "identity"), DeniedError)

            async def put() -> dict[str, object]:
                await stores.store_once()
                return outside.told("SVIDStore")[-1]

            told = await eventually(put, lambda event: event["event"] == "put")
            assert told["id"] == "spiffe://sim.example/web"
            assert told["metadata"] == ["name:web", "region:north"]
            puts = len(outside.told("SVIDStore"))
            await stores.store_once()
            assert len(outside.told("SVIDStore")) == puts
            await world.delete_entry(entry)
            await world.delete_entry(other)
            told = await eventually(put, lambda event: event["event"] == "delete")
            assert told["metadata"] == ["name:web", "region:north"]
