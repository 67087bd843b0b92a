"""Authorities that are signed by hand, over time: what the server does by itself, and what it leaves."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key
from spire_hw.log import get_logger
from spire_hw.plugin.keymanager import DeviceHealth, KeyHealth, Keys
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.authority import ParentCa
from spire_hw.x509.csr import parse_csr
from spire_hw.x509.issue import issue_ca_certificate
from spire_hw.x509.name import Subject
from spire_hw_plugins.keymanager.software import SoftwareKeys
from spire_hw_server.bundles import Bundles
from spire_hw_server.ca.authority import Issuer
from spire_hw_server.ca.manager import CaManager, CaSettings
from spire_hw_server.ca.mark import AuthorityMark
from spire_hw_server.ca.profile import Profile
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.asyncio
TD = TrustDomain("example.org")
LOG = get_logger("test")
SETTINGS = CaSettings(TD, timedelta(hours=24), KeyType.EC_P256, KeyType.EC_P256, jwt_enabled=False)


class Device(SoftwareKeys):
    """Keys that outlive the servers that use them, some of which may be out of reach."""

    def __init__(self) -> None:
        super().__init__()
        self.load({})
        self.lost: set[str] = set()

    def stranded_keys(self) -> dict[str, DeviceHealth]:
        return {k: DeviceHealth(KeyHealth.DOWN, "hsm.token_away", "away") for k in self.lost}


@dataclass
class World:
    directory: Path
    device: Device = field(default_factory=Device)
    clock: SimClock = field(default_factory=SimClock)
    root_key: SoftwareSigner = field(
        default_factory=lambda: SoftwareSigner(generate_private_key(KeyType.EC_P256))
    )
    root: bytes = b""

    async def make_root(self) -> None:
        now = self.clock.now()
        self.root = await issue_ca_certificate(
            None,
            trust_domain=None,
            not_before=now - timedelta(days=1),
            not_after=now + timedelta(days=3650),
            signer=self.root_key,
            subject_der=Subject(common_name="root").encode(),
        )

    async def sign(self, csr: bytes, life: timedelta) -> bytes:
        request = parse_csr(csr)
        now = self.clock.now()
        return await issue_ca_certificate(
            ParentCa(self.root, self.root_key),
            trust_domain=TD,
            not_before=now - timedelta(minutes=5),
            not_after=now + life,
            spki=request.spki,
            subject_der=request.subject,
            path_length=0,
        )

    @asynccontextmanager
    async def server(self, **changes: Any) -> AsyncIterator[CaManager]:
        config = DatastoreConfig("sqlite3", str(self.directory / "db.sqlite3"))
        store = await open_datastore(config, clock=self.clock, log=LOG)
        bundles = Bundles(store, trust_domain=TD, clock=self.clock, log=LOG)
        try:
            await bundles.start()
            manager = CaManager(
                replace(SETTINGS, **changes),
                keys=Keys(self.device, "test"),
                store=store,
                bundles=bundles,
                issuer=Issuer(Profile(TD), self.clock),
                mark=AuthorityMark(self.directory),
                clock=self.clock,
                log=LOG,
            )
            await manager.start()
            yield manager
        finally:
            await bundles.close()
            await store.close()

    async def tick(self, manager: CaManager, step: timedelta) -> None:
        await self.clock.advance(step)
        await manager.tick()

    async def take(self, manager: CaManager, life: timedelta, *, activate: bool = True) -> str:
        asked = await manager.request_x509()
        record = await manager.import_x509(
            (await self.sign(asked.csr, life),), self.root, activate=activate
        )
        return record.authority_id


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    await made.make_root()
    return made


def active_id(manager: CaManager) -> str:
    assert manager.x509_slots.active is not None
    return manager.x509_slots.active.authority_id


async def test_what_was_asked_for_is_waited_for_until_it_is_late(world: World) -> None:
    async with world.server() as manager:
        asked = await manager.request_x509()
        assert asked.due_at is not None
        await world.tick(manager, timedelta(hours=12))
        assert manager.x509_slots.prepared is None
    async with world.server() as manager:
        await world.tick(manager, timedelta(hours=1))
        assert manager.x509_slots.prepared is None
        await world.clock.advance(asked.due_at - world.clock.now())
        await manager.tick()
        # The server goes on by itself, and what comes back now is too late.
        made = manager.x509_slots.prepared
        assert made is not None
        assert not made.offline
        late = await world.sign(asked.csr, timedelta(days=30))
        with pytest.raises(NotReadyError, match="no request was made"):
            await manager.import_x509((late,), world.root)


async def test_a_request_that_came_to_nothing_is_not_waited_for_after_a_restart(
    world: World,
) -> None:
    async with world.server() as manager:
        await manager.request_x509()
        made = await manager.prepare_x509()
        await manager.activate_x509(made.authority_id)
    async with world.server() as manager:
        await world.tick(manager, timedelta(hours=12))
        assert manager.x509_slots.prepared is not None


async def test_under_an_offline_root_nothing_is_made_by_the_server(world: World) -> None:
    async with world.server() as manager:
        first = await world.take(manager, timedelta(days=12))
        assert active_id(manager) == first
        assert manager.has_upstream
        await world.tick(manager, timedelta(days=6))
        assert manager.x509_slots.prepared is None
        assert manager.healthy
        # One more from the same root waits for its turn, and takes it.
        second = await world.take(manager, timedelta(days=12), activate=False)
        assert active_id(manager) == first
        await world.tick(manager, timedelta(days=4, hours=1))
        assert active_id(manager) == second
        await world.tick(manager, timedelta(days=9))
        assert active_id(manager) == second
        for _ in range(11):
            await world.tick(manager, timedelta(days=1))
        # It has ended: nothing is made in its place, and the server says that it does not work.
        assert active_id(manager) == second
        assert not manager.healthy
    with pytest.raises(NotReadyError, match="ca csr"):
        await manager.rotate()


async def test_a_start_after_its_end_is_no_way_out_either(world: World) -> None:
    async with world.server() as manager:
        first = await world.take(manager, timedelta(days=12))
    await world.clock.advance(timedelta(days=13))
    with pytest.raises(NotReadyError, match="no authority of its own is made in its place"):
        async with world.server():
            pass
    async with world.server(accept_lost_authorities=frozenset({first})) as manager:
        assert active_id(manager) != first
        await world.take(manager, timedelta(days=12))


async def test_a_restart_keeps_it_and_leaving_is_a_decision(world: World) -> None:
    async with world.server() as manager:
        first = await world.take(manager, timedelta(days=12))
    async with world.server() as manager:
        assert active_id(manager) == first
        made = await manager.prepare_x509()
        assert not made.offline
        await manager.activate_x509(made.authority_id)
        await world.tick(manager, timedelta(hours=12))
        assert manager.x509_slots.prepared is not None


async def test_a_tainted_root_is_no_way_out(world: World) -> None:
    async with world.server() as manager:
        asked = await manager.request_x509()
        certificate = await world.sign(asked.csr, timedelta(days=12))
        await manager.import_x509((certificate,), world.root)
        root_id = manager.x509_slots.prepared.upstream_authority_id  # type: ignore[union-attr]
        await manager.taint_upstream(root_id)
        again = await manager.request_x509(replace=True)
        with pytest.raises(InvalidInputError, match="is tainted"):
            await manager.import_x509(
                (await world.sign(again.csr, timedelta(days=12)),), world.root
            )


async def test_lost_keys_under_an_offline_root_are_told_and_not_replaced(world: World) -> None:
    async with world.server() as manager:
        first = await world.take(manager, timedelta(days=12))
        world.device.lost = {"x509-CA-B"}
        with pytest.raises(NotReadyError, match="signed under an offline root"):
            await manager.rotate()
        assert active_id(manager) == first


async def test_lost_keys_are_replaced_at_once(world: World) -> None:
    async with world.server() as manager:
        first = active_id(manager)
        world.device.lost = {"x509-CA-A"}
        await manager.tick()
        second = active_id(manager)
        assert second != first
        # The one that waits is taken if its key is there, and made anew if not.
        waiting = await manager.prepare_x509()
        world.device.lost = {"x509-CA-B"}
        await manager.tick()
        assert active_id(manager) == waiting.authority_id
        await manager.prepare_x509()
        lost = manager.x509_slots.prepared
        assert lost is not None
        world.device.lost = {"x509-CA-B"}
        await world.tick(manager, timedelta(hours=21))
        assert active_id(manager) not in {waiting.authority_id, lost.authority_id}
