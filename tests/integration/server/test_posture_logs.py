"""Boot logs and IMA lists over heartbeats: asked for when needed, kept, and judged again as a whole."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw._pb import hw_posture_pb2 as pb
from spire_hw.errors import LimitError
from spire_hw.posture.document import decode_evidence
from spire_hw.posture.verdict import NodeState
from spire_hw_sim.firmware import Firmware
from spire_hw_sim.imawriter import ImaList, Item
from spire_hw_sim.watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw.posture.evidence import Evidence
    from spire_hw_sim.beater import Beater
    from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio

EMPTY = zlib.compress(b"")
EVIL = Item(b"/usr/bin/evil", hashlib.sha256(b"evil").digest())


class Machine:
    """A machine with a boot log and an IMA list."""

    def __init__(self, beater: Beater) -> None:
        self.beater = beater
        self.list = ImaList()
        self.boot()

    def boot(self, files: int = 5) -> None:
        """Start it, and a few programs."""
        boot = Firmware().boot()
        node = self.beater.node
        node.tpm.pcrs |= boot.pcrs("sha256")
        node.boot_log = boot.log()
        self.show(ImaList.start(boot.values("sha256")).files(files))

    def show(self, listed: ImaList) -> None:
        """Have another list."""
        self.list = listed
        self.beater.node.ima = listed.ascii()
        self.beater.node.tpm.pcrs["sha256", 10] = listed.pcr()

    def run(self, *items: Item) -> None:
        """Run further programs."""
        self.show(self.list.measure(*items))


def policy(*more: Item, without: int = 0) -> str:
    """Return a policy that allows what a machine runs from the start, and more."""
    names = [f"/usr/bin/tool{n}".encode() for n in range(without, 5)]
    allowed = [(hashlib.sha256(name).hexdigest(), name) for name in names]
    allowed += [(item.digest.hex(), item.path) for item in more]
    lines = ", ".join(f'"{digest}  {name.decode()}"' for digest, name in allowed)
    return f'policy "web" {{ boot {{ secure_boot = "on" }} ima {{ allow = [{lines}] }} }}'


async def _shown(site: Watch, machine: Machine) -> Evidence:
    request = pb.GetEvidenceRequest(agent_id=machine.beater.id.text)
    found = await site.admin("GetEvidence", request, pb.GetEvidenceResponse)
    return decode_evidence(found.document)


@pytest_asyncio.fixture
async def site(short_dir: Path, clock: SimClock) -> AsyncIterator[Watch]:
    made = Watch(short_dir, clock)
    made.write_policy(policy())
    await made.start()
    yield made
    await made.close()


@pytest_asyncio.fixture
async def machine(site: Watch) -> Machine:
    made = Machine(await site.machine())
    await made.beater.attest()
    return made


async def test_boot_log_is_asked_for_once_and_the_list_from_where_it_ended(
    site: Watch, machine: Machine
) -> None:
    async with site.streaming(machine.beater) as stream:
        challenge = await site.challenge(stream)
        assert not challenge.wanted.boot_log
        assert challenge.wanted.ima is not None
        assert challenge.wanted.ima.count == len(machine.list.items)
        assert challenge.wanted.reset_count == machine.beater.node.tpm.reset_count
        await stream.raw.answer(machine.beater.answer(challenge))
        assert (await stream.state()).reasons == ()


async def test_a_list_comes_in_parts(site: Watch, machine: Machine) -> None:
    machine.beater.node.part_lines = 2
    async with site.streaming(machine.beater) as stream:
        machine.beater.reboot()
        machine.boot()
        said = await site.beat(stream)
        assert (said.state, said.reattest) == (NodeState.ATTESTED, True)
        shown = await _shown(site, machine)
        assert shown.ima is not None
        assert len(shown.ima.entries) == 5


async def test_too_many_parts_are_refused(site: Watch, machine: Machine) -> None:
    async with site.streaming(machine.beater) as stream:
        machine.beater.reboot()
        machine.boot()
        answer = machine.beater.answer(await site.challenge(stream))
        await stream.raw.answer(replace(answer, ima=(answer.ima or ()) + (EMPTY,) * 16))
        with pytest.raises(LimitError, match="more than 16 parts"):
            await stream.state()


async def test_after_a_reboot_everything_is_shown_anew(site: Watch, machine: Machine) -> None:
    async with site.streaming(machine.beater) as stream:
        machine.beater.reboot()
        machine.boot(files=2)
        said = await site.beat(stream)
        assert (said.state, said.reattest) == (NodeState.ATTESTED, True)
        shown = await _shown(site, machine)
        assert shown.boot is not None
        assert shown.ima is not None
        assert len(shown.ima.entries) == 2
        machine.boot(files=3)
        said = await site.beat(stream)
        assert (said.state, said.reasons) == (NodeState.ATTESTED, ())


async def test_unknown_file_takes_the_identity_away_until_the_next_boot(
    site: Watch, machine: Machine
) -> None:
    async with site.streaming(machine.beater) as stream:
        machine.run(EVIL)
        for _ in range(2):
            said = await site.beat(stream)
            assert (said.state, said.reasons) == (NodeState.QUARANTINED, ("ima_unknown_file",))
        machine.beater.reboot()
        machine.boot()
        assert (await site.beat(stream)).state is NodeState.ATTESTED


async def test_rewritten_list_bans(site: Watch, machine: Machine) -> None:
    async with site.streaming(machine.beater) as stream:
        assert (await site.beat(stream)).reasons == ()
        machine.show(machine.list.changed(2, bytes(32)))
        said = await site.beat(stream)
        assert (said.state, said.reasons) == (NodeState.BANNED, ("ima_rollback",))


async def test_list_that_is_garbage_changes_nothing(site: Watch, machine: Machine) -> None:
    pcrs = machine.beater.node.tpm.pcrs
    async with site.streaming(machine.beater) as stream:
        good, pcrs["sha256", 10] = pcrs["sha256", 10], b"x" * 32
        for _ in range(2):
            said = await site.beat(stream)
            assert (said.state, said.reasons) == (NodeState.ATTESTED, ("ima_replay",))
        assert len(await site.history(machine.beater)) == 1
        pcrs["sha256", 10] = good
        assert (await site.beat(stream)).reasons == ()


async def test_changed_policy_is_held_against_the_whole_list(site: Watch, machine: Machine) -> None:
    more = Item(b"/usr/bin/more", hashlib.sha256(b"more").digest())
    site.write_policy(policy(more))
    await site.server.reconfigure()
    async with site.streaming(machine.beater) as stream:
        # The policy is another one: the list is judged from its start.
        assert (await site.beat(stream)).state is NodeState.ATTESTED
        machine.run(more)
        assert (await site.beat(stream)).state is NodeState.ATTESTED
        request = pb.GetEvidenceRequest(agent_id=machine.beater.id.text)
        found = await site.admin("GetEvidence", request, pb.GetEvidenceResponse)
        shown = decode_evidence(found.document).ima
        assert shown is not None
        assert [e.path for e in shown.entries][-2:] == [b"/usr/bin/tool4", b"/usr/bin/more"]
        # A file of the first part, which no heartbeat shows any more.
        site.write_policy(policy(more, without=1))
        await site.server.reconfigure()
        said = await stream.state()
        assert (said.state, said.reasons) == (NodeState.QUARANTINED, ("ima_unknown_file",))
        # Nor does an empty rest of the list heal it.
        said = await site.beat(stream)
        assert said.state is NodeState.QUARANTINED
        site.write_policy(policy(more))
        await site.server.reconfigure()
        assert (await site.beat(stream)).state is NodeState.ATTESTED
