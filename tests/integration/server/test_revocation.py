"""Certificates that are revoked while their nodes are attested."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw._pb import hw_posture_pb2 as pb
from spire_hw._pb import server_entry_pb2
from spire_hw.config.hcl import parse
from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError
from spire_hw.posture.verdict import NodeState
from spire_hw.tpm.certificate import parse_certificate
from spire_hw_sim.devidnode import DevIdLab
from spire_hw_sim.ekca import CrlSpec, EkCa
from spire_hw_sim.nodepki import PEM, make_root
from spire_hw_sim.servers import ENTRY, TIMEOUT_S, ScriptedAgent
from spire_hw_sim.tpmlab import Lab
from spire_hw_sim.watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from spire_hw.spiffeid import SpiffeId
    from spire_hw_sim.beater import Beater
    from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio

# Attestors look at their files once a minute, the server asks them twice as often.
A_LOOK = timedelta(minutes=2)
RARELY = 'heartbeat_interval = "1h"'


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    folder = tmp_path / "crls"
    folder.mkdir()
    return folder


@pytest_asyncio.fixture
async def site(short_dir: Path, clock: SimClock, lists: Path) -> AsyncIterator[Watch]:
    made = Watch(short_dir, clock)
    made.attestor = f'crl_path = "{lists}"'
    made.settings = RARELY
    yield made
    await made.close()


def publish(site: Watch, lists: Path, *revoked: Beater) -> None:
    """Write the vendor's list beside the one that is there, and put it in its place."""
    serials = []
    for beater in revoked:
        assert beater.node.certificate is not None
        serials.append(parse_certificate(beater.node.certificate).serial)
    new = lists / "vendor.new"
    new.write_bytes(site.keys.revocations(*serials))
    new.rename(lists / "vendor.crl")


async def refusal(work: Awaitable[object]) -> SpireHwError:
    with pytest.raises(SpireHwError) as caught:
        await work
    return caught.value


async def sync(agent: ScriptedAgent) -> None:
    path, answer = ENTRY + "GetAuthorizedEntries", server_entry_pb2.GetAuthorizedEntriesResponse
    await agent.call(path, server_entry_pb2.GetAuthorizedEntriesRequest(), answer)


async def state_of(site: Watch, agent_id: SpiffeId) -> pb.NodePosture:
    request = pb.GetStateRequest(agent_id=agent_id.text)
    found: pb.NodePosture = await site.admin("GetState", request, pb.NodePosture)
    return found


async def eventually(site: Watch, is_so: Callable[[], Awaitable[bool]]) -> None:
    """Let time pass until something has happened in the background."""
    async with asyncio.timeout(TIMEOUT_S):
        while not await is_so():
            await site.pass_time(timedelta(seconds=10))
            await asyncio.sleep(0.01)


async def is_cut_off(site: Watch, beater: Beater) -> bool:
    return (await site.state(beater)).state == "quarantined"


async def test_a_revoked_endorsement_key_takes_the_identity_away_at_once(
    site: Watch, lists: Path
) -> None:
    await site.start()
    gone, other = await site.known(), await site.known()
    async with site.streaming(gone) as stream:
        await sync(gone.agent)
        publish(site, lists, gone)
        await site.pass_time(A_LOOK, gone, other)
        said = await stream.state()
        assert said.state is NodeState.QUARANTINED
        assert said.reasons == ("ek_revoked",)
        assert said.message == "ek: certificate is revoked"
        denied = await refusal(sync(gone.agent))
        assert denied.kind is ErrorKind.PERMISSION_DENIED
        assert denied.message == "agent is in quarantine: ek_revoked"
    assert [r.occasion for r in await site.history(gone)] == ["revocation", "attestation"]
    await sync(other.agent)
    assert (await site.state(other)).state == "attested"
    refused = await refusal(gone.attest())
    assert refused.message.endswith("ek: certificate is revoked [ek_revoked]")


async def test_neither_good_evidence_nor_an_operator_brings_it_back_before_its_maker_does(
    site: Watch, lists: Path
) -> None:
    site.settings = ""
    await site.start()
    gone = await site.known()
    publish(site, lists, gone)
    await eventually(site, lambda: is_cut_off(site, gone))
    async with site.streaming(gone) as stream:
        said = await site.beat(stream)
    assert (said.state, said.reasons) == (NodeState.QUARANTINED, ("ek_revoked",))
    error = await refusal(site.by_hand("Release", gone))
    assert error.kind is ErrorKind.FAILED_PRECONDITION
    assert "does not hold: ek: certificate is revoked [ek_revoked]" in error.message
    publish(site, lists)
    await site.pass_time(A_LOOK)
    assert "quarantined: ek_revoked" in (await refusal(gone.attest())).message

    async def is_released() -> bool:
        said = await outcome(site.by_hand("Release", gone))
        return isinstance(said, pb.NodePosture) and said.state == "attested"

    await eventually(site, is_released)
    await gone.attest()
    await sync(gone.agent)


async def test_what_was_revoked_while_no_server_ran_is_found_at_start(
    site: Watch, lists: Path
) -> None:
    await site.start()
    gone, other = await site.known(), await site.known()
    await site.stop()
    publish(site, lists, gone)
    await site.start()
    gone.agent.port = other.agent.port = site.server.port
    await eventually(site, lambda: is_cut_off(site, gone))
    assert (await refusal(sync(gone.agent))).message == "agent is in quarantine: ek_revoked"
    await sync(other.agent)


async def test_a_quarantine_that_evidence_ends_becomes_one_that_it_does_not(
    site: Watch, lists: Path
) -> None:
    site.settings = ""
    await site.start()
    gone = await site.machine()
    site.allow(gone)
    await site.server.reconfigure()
    await gone.attest()
    good = dict(gone.node.tpm.pcrs)
    async with site.streaming(gone) as stream:
        gone.reboot()
        gone.measure(4, b"evil")
        assert (await site.beat(stream)).reasons == ("pcr_mismatch",)
    publish(site, lists, gone)

    async def is_revoked() -> bool:
        return list((await site.state(gone)).reasons) == ["ek_revoked"]

    await eventually(site, is_revoked)
    gone.reboot()
    gone.node.tpm.pcrs = good
    async with site.streaming(gone) as stream:
        assert (await site.beat(stream)).state is NodeState.QUARANTINED


async def test_who_attests_while_the_lists_change_is_found(site: Watch, lists: Path) -> None:
    site.attestor += ' challenge_timeout = "2m"'
    await site.start()
    known, late = await site.known(), await site.machine()

    async def change_the_lists() -> None:
        publish(site, lists, known, late)
        await eventually(site, lambda: is_cut_off(site, known))

    late.between = change_the_lists
    await late.attest()
    await sync(late.agent)
    await eventually(site, lambda: is_cut_off(site, late))


async def test_a_store_that_fails_does_not_save_who_is_revoked(
    site: Watch, lists: Path, short_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await site.start()
    gone = await site.known()
    with in_database(short_dir) as run:
        run("ALTER TABLE node_evidence RENAME TO away")
    publish(site, lists, gone)
    capsys.readouterr()
    said = ""

    async def has_failed() -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return "Certificates of a node cannot be looked at again" in said

    await eventually(site, has_failed)
    await sync(gone.agent)
    with in_database(short_dir) as run:
        run("ALTER TABLE away RENAME TO node_evidence")
    await eventually(site, lambda: is_cut_off(site, gone))


async def test_certificates_that_were_spoilt_keep_no_other_node_in(
    site: Watch, lists: Path, short_dir: Path
) -> None:
    await site.start()
    spoilt, gone = await site.known(), await site.known()
    with in_database(short_dir) as run:
        run(
            "UPDATE node_certificates SET certificates = x'00'"
            " WHERE node_row = (SELECT min(node_row) FROM node_certificates)"
        )
    publish(site, lists, gone)
    await eventually(site, lambda: is_cut_off(site, gone))
    await sync(spoilt.agent)


@contextmanager
def in_database(directory: Path) -> Iterator[Callable[[str], object]]:
    """Change the database behind the server's back."""
    connected = closing(sqlite3.connect(directory / "db.sqlite3", timeout=TIMEOUT_S))
    with connected as connection, connection:
        yield connection.execute


@pytest.mark.parametrize(("action", "state"), [("ban", "banned"), ("refuse", "attested")])
async def test_an_operator_says_what_revocation_does(
    site: Watch, lists: Path, action: str, state: str
) -> None:
    site.settings = f'{RARELY} drift {{ ek_revoked = "{action}" }}'
    await site.start()
    gone = await site.known()
    publish(site, lists, gone)
    await site.pass_time(A_LOOK)
    await site.pass_time(A_LOOK)

    async def is_so() -> bool:
        return (await site.state(gone)).state == state

    await eventually(site, is_so)
    assert "ek: certificate is revoked" in (await refusal(gone.attest())).message


async def test_lists_that_are_spoilt_or_gone_cut_nobody_off(site: Watch, lists: Path) -> None:
    await site.start()
    beater = await site.known()
    (lists / "vendor.crl").write_bytes(b"spoilt")
    await site.pass_time(A_LOOK)
    await site.pass_time(A_LOOK)
    await sync(beater.agent)
    (lists / "vendor.crl").unlink()
    await site.pass_time(A_LOOK)
    await site.pass_time(A_LOOK)
    await sync(beater.agent)
    assert (await site.state(beater)).state == "attested"


async def test_a_revoked_devid_is_out_at_once(site: Watch, lists: Path, tmp_path: Path) -> None:
    lab = await DevIdLab.make(tmp_path)
    lab.root = make_root("DevID Root", usage=("key_cert_sign", "crl_sign"))
    (tmp_path / "devid.pem").write_bytes(lab.root.certificate.public_bytes(PEM))
    site.plugins = f"""NodeAttestor "tpm_devid" {{ plugin_data {{
      devid_ca_path = "{tmp_path}/devid.pem" endorsement_ca_path = "{tmp_path}/makers.pem"
      devid_crl_path = "{lists}"
    }} }}"""
    await site.start()
    bundle, agents = await site.operator.bundle(), []
    nodes = [lab.node(), lab.node()]
    for node in nodes:
        agent = ScriptedAgent(site.server.port, bundle, site.clock)

        async def answer(challenge: bytes, node: object = node) -> bytes:
            return node.answer(challenge)  # type: ignore[attr-defined]

        await agent.prove("tpm_devid", node.payload(), answer)
        await sync(agent)
        agents.append(agent)
    gone, other = agents
    assert gone.spiffe_id is not None
    serial = parse_certificate(nodes[0].chain[0]).serial
    subject = lab.root.certificate.subject.public_bytes()
    issuer = EkCa(subject, lab.root.key, lab.root.der)
    (lists / "devid.crl").write_bytes(issuer.issue_crl(CrlSpec([serial])))

    async def is_so() -> bool:
        return isinstance(await outcome(sync(gone)), SpireHwError)

    await eventually(site, is_so)
    assert (await refusal(sync(gone))).message == "agent is in quarantine: devid_revoked"
    state = await state_of(site, gone.spiffe_id)
    assert (state.state, list(state.reasons)) == ("quarantined", ["devid_revoked"])
    await sync(other)


async def outcome(work: Awaitable[object]) -> object:
    """Return what work comes to, its error as well."""
    try:
        return await work
    except SpireHwError as e:
        return e


@pytest.mark.parametrize("lists_given", [True, False])
async def test_attestors_tell_whether_there_are_lists_to_ask(
    tmp_path: Path, lists: Path, *, lists_given: bool
) -> None:
    tpm = await Lab.make(tmp_path, f'crl_path = "{lists}"' if lists_given else "")
    devid = await DevIdLab.make(tmp_path)
    if lists_given:
        text = (
            f'devid_ca_path = "{tmp_path}/devid.pem" endorsement_ca_path = "{tmp_path}/makers.pem"'
        )
        await devid.server.configure(parse(f'{text} crl_path = "{lists}"'))
    if not lists_given:
        for lab in (tpm, devid):
            assert await lab.server.lists_version() is None
        return
    before = [await lab.server.lists_version() or 0 for lab in (tpm, devid)]
    assert [await lab.server.lists_version() for lab in (tpm, devid)] == before
    (lists / "new.crl").write_bytes(tpm.vendor.intermediate.issue_crl(CrlSpec()))
    for lab, version in zip((tpm, devid), before, strict=True):
        await lab.clock.advance(A_LOOK)
        after = await lab.server.lists_version()
        assert after is not None
        assert after > version


async def test_lists_in_another_place_are_a_change(tmp_path: Path, lists: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    devid, versions = await DevIdLab.make(tmp_path), [0]
    for names in ("crl_path", "devid_crl_path"), ("crl_path",), ("devid_crl_path",):
        for folder in (lists, other):
            more = " ".join(f'{name} = "{folder}"' for name in names)
            await devid.server.configure(
                parse(
                    f'devid_ca_path = "{tmp_path}/devid.pem"'
                    f' endorsement_ca_path = "{tmp_path}/makers.pem" {more}'
                )
            )
            version = await devid.server.lists_version()
            assert version is not None
            assert version > versions[-1]
            versions.append(version)


async def test_certificates_that_do_not_parse_are_an_error_and_not_a_verdict(
    tmp_path: Path, lists: Path
) -> None:
    tpm = await Lab.make(tmp_path, f'crl_path = "{lists}"')
    devid = await DevIdLab.make(tmp_path)
    for chains in (((b"garbage",),), ((b"a",), (b"b",)), ((),)):
        with pytest.raises(SpireHwError):
            await devid.server.recheck(chains)
    for chains in (((b"garbage",),), ((),)):
        with pytest.raises(InvalidInputError):
            await tpm.server.recheck(chains)
    assert await tpm.server.recheck(()) == []
