"""A server whose keys are on two tokens: one is lost, and identities go on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import SpireHwError
from spire_hw.plugin.keymanager import KeyHealth
from spire_hw.svid.x509svid import parse_x509_svid, verify_x509_svid
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.world import World

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_server.ca.journal import X509Record

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.slow,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]


def plugin(folder: Path, hsms: dict[str, SoftHsm]) -> str:
    pin = folder / "pin"
    pin.touch(mode=0o600)
    pin.write_text("1234")
    tokens = "".join(
        f"""token "{name}" {{
          module_path = "{hsm.module}"
          token_label = "{name}"
          pin_file = "{pin}"
          environment {{ SOFTHSM2_CONF = "{hsm.conf}" }}
        }}
        """
        for name, hsm in hsms.items()
    )
    return f"""KeyManager "pkcs11" {{ plugin_data {{
      mode = "spread"
      key_identifier_value = "server-1"
      start_timeout = "2s"
      lost_after = "0s"
      probe_interval = "1s"
      {tokens}
    }} }}"""


@pytest.fixture
def hsms(tmp_path: Path) -> dict[str, SoftHsm]:
    made = {name: SoftHsm(tmp_path / name) for name in ("one", "two")}
    for name, hsm in made.items():
        hsm.init_token(name)
    return made


def active(world: World) -> X509Record:
    record = world.server.manager.x509_slots.active
    assert record is not None
    return record


async def check_issues(world: World) -> None:
    """Have the server sign itself an SVID that the published bundle verifies, and a token."""
    await world.server.identity.renew()
    svid = parse_x509_svid(world.server.identity.svid.chain)
    verify_x509_svid(svid, await world.bundle(), world.server.clock.now())


async def issues(world: World) -> bool:
    try:
        await world.server.identity.renew()
    except SpireHwError:
        return False
    return True


async def until_issuing(world: World, *, wanted: bool) -> None:
    """Wait until the server can issue, or until it cannot."""
    async with asyncio.timeout(60):
        while True:
            if await issues(world) is wanted:
                return
            await asyncio.sleep(0.05)


async def until_well(world: World) -> None:
    """Wait until both tokens are in use again."""
    manager = world.server.manager._keys.manager
    async with asyncio.timeout(60):
        while True:
            if manager.key_health().health is KeyHealth.GOOD:  # type: ignore[attr-defined]
                return
            await asyncio.sleep(0.05)


def holder(world: World, key_id: str) -> str:
    manager = world.server.manager._keys.manager
    cluster = manager._cluster  # type: ignore[attr-defined]
    (name,) = cluster._table()[key_id].holders
    return str(name)


async def test_the_ca_moves_to_the_other_token_and_comes_back_to_none(
    hsms: dict[str, SoftHsm], tmp_path: Path
) -> None:
    async with World(server_plugins=plugin(tmp_path, hsms)) as world:
        async with await world.agent() as agent:
            assert agent.identity.is_alive()
        first = active(world)
        lost = holder(world, f"x509-CA-{first.slot.value}")
        (left,) = set(hsms) - {lost}
        hsms[lost].remove()
        await until_issuing(world, wanted=False)
        await world.server.manager.tick()
        second = active(world)
        assert second.authority_id != first.authority_id
        assert holder(world, f"x509-CA-{second.slot.value}") == left
        await check_issues(world)
        # What the lost token signed is still verified, and its authority is not forgotten.
        ids = {r.authority_id for r in (await world.bundle()).x509_authorities}
        assert ids == {first.authority_id, second.authority_id}
        async with await world.agent("b") as agent:
            assert agent.identity.is_alive()
        # A start without it is a start with the other one, and no new CA.
        await world.start_server(await world.stop_server())
        assert active(world).authority_id == second.authority_id
        await check_issues(world)
        hsms[lost].put_back()
        await until_well(world)
        prepared = await world.server.manager.prepare_x509()
        # The next authority is on the token that does not sign.
        assert holder(world, f"x509-CA-{prepared.slot.value}") == lost
        await world.server.manager.activate_x509(prepared.authority_id)
        await check_issues(world)


async def test_a_start_without_the_active_authoritys_token_moves_at_once(
    hsms: dict[str, SoftHsm], tmp_path: Path
) -> None:
    async with World(server_plugins=plugin(tmp_path, hsms)) as world:
        first = active(world)
        lost = holder(world, f"x509-CA-{first.slot.value}")
        port = await world.stop_server()
        hsms[lost].remove()
        await world.start_server(port)
        second = active(world)
        assert second.authority_id != first.authority_id
        await check_issues(world)
        jwt = world.server.manager.jwt_slots.active
        assert jwt is not None
        assert holder(world, f"JWT-Signer-{jwt.slot.value}") != lost
        old = world.server.manager.x509_slots.old
        assert old is not None
        assert old.authority_id == first.authority_id


async def test_nothing_moves_while_no_token_is_there(
    hsms: dict[str, SoftHsm], tmp_path: Path
) -> None:
    async with World(server_plugins=plugin(tmp_path, hsms)) as world:
        first = active(world)
        await world.server.manager.prepare_x509()
        for hsm in hsms.values():
            hsm.remove()
        await until_issuing(world, wanted=False)
        await world.server.manager.tick()
        assert active(world) == first
        for hsm in hsms.values():
            hsm.put_back()
        await until_issuing(world, wanted=True)
        assert active(world) == first
