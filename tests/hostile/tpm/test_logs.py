"""Groups G to I as far as the exchange is concerned: time statement, boot log, IMA list, rounds."""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.errors import AttestationError, ErrorKind, Finding, LimitError, SpireHwError
from spire_hw.posture.evidence import Evidence, ImaState, Occasion, Tier
from spire_hw.posture.judge import EvidenceRequest
from spire_hw.posture.policy import ima_start
from spire_hw.posture.verdict import Verdict
from spire_hw.tpm import imalist
from spire_hw_plugins.nodeattestor.tpm import rounds, wire
from spire_hw_sim.firmware import EV_SEPARATOR, Boot, Firmware, Measurement
from spire_hw_sim.imawriter import ImaList
from spire_hw_sim.softtpm import OWNER, SoftTpm, make_ak, make_ek
from spire_hw_sim.tpmlab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spire_hw.posture.evidence import EkFacts
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_sim.tpmnode import TpmNode

pytestmark = pytest.mark.asyncio
IA, PD, RE = (
    ErrorKind.INVALID_ARGUMENT,
    ErrorKind.PERMISSION_DENIED,
    ErrorKind.RESOURCE_EXHAUSTED,
)
LOGS = "boot_log = true\nima = true\n"
START = ima_start("sha256")
_SEEN = 8


@dataclass
class Wants:
    """A host's judge that asks one node for something and lets everything pass.

    The first that comes is that one.
    """

    asked: EvidenceRequest | None = None
    first: str = ""
    seen: list[Evidence] = field(default_factory=list)
    selectors: tuple[str, ...] = ("boot:policy:web@7",)

    async def request(self, agent_id: SpiffeId, ek: EkFacts) -> EvidenceRequest:
        assert agent_id.path.endswith(ek.hash)
        if self.asked is not None:
            self.first = self.first or ek.hash
        return self.asked if self.asked and ek.hash == self.first else EvidenceRequest()

    async def judge(self, agent_id: SpiffeId, evidence: Evidence) -> Verdict:
        assert agent_id.path.endswith(evidence.ek.hash)
        del self.seen[_SEEN:]
        self.seen.append(evidence)
        return Verdict("web", 7, "00" * 32, (), self.selectors)


def booted(lab: Lab, files: int = 20) -> tuple[TpmNode, ImaList]:
    """Return a node after a clean boot and a few programs."""
    boot = Firmware().boot()
    listed = ImaList.start(boot.values("sha256")).files(files)
    node = lab.node(SoftTpm(ek=make_ek("L-2"), pcrs=boot.pcrs("sha256")))
    node.boot_log, node.ima = boot.log(), listed.ascii()
    node.tpm.pcrs["sha256", 10] = listed.pcr()
    return node, listed


async def refusal(lab: Lab, node: TpmNode, **bends: Any) -> SpireHwError:
    """Return the error of a bent exchange, after which an honest node attests."""
    return await lab.refusal(node, afterwards=booted(lab)[0], **bends)


def codes(error: SpireHwError) -> list[str]:
    assert isinstance(error, AttestationError)
    return [finding.code for finding in error.findings]


# --- what is proved -----------------------------------------------------------------------------


async def test_logs_become_evidence_and_selectors(tmp_path: Path) -> None:
    judge = Wants()
    lab = await Lab.make(tmp_path, LOGS + "pcrs = { sha256 = [11, 14] }", judge=judge)
    node, listed = booted(lab)
    made = await lab.attest(node)
    (evidence,) = judge.seen
    assert made.evidence == evidence
    assert made.verdict is not None
    assert (evidence.occasion, evidence.tier) == (Occasion.ATTESTATION, Tier.QUOTE)
    assert evidence.counters is not None
    assert evidence.counters.firmware_version == node.tpm.firmware_version
    assert evidence.boot is not None
    assert evidence.boot.log_sha256 == hashlib.sha256(node.boot_log or b"").hexdigest()
    assert evidence.ima is not None
    assert evidence.ima.state.count == len(listed.items)
    assert len(evidence.ima.entries) == 20
    found = made.selector_values
    assert {"secureboot:on", "mok:present", "sbat:2023012900", "tier:quote"} <= set(found)
    assert f"dbx:{evidence.boot.variables['dbx']}" in found
    assert f"secureboot:db:{evidence.boot.variables['db']}" in found
    assert found[-1] == "boot:policy:web@7"
    assert len(found) == len(set(found))


async def test_without_a_judge_own_settings_ask(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, LOGS)
    made = await lab.attest(booted(lab)[0])
    assert made.verdict is None
    assert made.evidence is not None
    assert "secureboot:on" in made.selector_values
    quoted = {n for bank, n in made.evidence.pcrs if bank == "sha256"}
    assert {*range(8), imalist.PCR} <= quoted


async def test_the_judge_says_which_pcrs(tmp_path: Path) -> None:
    judge = Wants(EvidenceRequest(pcrs=(("sha256", (1, 23)), ("sha384", (0,)), ("sha1", (3,)))))
    value = SoftTpm().pcrs["sha512", 5].hex()
    lab = await Lab.make(
        tmp_path,
        f'pcrs = {{ sha512 = [5] }}\npcr_values = {{ sha512 = {{ "5" = ["{value}"] }} }}',
        judge=judge,
    )
    made = await lab.attest(lab.node())
    assert made.evidence is not None
    wanted = {("sha256", 1), ("sha256", 23), ("sha384", 0), ("sha1", 3), ("sha512", 5)}
    assert set(made.evidence.pcrs) == wanted


async def test_a_list_larger_than_a_message_comes_in_rounds(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, LOGS)
    node, listed = booted(lab, files=50)
    node.part_lines = 7
    made = await lab.attest(node)
    assert made.evidence is not None
    assert made.evidence.ima is not None
    assert made.evidence.ima.state.count == 51
    asked = [rounds.decode_part_request(m) for m in lab.challenges[1:]]
    assert asked == [7, 14, 21, 28, 35, 42, 49]
    assert listed.pcr() == made.evidence.ima.state.pcr


async def test_what_was_measured_after_the_quote_is_not_evidence(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, LOGS)
    node, listed = booted(lab)
    node.ima = listed.files(5, prefix="/later").ascii()
    made = await lab.attest(node)
    assert made.evidence is not None
    assert made.evidence.ima is not None
    assert len(made.evidence.ima.entries) == 20


# --- going on from what is known ----------------------------------------------------------------


def known(listed: ImaList, count: int) -> ImaState:
    """Return the state after some entries, as a server remembers it."""
    running = hashlib.sha256(
        START.sha256 + b"".join(item.extension("sha256") for item in listed.items[:count])
    )
    return ImaState(count, listed.pcr("sha256", count), running.digest())


def going_on(listed: ImaList, count: int = 10, reset_count: int = 2) -> EvidenceRequest:
    pcrs = (("sha256", (*range(10), 10)),)
    return EvidenceRequest(pcrs, ima=known(listed, count), reset_count=reset_count)


async def test_a_known_list_goes_on(tmp_path: Path) -> None:
    judge = Wants()
    lab = await Lab.make(tmp_path, judge=judge)
    node, listed = booted(lab)
    judge.asked = going_on(listed)
    await lab.attest(node)
    ima = judge.seen[0].ima
    assert ima is not None
    assert (ima.start, ima.state.count, len(ima.entries)) == (10, 21, 11)
    assert len(lab.challenges) == 1


async def test_after_a_reset_the_list_starts_anew(tmp_path: Path) -> None:
    judge = Wants()
    lab = await Lab.make(tmp_path, judge=judge)
    node, listed = booted(lab)
    judge.asked = going_on(listed, reset_count=1)
    await lab.attest(node)
    ima = judge.seen[0].ima
    assert ima is not None
    assert (ima.start, ima.state.count) == (0, 21)
    judge.asked = going_on(listed, reset_count=1)
    stale = await refusal(
        lab, node, response=lambda r: replace(r, ima=zlib.compress(listed.ascii(10)), ima_from=10)
    )
    assert codes(stale) == ["ima_restart"]
    assert stale.kind is IA


async def test_a_rewritten_list_is_told_to_the_judge(tmp_path: Path) -> None:
    """The part does not go on from what is stored, and the whole list does not pass there."""
    judge = Wants()
    lab = await Lab.make(tmp_path, judge=judge)
    node, listed = booted(lab)
    judge.asked = going_on(listed.changed(5, hashlib.sha256(b"evil").digest()))
    error = await refusal(lab, node)
    assert codes(error) == ["ima_rollback"]
    assert error.kind is PD
    assert [finding.code for finding in judge.seen[0].findings] == ["ima_rollback"]
    assert judge.seen[0].ima is None


ROLLBACKS: dict[str, Callable[[wire.Response], wire.Response]] = {
    "later than asked": lambda r: replace(r, ima_from=12),
    "earlier than asked": lambda r: replace(r, ima_from=3),
}


@pytest.mark.parametrize("row", ROLLBACKS)
async def test_a_part_that_begins_elsewhere_is_told_to_the_judge(tmp_path: Path, row: str) -> None:
    judge = Wants()
    lab = await Lab.make(tmp_path, judge=judge)
    node, listed = booted(lab)
    judge.asked = going_on(listed)
    error = await refusal(lab, node, response=ROLLBACKS[row])
    assert codes(error) == ["ima_rollback"]
    assert [finding.code for finding in judge.seen[0].findings] == ["ima_rollback"]


async def test_a_list_that_got_shorter_is_told_to_the_judge(tmp_path: Path) -> None:
    judge = Wants()
    lab = await Lab.make(tmp_path, judge=judge)
    node, listed = booted(lab)
    judge.asked = going_on(listed, 21)
    shorter = replace(listed, items=listed.items[:9])
    node.tpm.pcrs["sha256", 10] = shorter.pcr()
    error = await refusal(
        lab, node, response=lambda r: replace(r, ima=zlib.compress(shorter.ascii()), ima_from=0)
    )
    assert codes(error) == ["ima_rollback"]
    assert [finding.code for finding in judge.seen[0].findings] == ["ima_rollback"]


# --- what does not hold -------------------------------------------------------------------------


def _log(change: Callable[[bytes], bytes]) -> Callable[[wire.Response], wire.Response]:
    return lambda r: replace(r, log=zlib.compress(change(zlib.decompress(r.log or b""))))


def _ima(change: Callable[[bytes], bytes]) -> Callable[[wire.Response], wire.Response]:
    return lambda r: replace(r, ima=zlib.compress(change(zlib.decompress(r.ima or b""))))


def _bomb(size: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


RESPONSES: dict[str, tuple[Callable[[wire.Response], wire.Response], ErrorKind, str]] = {
    "absent": (lambda r: replace(r, log=None), IA, "log: boot log is missing [log_missing]"),
    "empty": (lambda r: replace(r, log=b""), IA, "log: boot log is missing [log_missing]"),
    "zero bytes": (
        lambda r: replace(r, log=zlib.compress(b"")),
        IA,
        "log: boot log is missing [log_missing]",
    ),
    "one byte more": (
        _log(lambda d: d + b"\0"),
        IA,
        "log: boot log is not the one announced [log_announced]",
    ),
    "same size": (
        _log(lambda d: d[:-1] + bytes((d[-1] ^ 1,))),
        IA,
        "log: boot log is not the one announced [log_announced]",
    ),
    "log that is a bomb": (
        lambda r: replace(r, log=_bomb(50 << 20)),
        RE,
        "log: larger than 524288 bytes",
    ),
    "bytes after the end": (
        lambda r: replace(r, log=(r.log or b"") + b"x"),
        IA,
        "log: compressed data is malformed",
    ),
    "end missing": (
        lambda r: replace(r, log=(r.log or b"")[:-4]),
        IA,
        "log: compressed data is malformed",
    ),
    "log that is not zlib": (
        lambda r: replace(r, log=b"x" * 99),
        IA,
        "log: compressed data is malformed",
    ),
    "list that is a bomb": (
        lambda r: replace(r, ima=_bomb(50 << 20)),
        RE,
        "ima: part larger than 786432 bytes",
    ),
    "list that is not zlib": (
        lambda r: replace(r, ima=b"x" * 99),
        IA,
        "ima: compressed data is malformed",
    ),
    "entries announced": (
        lambda r: replace(r, ima_left=100_000),
        RE,
        "ima: more than 100000 entries",
    ),
    "ima absent": (
        lambda r: replace(r, ima=None, ima_from=None, ima_left=None),
        IA,
        "ima: list is missing [ima_missing]",
    ),
    "ima empty": (_ima(lambda _: b""), IA, "ima: list is missing [ima_missing]"),
    "from elsewhere than the start": (
        lambda r: replace(r, ima_from=3),
        IA,
        "ima: list must start at entry 0 [ima_restart]",
    ),
    "half a line": (_ima(lambda d: d[:-5]), IA, "ima: part of the list does not end with a line"),
    "hash": (
        _ima(lambda d: d.replace(b"/usr/bin/tool3\n", b"/usr/bin/tool4\n")),
        IA,
        "ima: line 5 does not match its hash [ima_hash]",
    ),
    "entry dropped": (
        _ima(lambda d: b"".join(d.splitlines(keepends=True)[:-1])),
        IA,
        "ima: list does not replay to PCR 10 [ima_replay]",
    ),
    "ima position alone": (
        lambda r: replace(r, ima=None),
        IA,
        "envelope: evidence that was not asked for [evidence_unasked]",
    ),
}


@pytest.mark.parametrize("row", RESPONSES)
async def test_logs_that_do_not_hold_are_refused(tmp_path: Path, row: str) -> None:
    bend, kind, message = RESPONSES[row]
    judge = Wants()
    lab = await Lab.make(tmp_path, LOGS, judge=judge)
    error = await refusal(lab, booted(lab)[0], response=bend)
    assert (error.kind, error.message) == (kind, message)
    assert len(judge.seen) == 1  # the honest node's


async def test_a_log_of_another_boot_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, "boot_log = true")
    node, _ = booted(lab)
    node.boot_log = Firmware(kernel=b"another", secure_boot=False).boot().log()
    error = await refusal(lab, node)
    assert "log_replay" in codes(error)
    assert error.kind is IA


def _failed(m: Measurement) -> Measurement:
    """Turn the separator of PCR 3 into the one of firmware that failed."""
    is_it = (m.pcr, m.type) == (3, EV_SEPARATOR)
    return replace(m, data=struct.pack("<I", 1)) if is_it else m


@pytest.mark.parametrize(
    ("boot", "code", "text"),
    [
        (Firmware(debug_mode=True).boot(), "debug_mode", "log: firmware is in debug mode"),
        (Firmware().boot().change(_failed), "firmware_error", "log: firmware reported an error"),
    ],
    ids=["debug mode", "error"],
)
async def test_an_unsound_boot_is_refused_where_no_policy_looks_at_it(
    tmp_path: Path, boot: Boot, code: str, text: str
) -> None:
    lab = await Lab.make(tmp_path, "boot_log = true")
    node = lab.node(SoftTpm(ek=make_ek("L-2"), pcrs=boot.pcrs("sha256")))
    node.boot_log = boot.log()
    error = await lab.refused(node)
    assert (error.kind, error.message) == (PD, f"{text} [{code}]")
    # A policy that looks at it decides by itself.
    judge = Wants(EvidenceRequest(boot_log=True))
    lab = await Lab.make(tmp_path, "boot_log = true", vendor=lab.vendor, judge=judge)
    made = await lab.attest(node)
    assert made.evidence is not None
    assert made.evidence.findings == ()


async def test_a_log_that_is_not_announced_ends_it_before_the_challenge(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, "boot_log = true")
    node, _ = booted(lab)
    for announced in (None, wire.LogAnnouncement(0, "0" * 64)):
        data = replace(node.data(), log=announced)
        error = await refusal(lab, node, payload=wire.encode_attestation_data(data))
        assert codes(error) == ["log_missing"]
    assert len(lab.challenges) == 2  # the honest nodes'


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"log": wire.LogAnnouncement(512 * 1024 + 1, "0" * 64)}, "log: larger than 524288 bytes"),
        ({"ima_entries": 100_001}, "ima: more than 100000 entries"),
    ],
)
async def test_logs_that_will_be_too_large_end_it_before_the_challenge(
    tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    lab = await Lab.make(tmp_path, LOGS)
    node, _ = booted(lab)
    payload = wire.encode_attestation_data(replace(node.data(), **more))
    error = await refusal(lab, node, payload=payload)
    assert (error.kind, error.message) == (RE, words)
    assert len(lab.challenges) == 1  # the honest node's


async def test_logs_nobody_asked_for_are_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node, listed = booted(lab)
    packed = zlib.compress(listed.ascii())
    for bend in (
        lambda r: replace(r, log=packed),
        lambda r: replace(r, ima=packed, ima_from=0),
        lambda r: replace(r, ima_left=1),
        lambda r: replace(r, time=wire.SignedStatement(b"a", b"b")),
    ):
        assert "evidence_unasked" in codes(await refusal(lab, node, response=bend))


async def test_statements_come_first(tmp_path: Path) -> None:
    """A quote that does not hold ends the exchange before its logs are looked at."""
    lab = await Lab.make(tmp_path, LOGS)
    node, _ = booted(lab)

    def bend(response: wire.Response) -> wire.Response:
        quote = replace(response.quotes[0], sig=response.quotes[0].attest)
        return replace(response, quotes=(quote,), log=_bomb(50 << 20), ima_left=90_000)

    assert codes(await refusal(lab, node, response=bend)) == ["quote_scheme"]
    assert len(lab.challenges) == 2  # one of them the honest node's


PARTS: dict[str, tuple[Callable[[rounds.ImaPart], rounds.ImaPart], str]] = {
    "begins elsewhere": (lambda p: replace(p, start=p.start + 1), "do not fit together"),
    "as much left as before": (lambda p: replace(p, left=p.left + 7), "do not fit together"),
    "nothing in it": (lambda p: replace(p, data=zlib.compress(b""), left=p.left + 7), "not fit"),
    "more left than before": (lambda p: replace(p, left=10**6), "more than 100000|not fit"),
    "bomb": (lambda p: replace(p, data=_bomb(50 << 20)), "part larger than 786432 bytes"),
    "not zlib": (lambda p: replace(p, data=b"x"), "malformed"),
}


@pytest.mark.parametrize("row", PARTS)
async def test_parts_that_do_not_fit_are_refused(tmp_path: Path, row: str) -> None:
    bend, words = PARTS[row]
    lab = await Lab.make(tmp_path, LOGS)
    node, _ = booted(lab)
    node.part_lines = 7

    async def answer(message: bytes) -> bytes:
        if b'"EC"' in message:
            return node.answer(message)
        return rounds.encode_part(bend(node.part(rounds.decode_part_request(message))))

    error = await refusal(lab, node, answer=answer)
    assert error.kind in {IA, RE}
    assert re.search(words, error.message)


async def test_rounds_are_bounded(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, LOGS)
    node, _ = booted(lab)
    node.part_lines = 1
    error = await refusal(lab, node)
    assert isinstance(error, LimitError)
    assert len(lab.challenges) == rounds.MAX_ROUNDS + 1  # one of them the honest node's


@pytest.mark.parametrize("answer", [b"", b"{}", b'{"spire_hw":{"v":2}}', b'{"Secret":"AAAA"}'])
async def test_something_else_instead_of_a_part_is_refused(tmp_path: Path, answer: bytes) -> None:
    lab = await Lab.make(tmp_path, LOGS)
    node, _ = booted(lab)
    node.part_lines = 7

    async def bent(message: bytes) -> bytes:
        return node.answer(message) if b'"EC"' in message else answer

    assert (await refusal(lab, node, answer=bent)).kind is IA


# --- counters -----------------------------------------------------------------------------------

OWNERS = "allow_owner_ak = true\n"
COUNTED = EvidenceRequest(pcrs=(("sha256", (0, 7)),), counters=True)


def owner_node(lab: Lab) -> TpmNode:
    """Return a node whose attestation key is where counters are scrambled."""
    ak = make_ak(parent=OWNER)
    return lab.node(SoftTpm(ek=make_ek("L-2"), ak=ak, scramble=0xB3560170))


async def test_counters_behind_an_owner_key_are_proved_by_a_time_statement(tmp_path: Path) -> None:
    judge = Wants(COUNTED)
    lab = await Lab.make(tmp_path, OWNERS, judge=judge)
    made = await lab.attest(owner_node(lab))
    counters = judge.seen[0].counters
    assert counters is not None
    assert (counters.reset_count, counters.firmware_version) == (2, 0x2019102300163636)
    assert "ak:hierarchy:owner" in made.selector_values
    assert "fw:4E544300:2019102300163636" in made.selector_values


async def test_hidden_counters_are_refused_where_they_count(tmp_path: Path) -> None:
    judge = Wants(COUNTED)
    lab = await Lab.make(tmp_path, OWNERS, judge=judge)
    error = await refusal(lab, owner_node(lab), response=lambda r: replace(r, time=None))
    assert (error.kind, codes(error)) == (PD, ["counters_hidden"])

    node = owner_node(lab)

    async def answer(message: bytes) -> bytes:
        honest = node.respond(wire.decode_challenge(message))
        return wire.encode_response(replace(honest, time=None))

    made = await lab.attest(node, answer=answer)
    assert judge.seen[-1].counters is None
    assert not any(value.startswith("fw:") for value in made.selector_values)


async def test_a_time_statement_for_another_purpose_is_refused(tmp_path: Path) -> None:
    judge = Wants()
    lab = await Lab.make(tmp_path, OWNERS, judge=judge)
    node = owner_node(lab)

    def bend(role: str) -> Callable[[bytes], bytes]:
        def answer(message: bytes) -> bytes:
            challenge = wire.decode_challenge(message)
            honest = node.respond(challenge)
            made = node.tpm.time(node.qualifier(role, challenge, honest.secret))
            return wire.encode_response(replace(honest, time=wire.SignedStatement(*made)))

        return answer

    async def of_the_quote(message: bytes) -> bytes:
        return bend("quote")(message)

    async def unscrambled(message: bytes) -> bytes:
        challenge = wire.decode_challenge(message)
        honest = node.respond(challenge)
        scramble, node.tpm.scramble = node.tpm.scramble, 0
        made = node.tpm.time(node.qualifier("time", challenge, honest.secret))
        node.tpm.scramble = scramble
        return wire.encode_response(replace(honest, time=wire.SignedStatement(*made)))

    for answer in (of_the_quote, unscrambled):
        judge.asked = COUNTED
        error = await refusal(lab, node, answer=answer)
        assert (error.kind, codes(error)) == (IA, ["nonce_mismatch"])


async def test_what_speaks_against_a_node_reaches_the_judge(tmp_path: Path) -> None:
    judge = Wants(EvidenceRequest(pcrs=(("sha256", (0, 7)),), boot_log=True))
    lab = await Lab.make(tmp_path, judge=judge)
    node, _ = booted(lab)
    for n in range(8):
        node.tpm.pcrs["sha256", n] = bytes(32)
    error = await refusal(lab, node)
    assert error.message == "quote: bank sha256 was not used by the firmware [bank_unused]"
    assert [finding.code for finding in judge.seen[0].findings] == ["bank_unused"]


async def test_the_judges_refusal_is_the_nodes(tmp_path: Path) -> None:
    @dataclass
    class Strict(Wants):
        async def judge(self, agent_id: SpiffeId, evidence: Evidence) -> Verdict:
            self.first = self.first or evidence.ek.hash
            if evidence.ek.hash == self.first:
                raise AttestationError([Finding("pcr_mismatch", "policy: PCR 4 is odd", PD)])
            return await super().judge(agent_id, evidence)

    judge = Strict()
    lab = await Lab.make(tmp_path, judge=judge)
    error = await refusal(lab, lab.node())
    assert (error.kind, codes(error)) == (PD, ["pcr_mismatch"])
    assert lab.server.open_exchanges == 0
