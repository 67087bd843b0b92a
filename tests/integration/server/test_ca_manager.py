"""The CA manager over a real store: restarts, crashes between any two steps, keys gone missing."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import (
    DeviceError,
    ErrorKind,
    InvalidInputError,
    NotReadyError,
    PluginError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.key import KeyType, SignOptions
from spire_hw.log import get_logger
from spire_hw.plugin.keymanager import KeyInfo, Keys, KeySignature
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.certificate import load_certificate
from spire_hw_plugins.keymanager.software import SoftwareKeys
from spire_hw_server.bundles import Bundles
from spire_hw_server.ca.authority import Issuer
from spire_hw_server.ca.journal import Journal, X509Record, parse_journal
from spire_hw_server.ca.manager import CaManager, CaSettings
from spire_hw_server.ca.mark import FILE_NAME, AuthorityMark
from spire_hw_server.ca.profile import Profile
from spire_hw_server.ca.slots import SlotName, Status
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import JournalRow
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TD = TrustDomain("example.org")
LOG = get_logger("test")
SETTINGS = CaSettings(TD, timedelta(hours=24), KeyType.EC_P256, KeyType.EC_P256)


class Crash(BaseException):
    """The process is killed here."""


@dataclass
class Fuse:
    """Burns at the n-th step; None never."""

    left: int | None = None
    steps: int = 0

    def step(self) -> None:
        self.steps += 1
        if self.left is not None:
            if self.left == 0:
                raise Crash
            self.left -= 1


class Fused:
    """Something whose calls may end the process, before or after they took effect."""

    def __init__(self, inner: Any, fuse: Fuse, names: tuple[str, ...]) -> None:
        self._inner = inner
        self._fuse = fuse
        self._names = names

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._names:
            return found

        async def call(*args: Any, **kwargs: Any) -> Any:
            self._fuse.step()
            result = await found(*args, **kwargs)
            self._fuse.step()
            return result

        return call


@dataclass
class Device:
    """A KeyManager whose keys outlive the servers that use it, and which may misbehave."""

    keys: SoftwareKeys = field(default_factory=SoftwareKeys)
    hidden: set[str] = field(default_factory=set)
    away: bool = False
    in_process: bool = False
    bad_signatures: bool = False

    def __post_init__(self) -> None:
        self.keys.load({})

    async def generate_key(self, key_id: str, key_type: KeyType) -> KeyInfo:
        self._check()
        return await self.keys.generate_key(key_id, key_type)

    async def get_public_key(self, key_id: str) -> KeyInfo:
        return await self.keys.get_public_key(key_id)

    async def get_public_keys(self) -> list[KeyInfo]:
        self._check()
        return [k for k in await self.keys.get_public_keys() if k.key_id not in self.hidden]

    async def sign_data(self, key_id: str, digest: bytes, options: SignOptions) -> KeySignature:
        self._check()
        made = await self.keys.sign_data(key_id, digest, options)
        if self.bad_signatures:
            other = bytes([digest[0] ^ 1]) + digest[1:]
            made = await self.keys.sign_data(key_id, other, options)
        return made

    def _check(self) -> None:
        if self.away:
            raise DeviceError("token is away", device="token", operation="any")


@dataclass
class World:
    """What outlives a server: directory, device, time."""

    directory: Path
    device: Device = field(default_factory=Device)
    clock: SimClock = field(default_factory=SimClock)
    settings: CaSettings = SETTINGS
    fuse: Fuse = field(default_factory=Fuse)

    @asynccontextmanager
    async def server(self, **changes: Any) -> AsyncIterator[CaManager]:
        """Start the CA part of a server; leaving the block is the end of the process."""
        config = DatastoreConfig("sqlite3", str(self.directory / "db.sqlite3"))
        store = await open_datastore(config, clock=self.clock, log=LOG)
        fused: Any = Fused(store, self.fuse, ("append_bundle", "save_journal"))
        bundles = Bundles(fused, trust_domain=TD, clock=self.clock, log=LOG)
        try:
            await bundles.start()
            device: Any = Fused(self.device, self.fuse, ("generate_key",))
            manager = CaManager(
                replace(self.settings, **changes),
                keys=Keys(device, "test"),
                store=fused,
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


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def active_id(manager: CaManager) -> str:
    assert manager.x509_slots.active is not None
    return manager.x509_slots.active.authority_id


def jwt_id(manager: CaManager) -> str:
    assert manager.jwt_slots.active is not None
    return manager.jwt_slots.active.authority_id


def bundle_ids(manager: CaManager) -> list[str]:
    return [r.authority_id for r in manager._bundles.own.x509_authorities]


def prepared_x509(manager: CaManager) -> X509Record | None:
    return manager.x509_slots.prepared


def healthy(manager: CaManager) -> bool:
    return manager.healthy


async def key_fingerprints(device: Device) -> dict[str, str]:
    return {k.key_id: k.fingerprint for k in await device.keys.get_public_keys()}


@pytest.mark.asyncio
async def test_the_first_start_makes_both_authorities(world: World) -> None:
    async with world.server() as manager:
        active = manager.x509_slots.active
        assert active is not None
        assert active.slot is SlotName.A
        certificate = load_certificate(active.certificate)
        assert certificate.not_valid_before_utc == world.clock.now() - timedelta(seconds=10)
        assert certificate.not_valid_after_utc == world.clock.now() + timedelta(hours=24)
        assert bundle_ids(manager) == [active.authority_id]
        assert manager._bundles.own.jwt_key(jwt_id(manager)) is not None
    assert set(await key_fingerprints(world.device)) == {"x509-CA-A", "JWT-Signer-A"}


@pytest.mark.asyncio
async def test_a_restart_makes_no_new_keys(world: World) -> None:
    async with world.server() as manager:
        before = active_id(manager), jwt_id(manager)
    keys = await key_fingerprints(world.device)
    for _ in range(3):
        async with world.server() as manager:
            assert (active_id(manager), jwt_id(manager)) == before
    assert await key_fingerprints(world.device) == keys


@pytest.mark.asyncio
async def test_rotation_over_two_lives(world: World) -> None:
    async with world.server() as manager:
        first = active_id(manager)
        await world.tick(manager, timedelta(hours=11))
        assert prepared_x509(manager) is None
        await world.tick(manager, timedelta(hours=1))
        second = prepared_x509(manager)
        assert second is not None
        assert second.authority_id in bundle_ids(manager)
        assert active_id(manager) == first
        await world.tick(manager, timedelta(hours=8))
        assert active_id(manager) == second.authority_id
        assert manager.x509_slots.old is not None
        assert manager.x509_slots.old.authority_id == first
        assert manager._issuer.x509.authority_id == second.authority_id
        await world.tick(manager, timedelta(hours=12))
        third = prepared_x509(manager)
        assert third is not None
        assert third.slot is SlotName.A
        assert manager.jwt_slots.prepared is not None
    async with world.server() as manager:
        assert active_id(manager) == second.authority_id
        assert manager.x509_slots.prepared == third


@pytest.mark.asyncio
async def test_expired_authorities_leave_the_bundle_a_day_later(world: World) -> None:
    async with world.server() as manager:
        first = active_id(manager)
        for _ in range(9):
            await world.tick(manager, timedelta(hours=6))
        assert first not in bundle_ids(manager)
        assert active_id(manager) in bundle_ids(manager)
        assert healthy(manager)


async def _rotated(world: World) -> None:
    """Live through a first start, a preparation and an activation, wherever it is killed."""
    async with world.server() as manager:
        await world.clock.advance(timedelta(hours=12))
        await manager.rotate()
        await world.clock.advance(timedelta(hours=9))
        await manager.rotate()


async def _steps(directory: Path) -> int:
    world = World(directory)
    await _rotated(world)
    return world.fuse.steps


@pytest.mark.asyncio
async def test_killed_between_any_two_steps_it_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    steps = await _steps(whole)
    assert steps >= 24
    for number in range(steps):
        directory = tmp_path / str(number)
        directory.mkdir()
        world = World(directory)
        world.fuse.left = number
        with pytest.raises(Crash):
            await _rotated(world)
        world.fuse.left = None
        journal = await _stored_journal(world)
        before = [r for r in journal.x509 if r.status is Status.ACTIVE] if journal else []
        async with world.server() as manager:
            if before and before[0].not_after - world.clock.now() > timedelta(hours=4):
                assert active_id(manager) == before[0].authority_id, number
            assert active_id(manager) in bundle_ids(manager)
            assert manager._bundles.own.jwt_key(jwt_id(manager)) is not None
            signed = await manager._issuer.x509_svid(
                spki=_spki(manager), spiffe_id=TD.member("w"), ttl=timedelta(minutes=5)
            )
            leaf = load_certificate(signed.chain[0])
            active = manager.x509_slots.active
            assert active is not None
            leaf.verify_directly_issued_by(load_certificate(active.certificate))
        assert len(await key_fingerprints(world.device)) <= 4


def _spki(manager: CaManager) -> bytes:
    active = manager.jwt_slots.active
    assert active is not None
    return active.public_key


async def _stored_journal(world: World) -> Journal | None:
    config = DatastoreConfig("sqlite3", str(world.directory / "db.sqlite3"))
    store = await open_datastore(config, clock=world.clock, log=LOG)
    rows = await store.list_journals()
    await store.close()
    return parse_journal(rows[-1].data) if rows else None


@pytest.mark.asyncio
async def test_an_away_device_is_an_error_not_a_new_ca(world: World) -> None:
    async with world.server():
        pass
    world.device.away = True
    with pytest.raises(PluginError, match="token is away"):
        async with world.server():
            pass
    world.device.away = False
    async with world.server():
        pass


@pytest.mark.asyncio
@pytest.mark.parametrize("hidden", [{"x509-CA-A"}, {"JWT-Signer-A"}, {"x509-CA-A", "JWT-Signer-A"}])
async def test_a_short_key_list_is_an_error_not_a_new_ca(world: World, hidden: set[str]) -> None:
    async with world.server() as manager:
        before = active_id(manager), jwt_id(manager)
    keys = await key_fingerprints(world.device)
    world.device.hidden = hidden
    with pytest.raises(NotReadyError, match="accept_lost_authorities") as caught:
        async with world.server():
            pass
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert any(i in caught.value.message for i in before)
    assert await key_fingerprints(world.device) == keys
    world.device.hidden = set()
    async with world.server() as manager:
        assert (active_id(manager), jwt_id(manager)) == before


@pytest.mark.asyncio
async def test_a_short_key_list_after_a_rotation_is_an_error(world: World) -> None:
    async with world.server() as manager:
        await world.tick(manager, timedelta(hours=12))
        await world.tick(manager, timedelta(hours=9))
        assert manager.x509_slots.active is not None
        assert manager.x509_slots.active.slot is SlotName.B
    world.device.hidden = {"x509-CA-B"}
    with pytest.raises(NotReadyError, match="x509-CA-B"):
        async with world.server():
            pass


@pytest.mark.asyncio
async def test_the_operator_may_give_a_lost_authority_up(world: World) -> None:
    async with world.server() as manager:
        lost = active_id(manager), jwt_id(manager)
    world.device = Device()
    async with world.server(accept_lost_authorities=frozenset(lost)) as manager:
        assert active_id(manager) != lost[0]
        new = active_id(manager)
        assert bundle_ids(manager) == [lost[0], new]
    async with world.server() as manager:
        assert active_id(manager) == new


@pytest.mark.asyncio
async def test_giving_one_authority_up_does_not_give_up_another(world: World) -> None:
    async with world.server() as manager:
        lost = active_id(manager)
    world.device = Device()
    with pytest.raises(NotReadyError, match="JWT"):
        async with world.server(accept_lost_authorities=frozenset({lost})):
            pass
    with pytest.raises(NotReadyError, match=r"X\.509"):
        async with world.server(accept_lost_authorities=frozenset({"other"})):
            pass


@pytest.mark.asyncio
async def test_a_key_manager_that_forgets_by_nature_gets_new_authorities(world: World) -> None:
    async with world.server(keys_persist=False) as manager:
        first = active_id(manager)
    world.device = Device()
    async with world.server(keys_persist=False) as manager:
        assert bundle_ids(manager) == [first, active_id(manager)]
        rows = await manager._store.list_journals()
        assert len(rows) == 1


@pytest.mark.asyncio
async def test_a_lost_authority_that_has_expired_is_no_obstacle(world: World) -> None:
    async with world.server() as manager:
        first = active_id(manager)
    world.device = Device()
    await world.clock.advance(timedelta(days=3))
    async with world.server() as manager:
        assert active_id(manager) != first


@pytest.mark.asyncio
async def test_without_the_mark_the_journal_is_found_by_the_keys(world: World) -> None:
    async with world.server() as manager:
        before = active_id(manager)
    (world.directory / FILE_NAME).unlink()
    async with world.server() as manager:
        assert active_id(manager) == before


@pytest.mark.asyncio
async def test_a_replaced_database_starts_no_new_ca_unless_asked_to(world: World) -> None:
    async with world.server() as manager:
        before = active_id(manager)
    for file in world.directory.glob("db.sqlite3*"):
        file.unlink()
    with pytest.raises(NotReadyError, match=r"knows nothing of it.*accept_lost_authorities"):
        async with world.server():
            pass
    async with world.server(accept_lost_authorities=frozenset({before})) as manager:
        assert active_id(manager) != before


@pytest.mark.asyncio
async def test_keys_of_another_servers_ca_are_not_replaced(world: World) -> None:
    async with world.server() as manager:
        before = active_id(manager)
    keys = await key_fingerprints(world.device)
    for file in (*world.directory.glob("db.sqlite3*"), *world.directory.glob("ca-authority.json")):
        file.unlink()
    with pytest.raises(NotReadyError, match=before):
        async with world.server():
            pass
    assert await key_fingerprints(world.device) == keys


@pytest.mark.asyncio
async def test_a_first_start_that_died_over_its_key_goes_on(world: World) -> None:
    AuthorityMark(world.directory).store(())
    await world.device.keys.generate_key("x509-CA-A", KeyType.EC_P256)
    async with world.server() as manager:
        assert active_id(manager)


@pytest.mark.asyncio
async def test_an_authority_revoked_from_the_bundle_does_not_sign_again(world: World) -> None:
    async with world.server() as manager:
        before = active_id(manager)
        await manager._store.update_bundle(
            TD, lambda b: b.with_tainted_x509(before).without_x509(before)
        )
    async with world.server() as manager:
        assert active_id(manager) != before


@pytest.mark.asyncio
async def test_a_device_that_signs_wrongly_is_caught(world: World) -> None:
    async with world.server() as manager:
        world.device.bad_signatures = True
        with pytest.raises(SpireHwError, match="does not verify") as caught:
            await manager._issuer.x509_svid(
                spki=_spki(manager), spiffe_id=TD.member("w"), ttl=timedelta(minutes=5)
            )
        assert caught.value.kind is ErrorKind.INTERNAL
        with pytest.raises(SpireHwError, match="JWT-SVID"):
            await manager._issuer.jwt_svid(
                spiffe_id=TD.member("w"), audience=["a"], ttl=timedelta(minutes=5)
            )


@pytest.mark.asyncio
async def test_failures_are_counted_until_rotation_works_again(world: World) -> None:
    async with world.server() as manager:
        before = active_id(manager)
        world.device.away = True
        await world.clock.advance(timedelta(hours=12))
        for _ in range(11):
            await manager.tick()
        assert not healthy(manager)
        assert active_id(manager) == before
        world.device.away = False
        await manager.tick()
        assert healthy(manager)
        assert prepared_x509(manager) is not None


@pytest.mark.asyncio
async def test_a_key_of_which_nothing_could_be_made_is_taken_by_the_next_try(world: World) -> None:
    async def key() -> str:
        return (await key_fingerprints(world.device))["x509-CA-B"]

    async with world.server(jwt_enabled=False) as manager:
        await world.clock.advance(timedelta(hours=12))
        world.device.bad_signatures = True
        tried = []
        for _ in range(2):
            with pytest.raises(SpireHwError, match="verify"):
                await manager.rotate()
            tried.append(await key())
        # One that does not sign is no better the next time.
        assert tried[0] != tried[1]
        world.device.bad_signatures = False
        await manager.rotate()
        assert prepared_x509(manager) is not None
        assert await key() == tried[1]


@pytest.mark.asyncio
async def test_nothing_is_issued_past_the_authoritys_end(world: World) -> None:
    async with world.server() as manager:
        await world.clock.advance(timedelta(hours=23, minutes=30))
        issued = await manager._issuer.x509_svid(
            spki=_spki(manager), spiffe_id=TD.member("w"), ttl=timedelta(hours=1)
        )
        assert manager.x509_slots.active is not None
        assert issued.not_after == manager.x509_slots.active.not_after
        await world.clock.advance(timedelta(hours=1))
        with pytest.raises(SpireHwError, match="ended"):
            await manager._issuer.x509_svid(
                spki=_spki(manager), spiffe_id=TD.member("w"), ttl=timedelta(hours=1)
            )


@pytest.mark.asyncio
async def test_jwt_switched_off_leaves_jwt_records_alone(world: World) -> None:
    async with world.server() as manager:
        before = jwt_id(manager)
    async with world.server(jwt_enabled=False) as manager:
        assert manager.jwt_slots.active is None
        await manager.prepare_x509()
        with pytest.raises(NotReadyError, match="JWT"):
            _ = manager._issuer.jwt
    async with world.server() as manager:
        assert jwt_id(manager) == before


@pytest.mark.asyncio
async def test_authorities_by_hand(world: World) -> None:
    async with world.server() as manager:
        first = active_id(manager)
        with pytest.raises(NotReadyError):
            await manager.activate_x509("any")
        prepared = await manager.prepare_x509()
        with pytest.raises(InvalidInputError, match="not the prepared"):
            await manager.activate_x509("any")
        with pytest.raises(InvalidInputError, match="not the old"):
            await manager.taint_x509(prepared.authority_id)
        await manager.activate_x509(prepared.authority_id)
        with pytest.raises(InvalidInputError, match="current"):
            await manager.taint_x509(prepared.authority_id)
        with pytest.raises(InvalidInputError, match="no authority ID"):
            await manager.taint_x509("")
        with pytest.raises(InvalidInputError, match="not tainted"):
            await manager.revoke_x509(first)
        await manager.taint_x509(first)
        assert [r.tainted for r in manager._bundles.own.x509_authorities] == [True, False]
        await manager.revoke_x509(first)
        assert bundle_ids(manager) == [prepared.authority_id]
        assert manager.x509_slots.old is None
        key = jwt_id(manager)
        ready = await manager.prepare_jwt()
        await manager.activate_jwt(ready.authority_id)
        await manager.taint_jwt(key)
        await manager.revoke_jwt(key)
        assert manager._bundles.own.jwt_key(key) is None
    async with world.server() as manager:
        assert active_id(manager) == prepared.authority_id
        assert jwt_id(manager) == ready.authority_id


@pytest.mark.asyncio
async def test_preparing_by_hand_needs_an_active_authority(world: World) -> None:
    async with world.server(jwt_enabled=False) as manager:
        with pytest.raises(UnavailableError):
            await manager.prepare_jwt()


@pytest.mark.asyncio
async def test_journals_of_servers_long_gone_are_dropped(world: World) -> None:
    async with world.server() as manager:
        store = manager._store
        own = (await store.list_journals())[0]
        await store.save_journal(JournalRow(0, "aa", own.data))
        await store.save_journal(JournalRow(0, "bb", b"\xff"))
        for _ in range(17 * 4):
            await world.tick(manager, timedelta(hours=6))
        left = [r.active_x509_authority_id for r in await store.list_journals()]
        assert left == [active_id(manager), "bb"]


@pytest.mark.asyncio
async def test_the_loop_rotates_by_itself(world: World) -> None:
    failures: list[BaseException] = []
    tasks = Tasks(lambda name, error: failures.append(error))
    async with world.server() as manager:
        tasks.start("rotation", manager.run())
        await world.clock.advance(timedelta(hours=12))
        async with asyncio.timeout(20):
            while prepared_x509(manager) is None:
                await world.clock.advance(timedelta(seconds=10))
        await tasks.close()
    assert not failures
