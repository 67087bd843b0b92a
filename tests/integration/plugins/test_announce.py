"""External Notifiers and BundlePublishers of a real server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import SpireHwError
from spire_hw_sim.world import World

if TYPE_CHECKING:
    from tests.integration.plugins.conftest import Outside

KEYS = 'KeyManager "disk" { plugin_data { keys_path = "HOME/keys.json" } }\n'


@pytest.mark.asyncio
async def test_both_hear_of_the_bundle_at_start_and_of_every_change(outside: Outside) -> None:
    plugins = KEYS + outside.block("Notifier", "bell") + outside.block("BundlePublisher", "board")
    async with World(server_plugins=plugins) as world:
        first = [r.authority_id for r in (await world.bundle()).x509_authorities]
        assert outside.told("Notifier")[1] == {"event": "loaded", "roots": first}
        await outside.until("BundlePublisher", lambda told: len(told) > 1)
        assert outside.told("BundlePublisher")[1] == {"event": "published", "roots": first}
        outside.set("refuse")
        record = await world.server.manager.prepare_x509()
        both = [*first, record.authority_id]
        await outside.until("Notifier", lambda told: told[-1]["event"] == "updated")
        await outside.until("BundlePublisher", lambda told: told[-1]["roots"] == both)
        assert outside.told("Notifier")[-1]["roots"] == both
        # A refusal is logged and nothing else.
        assert await world.bundle()
        outside.unset("refuse")


@pytest.mark.asyncio
async def test_a_notifier_can_keep_the_server_from_starting(outside: Outside) -> None:
    outside.set("refuse")
    world = World(server_plugins=KEYS + outside.block("Notifier", "bell"))
    with pytest.raises(SpireHwError, match=r"^notifier\(bell\): refused as asked"):
        async with world:
            pass
