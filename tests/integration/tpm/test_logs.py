"""Boot log and IMA list of a machine over a real TPM, from the kernel's files to the verdict."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from spire_hw.config.hcl import Body
from spire_hw.errors import (
    AttestationError,
    ErrorKind,
    InvalidInputError,
    LimitError,
    NotReadyError,
    SpireHwError,
)
from spire_hw.plugin.info import PluginKind, Side
from spire_hw.posture.heartbeat import HeartbeatChallenge, KnownNode
from spire_hw.posture.judge import EvidenceRequest
from spire_hw.posture.policy import ima_start
from spire_hw_sim.again import refused
from spire_hw_sim.firmware import Firmware
from spire_hw_sim.imawriter import ImaList
from tests.integration.goplugin.wire import remote_of
from tests.integration.tpm.leaks import nothing_left_behind
from tests.integration.tpm.parties import Bench, Exchange, Node, attest, codes, node, serving

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spire_hw.posture.evidence import Evidence, ImaState
    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.asyncio
LOGS = {"boot_log": True, "ima": True}
BANKS = ("sha256",)
SPKI = hashlib.sha256(b"the key of the SVID on the stream").digest()
NOW = datetime(2026, 6, 1, tzinfo=UTC)


@dataclass
class Machine:
    """A machine around a TPM: its kernel's files, and what it goes on to run."""

    tpm: Swtpm
    folder: Path
    listed: ImaList

    @classmethod
    def start(cls, tpm: Swtpm, folder: Path, firmware: Firmware | None = None) -> Machine:
        """Boot."""
        tpm.reset()
        boot = (firmware or Firmware()).boot()
        boot.run(tpm, BANKS)
        folder.joinpath("log").write_bytes(boot.log())
        made = cls(tpm, folder, ImaList.start(boot.values("sha256")))
        made.listed.run(tpm, BANKS)
        made.write()
        return made

    def run(self, count: int, prefix: str = "/usr/bin/tool") -> None:
        """Run programs."""
        before = len(self.listed.items)
        self.listed = self.listed.files(count, prefix=prefix)
        self.listed.run(self.tpm, BANKS, first=before)
        self.write()

    def write(self) -> None:
        self.folder.joinpath("ima").write_bytes(self.listed.ascii())

    async def let_show(self, n: Node, **more: object) -> None:
        """Tell an agent where the files are."""
        settings = {
            "tcti": self.tpm.tcti,
            "boot_log_path": str(self.folder / "log"),
            "ima_log_path": str(self.folder / "ima"),
        }
        await n.agent.configure(Body.from_dict(settings | more))


async def proved(n: Node, bench: Bench, stream: Exchange | None = None) -> Evidence:
    found = await attest(n.agent, await serving(bench, **LOGS), n.key, stream)
    assert found.evidence is not None
    return found.evidence


async def test_a_clean_boot_and_what_ran_since(bench: Bench, tpm: Swtpm) -> None:
    machine = Machine.start(tpm, bench.folder)
    machine.run(20)
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        with nothing_left_behind(tpm):
            evidence = await proved(n, bench)
    assert evidence.boot is not None
    assert evidence.boot.secure_boot is True
    assert evidence.ima is not None
    assert [entry.path for entry in evidence.ima.entries] == [
        f"/usr/bin/tool{number}".encode() for number in range(20)
    ]


async def test_secure_boot_off_is_a_selector(bench: Bench, tpm: Swtpm) -> None:
    machine = Machine.start(tpm, bench.folder, Firmware(secure_boot=False))
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        found = await attest(n.agent, await serving(bench, boot_log=True), n.key)
    assert "secureboot:off" in found.selector_values


async def test_a_list_in_rounds(bench: Bench, tpm: Swtpm) -> None:
    machine = Machine.start(tpm, bench.folder)
    machine.run(300)

    def narrow(data: bytes) -> bytes:
        message = json.loads(data)
        if "EC" in message:
            message["spire_hw"]["limits"]["response_bytes"] = 16 * 1024
        return json.dumps(message).encode()

    stream = Exchange(on_challenge=narrow)
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        evidence = await proved(n, bench, stream)
    assert evidence.ima is not None
    assert evidence.ima.state.count == 301
    assert len(stream.sent) > 4
    assert all(len(message) <= 16 * 1024 for message in stream.sent[1:])


async def test_the_list_may_grow_after_the_quote(bench: Bench, tpm: Swtpm) -> None:
    machine = Machine.start(tpm, bench.folder)
    machine.run(5)
    late = machine.listed.files(3, prefix="/late")
    bench.folder.joinpath("ima").write_bytes(late.ascii())
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        evidence = await proved(n, bench)
    assert evidence.ima is not None
    assert evidence.ima.state.count == 6


async def test_a_log_that_was_edited_is_refused(bench: Bench, tpm: Swtpm) -> None:
    machine = Machine.start(tpm, bench.folder, Firmware(kernel=b"evil kernel"))
    bench.folder.joinpath("log").write_bytes(Firmware().boot().log())
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        with nothing_left_behind(tpm), pytest.raises(AttestationError) as caught:
            await proved(n, bench)
    assert codes(caught.value)[0] == "log_replay"


async def test_a_program_left_out_of_the_list_is_noticed(bench: Bench, tpm: Swtpm) -> None:
    machine = Machine.start(tpm, bench.folder)
    machine.run(5)
    hidden = replace(machine.listed, items=(*machine.listed.items[:3], *machine.listed.items[4:]))
    bench.folder.joinpath("ima").write_bytes(hidden.ascii())
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        with pytest.raises(AttestationError) as caught:
            await proved(n, bench)
    assert codes(caught.value) == ["ima_replay"]


# --- whom it is shown, and where it is ----------------------------------------------------------


async def test_nothing_is_shown_to_a_server_nobody_verified(bench: Bench, tpm: Swtpm) -> None:
    machine = Machine.start(tpm, bench.folder)
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        stream = Exchange(server_verified=False)

        async def act() -> object:
            stream.sent.clear()
            return await proved(n, bench, stream)

        with nothing_left_behind(tpm):
            withheld = await refused(act)
        assert isinstance(withheld, NotReadyError)
        assert "withheld" in withheld.message
        assert len(stream.sent) == 1
        found = await attest(n.agent, await serving(bench), n.key, Exchange(server_verified=False))
        assert "tier:quote" in found.selector_values
        await machine.let_show(n, insecure_evidence=True)
        await proved(n, bench, Exchange(server_verified=False))


async def test_a_machine_without_a_log_says_so(bench: Bench, tpm: Swtpm) -> None:
    machine = Machine.start(tpm, bench.folder)
    bench.folder.joinpath("log").unlink()
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        with pytest.raises(AttestationError) as caught:
            await proved(n, bench)
        assert codes(caught.value) == ["log_missing"]
        bench.folder.joinpath("ima").unlink()
        with pytest.raises(NotReadyError, match="no IMA list at"):
            await attest(n.agent, await serving(bench, ima=True), n.key)


async def test_a_file_that_cannot_be_read_is_named(bench: Bench, tpm: Swtpm) -> None:
    machine = Machine.start(tpm, bench.folder)
    bench.folder.joinpath("ima").unlink()
    bench.folder.joinpath("ima").mkdir()
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        with nothing_left_behind(tpm), pytest.raises(NotReadyError, match="cannot be read"):
            await attest(n.agent, await serving(bench, ima=True), n.key)


async def test_a_log_larger_than_any_server_takes_is_not_shown(bench: Bench, tpm: Swtpm) -> None:
    machine = Machine.start(tpm, bench.folder)
    bench.folder.joinpath("log").write_bytes(bytes(512 * 1024 + 1))
    bench.folder.joinpath("ima").write_bytes(b"x\n" * (4 * 1024 * 1024 + 1))
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        with pytest.raises(AttestationError) as caught:
            await attest(n.agent, await serving(bench, boot_log=True), n.key)
        assert codes(caught.value) == ["log_missing"]
        with pytest.raises(LimitError, match="larger than 8388608 bytes"):
            await attest(n.agent, await serving(bench, ima=True), n.key)


def _ask(**changes: object) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        message = json.loads(data)
        message["spire_hw"].update(changes)
        return json.dumps(message).encode()

    return change


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], type[Exception], str]] = {
    "no PCR at all": (_ask(quote=[]), InvalidInputError, "names no PCR"),
    "a path": (_ask(path="/etc/shadow"), InvalidInputError, "unknown member"),
    "another log": (_ask(want=["/etc/shadow"]), InvalidInputError, "not known"),
    "small limit": (
        lambda d: _ask(limits={"log_bytes": 5})(_ask(want=["log"])(d)),
        LimitError,
        "all the server takes",
    ),
    "counters of an honest key": (_ask(want=["time"]), InvalidInputError, "hides no counters"),
}


@pytest.mark.parametrize("row", HOSTILE)
async def test_a_hostile_server_gets_nothing(bench: Bench, tpm: Swtpm, row: str) -> None:
    change, kind, words = HOSTILE[row]
    machine = Machine.start(tpm, bench.folder)
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        stream = Exchange(on_challenge=change)
        with nothing_left_behind(tpm), pytest.raises(kind, match=words):
            await attest(n.agent, await serving(bench), n.key, stream)
        assert len(stream.sent) == 1


@pytest.mark.parametrize(("start", "words"), [(7, "does not go on there"), (0, "too many rounds")])
async def test_a_server_that_asks_without_end(
    bench: Bench, tpm: Swtpm, start: int, words: str
) -> None:
    machine = Machine.start(tpm, bench.folder)
    machine.run(5)

    @dataclass
    class Endless(Exchange):
        """A server that goes on asking after it has all."""

        async def next_challenge(self) -> bytes | None:
            ours = {"v": 2, "want": ["ima"], "ima_from": start}
            return json.dumps({"spire_hw": ours}).encode()

    streams: list[Endless] = []
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        error = LimitError if start == 0 else InvalidInputError
        server = await serving(bench, ima=True)

        async def act() -> object:
            streams[:] = [Endless()]
            return await attest(n.agent, server, n.key, streams[0])

        found = await refused(act)
        assert isinstance(found, error)
        assert words in found.message
    assert len(streams[0].sent) <= 2 + 64


async def test_under_hosts_that_are_not_ours(bench: Bench, tpm: Swtpm) -> None:
    """Both halves as external plugins: several rounds, and a server nobody tells to be verified."""
    machine = Machine.start(tpm, bench.folder)
    machine.run(300)

    def narrow(data: bytes) -> bytes:
        message = json.loads(data)
        if "EC" in message:
            message["spire_hw"]["limits"]["response_bytes"] = 16 * 1024
        return json.dumps(message).encode()

    kind, folders = PluginKind.NODE_ATTESTOR, [bench.folder / name for name in ("a", "s")]
    for folder in folders:
        folder.mkdir()
    server = await serving(bench, ima=True, require_tpm_key=False)
    async with (
        node(bench, tpm) as n,
        remote_of(n.agent, kind, folders[0], Side.AGENT) as agent,
        remote_of(server, kind, folders[1], Side.SERVER) as judge,
    ):
        await machine.let_show(n)
        with pytest.raises(SpireHwError, match="withheld from an unverified server"):
            await attest(agent, judge, n.key, Exchange())
        await machine.let_show(n, insecure_evidence=True)
        stream = Exchange(on_challenge=narrow)
        found = await attest(agent, judge, n.key, stream)
    assert "tier:quote" in found.selector_values
    assert len(stream.sent) > 4


# --- heartbeats ---------------------------------------------------------------------------------

PCRS = (("sha256", tuple(range(11))),)


async def beat(
    n: Node,
    bench: Bench,
    who: KnownNode,
    wanted: EvidenceRequest,
    seen: EvidenceRequest | None = None,
) -> Evidence:
    """Do one heartbeat; `seen` is what crosses the wire, when that is less."""
    server = await serving(bench)
    nonce = secrets.token_bytes(32)
    answer = await n.agent.heartbeat(HeartbeatChallenge(nonce, seen or wanted), SPKI)
    return await server.check_heartbeat(who, HeartbeatChallenge(nonce, wanted), answer, NOW)


def known(evidence: Evidence) -> KnownNode:
    return KnownNode(
        evidence.ek,
        evidence.ak_public,
        evidence.ak_hierarchy,
        SPKI,
        evidence.key_in_tpm,
        evidence.ak_qualified_name,
    )


def going_on(evidence: Evidence) -> EvidenceRequest:
    assert evidence.ima is not None
    assert evidence.counters is not None
    return EvidenceRequest(PCRS, ima=evidence.ima.state, reset_count=evidence.counters.reset_count)


def on_the_wire(wanted: EvidenceRequest) -> EvidenceRequest:
    """Return what the agent gets to see: of a state, its count."""
    assert wanted.ima is not None
    return replace(wanted, ima=replace(wanted.ima, pcr=b"", sha256=b""))


async def test_heartbeats_show_what_came_since(bench: Bench, tpm: Swtpm) -> None:
    machine = Machine.start(tpm, bench.folder)
    machine.run(5)
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        evidence = await proved(n, bench)
        who, wanted = known(evidence), going_on(evidence)
        nothing = await beat(n, bench, who, wanted, on_the_wire(wanted))
        assert nothing.ima is not None
        assert nothing.ima.entries == ()
        assert wanted.ima is not None
        assert (nothing.ima.state.count, nothing.ima.state.pcr) == (6, wanted.ima.pcr)
        machine.run(3, prefix="/opt/new")
        more = await beat(n, bench, who, wanted, on_the_wire(wanted))
        assert more.ima is not None
        assert [entry.path for entry in more.ima.entries] == [
            b"/opt/new0",
            b"/opt/new1",
            b"/opt/new2",
        ]
        assert (more.ima.start, more.ima.state.count) == (6, 9)
        log = await beat(n, bench, who, EvidenceRequest(PCRS, boot_log=True))
        assert log.boot == evidence.boot


async def test_after_a_reboot_the_list_starts_anew(bench: Bench, tpm: Swtpm) -> None:
    machine = Machine.start(tpm, bench.folder)
    machine.run(5)
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        evidence = await proved(n, bench)
        who, wanted = known(evidence), going_on(evidence)
        machine = Machine.start(tpm, bench.folder)
        machine.run(9)
        fresh = await beat(n, bench, who, wanted, on_the_wire(wanted))
        assert fresh.ima is not None
        assert (fresh.ima.start, fresh.ima.state.count) == (0, 10)
        with pytest.raises(AttestationError) as caught:
            await beat(n, bench, who, wanted, replace(on_the_wire(wanted), reset_count=None))
        assert codes(caught.value) == ["ima_restart"]
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


async def test_a_list_that_was_rewritten_is_a_rollback(bench: Bench, tpm: Swtpm) -> None:
    """What the host does: a part that does not replay has it ask for the whole list."""
    machine = Machine.start(tpm, bench.folder)
    machine.run(5)
    async with node(bench, tpm) as n:
        await machine.let_show(n)
        evidence = await proved(n, bench)
        wanted = going_on(evidence)
        assert wanted.ima is not None
        other = replace(wanted, ima=replace(wanted.ima, pcr=hashlib.sha256(b"other").digest()))
        with pytest.raises(AttestationError) as caught:
            await beat(n, bench, known(evidence), other)
        assert codes(caught.value) == ["ima_replay"]
        whole: ImaState = ima_start("sha256")
        again = replace(other, ima=whole, known_ima=other.ima)
        told = await beat(n, bench, known(evidence), again)
        assert [finding.code for finding in told.findings] == ["ima_rollback"]
        assert told.findings[0].kind is ErrorKind.PERMISSION_DENIED
        assert told.ima is None
        honest = replace(wanted, ima=whole, known_ima=wanted.ima)
        assert (await beat(n, bench, known(evidence), honest)).ima is not None
