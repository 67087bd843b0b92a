"""Machines that contradict their own past, and nodes that were sent away, before a real store."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import structlog

from spire_hw.errors import ErrorKind, PluginError
from spire_hw.posture.verdict import NodeState
from spire_hw.spiffeid import SpiffeId, TrustDomain, agent_id
from spire_hw_plugins.nodeattestor.tpm.wire import (
    Response,
    decode_challenge,
    encode_attestation_data,
    encode_response,
)
from spire_hw_server.admission import Admissions
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.posture.postures import Postures
from spire_hw_server.postureconfig import PostureSettings
from spire_hw_sim.again import refused
from spire_hw_sim.softtpm import OWNER, SoftTpm, make_ak, make_ek
from spire_hw_sim.tpmlab import Lab

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_sim.tpmnode import TpmNode

pytestmark = pytest.mark.asyncio

TD = TrustDomain("example.org")
A_BOOT = timedelta(minutes=1)


@dataclass
class Machine:
    """A node and the kernel that runs on it."""

    node: TpmNode
    boot_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def id(self) -> SpiffeId:
        return agent_id(TD, "tpm", self.node.ek_hash)

    @property
    def tpm(self) -> SoftTpm:
        return self.node.tpm

    def copy(self) -> Machine:
        """Return it as it is now; what happens to the copy does not happen to it."""
        tpm = replace(self.tpm, pcrs=dict(self.tpm.pcrs))
        return Machine(replace(self.node, tpm=tpm), self.boot_id)

    def reboot(self) -> None:
        self.tpm.reset_count += 1
        self.tpm.restart_count = 0
        self.boot_id = str(uuid.uuid5(uuid.UUID(self.boot_id), "next"))

    def payload(self) -> bytes:
        return encode_attestation_data(replace(self.node.data(), boot_id=self.boot_id))


@dataclass
class Site:
    """The admission of a server that remembers machines."""

    lab: Lab
    store: Datastore
    postures: Postures
    admissions: Admissions

    def machine(self, tpm: SoftTpm | None = None) -> Machine:
        made = Machine(self.lab.node(tpm))
        made.tpm.restart_count = 1
        return made

    async def attest(
        self, machine: Machine, bend: Callable[[Response], Response] | None = None
    ) -> None:
        """Let a machine attest and store it, as a server does after its SVID was signed."""
        node = machine.node

        async def answer(message: bytes) -> bytes:
            honest = node.respond(decode_challenge(message))
            return encode_response(honest if bend is None else bend(honest))

        assert node.spki is not None
        try:
            admission = await self.admissions.admit("tpm", machine.payload(), node.spki, answer)
            expires = self.lab.clock.now() + timedelta(hours=1)
            await self.admissions.store(admission, serial_number="1", expires_at=expires)
        except PluginError as e:
            if e.__cause__ is None:
                raise
            raise e.__cause__ from e

    async def forget(self, machine: Machine) -> None:
        """Evict a node, as an operator does."""
        if await self.store.find_node(machine.id) is not None:
            await self.store.delete_node(machine.id)
        self.postures.ledger.forget(machine.id)

    async def state(self, machine: Machine) -> str:
        posture = await self.store.get_posture(machine.id)
        assert posture is not None
        return posture.state


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    vendor_lab = await Lab.make(tmp_path)
    clock = vendor_lab.clock
    log = structlog.wrap_logger(structlog.ReturnLogger(), processors=[lambda *_: ""])
    config = DatastoreConfig("sqlite3", str(tmp_path / "d"))
    store = await open_datastore(config, clock=clock, log=log)
    postures = Postures(
        store,
        PostureSettings(given=True, heartbeat_interval=timedelta(seconds=60)),
        trust_domain=TD,
        node_of=store.find_node,
        poll_s=5,
        full_reload_s=60,
        clock=clock,
        log=log,
    )
    await postures.start()
    text = "allow_owner_ak = true\npcrs = { sha256 = [0, 1, 2, 3, 4, 5, 6, 7] }\n"
    lab = await Lab.make(tmp_path, text, judge=postures.judge, vendor=vendor_lab.vendor)
    admissions = Admissions(
        store,
        trust_domain=TD,
        attestors={"tpm": lab.server},
        clock=clock,
        log=log,
        judge=postures.judge,
    )
    lab.clock = clock
    yield Site(lab, store, postures, admissions)
    await postures.close()
    await store.close()


def fewer_resets(machine: Machine) -> None:
    machine.tpm.reset_count -= 1
    machine.boot_id = str(uuid.UUID(int=7))


def fewer_restarts(machine: Machine) -> None:
    machine.tpm.restart_count -= 1


def earlier_clock(machine: Machine) -> None:
    machine.tpm.clock_ms -= 1


def reset_alone(machine: Machine) -> None:
    machine.tpm.reset_count += 1


def other_pcr(machine: Machine) -> None:
    machine.tpm.pcrs["sha256", 2] = b"x" * 32


def lost_pcrs(machine: Machine) -> None:
    machine.tpm.restart_count += 1
    machine.tpm.pcrs["sha256", 0] = bytes(32)


def other_firmware(machine: Machine) -> None:
    machine.reboot()
    machine.tpm.firmware_version += 1


def other_kernel(machine: Machine) -> None:
    machine.boot_id = str(uuid.UUID(int=8))
    machine.tpm.clock_ms -= 1


def unused_bank(machine: Machine) -> None:
    machine.reboot()
    for number in range(8):
        machine.tpm.pcrs["sha256", number] = bytes(32)


ATTESTED, BANNED = NodeState.ATTESTED.value, NodeState.BANNED.value
QUARANTINED = NodeState.QUARANTINED.value
CHANGES: dict[str, tuple[Callable[[Machine], None], str, str]] = {
    "fewer resets": (fewer_resets, "tpm_replaced", BANNED),
    "fewer restarts": (fewer_restarts, "counter_rollback", ATTESTED),
    "earlier clock": (earlier_clock, "clock_rollback", ATTESTED),
    "reset without a boot": (reset_alone, "tpm_reset_without_reboot", QUARANTINED),
    "PCR": (other_pcr, "pcr_changed_without_reset", BANNED),
    "PCRs lost on resume": (lost_pcrs, "pcr_lost", QUARANTINED),
    "firmware of the TPM": (other_firmware, "tpm_firmware", QUARANTINED),
    "another kernel beside": (other_kernel, "cloned_tpm", QUARANTINED),
    "bank that is not used": (unused_bank, "bank_unused", QUARANTINED),
}


@pytest.mark.parametrize("row", CHANGES)
async def test_change_that_nothing_explains(site: Site, row: str) -> None:
    change, reason, state = CHANGES[row]
    honest = site.machine()
    bent = honest.copy()
    change(bent)

    async def act() -> None:
        await site.forget(honest)
        await site.attest(honest)
        await site.lab.clock.advance(A_BOOT)
        await site.attest(bent)

    error = await refused(act)
    assert error.kind is ErrorKind.PERMISSION_DENIED
    assert f"[{reason}]" in error.message
    assert await site.state(honest) == state


async def test_another_key_that_hides_the_counters(site: Site) -> None:
    ek = make_ek("L-2")
    shown = site.machine(SoftTpm(ek=ek))
    hidden = Machine(
        site.lab.node(SoftTpm(ek=ek, ak=make_ak(parent=OWNER), scramble=0xB3560170)), shown.boot_id
    )
    await site.attest(shown)
    await site.lab.clock.advance(A_BOOT)
    error = await refused(lambda: site.attest(hidden, lambda r: replace(r, time=None)))
    assert error.kind is ErrorKind.PERMISSION_DENIED
    assert "[ak_changed]" in error.message
    assert await site.state(shown) == ATTESTED
    await site.attest(shown)


async def test_another_tpm_under_one_identity(site: Site) -> None:
    """No attestor gives two TPMs one ID, so that the judge is asked."""
    known, other = site.machine(), site.machine()
    await site.attest(known)
    last = await site.postures.ledger.get(known.id, fresh=True)
    assert last is not None
    assert last.memory is not None
    evidence = last.memory.last
    shown = replace(evidence, ek=replace(evidence.ek, hash=other.node.ek_hash))
    error = await refused(lambda: site.postures.judge.judge(known.id, shown))
    assert error.kind is ErrorKind.PERMISSION_DENIED
    assert "[duplicate_id]" in error.message
    assert await site.state(known) == ATTESTED


@pytest.mark.parametrize("row", ["banned", "quarantined"])
async def test_node_that_was_sent_away(site: Site, row: str) -> None:
    machine = site.machine()
    await site.attest(machine)
    if row == "banned":
        await site.store.ban_node(machine.id)
    else:
        await site.postures.operators.quarantine(machine.id, "looks odd")
    before: Any = await site.store.get_node(machine.id)
    error = await refused(lambda: site.attest(machine))
    assert error.kind is ErrorKind.PERMISSION_DENIED
    assert row in error.message
    assert await site.store.get_node(machine.id) == before


async def test_banned_node_with_another_certificate(site: Site) -> None:
    machine = site.machine()
    await site.attest(machine)
    await site.store.ban_node(machine.id)
    machine.node.certificate = site.lab.vendor.certify(machine.tpm)
    machine.reboot()
    error = await refused(lambda: site.attest(machine))
    assert error.kind is ErrorKind.PERMISSION_DENIED
    assert "is banned" in error.message


async def test_evicted_node_does_not_come_back_by_its_last_exchange(site: Site) -> None:
    machine = site.machine()
    said: list[Response] = []

    def keep(response: Response) -> Response:
        said.append(response)
        return response

    await site.attest(machine, keep)
    await site.forget(machine)
    error = await refused(lambda: site.attest(machine, lambda _: said[0]))
    assert error.message == "challenge: secret does not match [secret_mismatch]"
    assert await site.store.find_node(machine.id) is None
    await site.attest(machine)
