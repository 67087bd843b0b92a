"""Heartbeats of nodes whose attestation key is where the TPM scrambles its counters."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.posture.document import decode_evidence, encode_evidence
from spire_hw.posture.drift import DriftRules, compare
from spire_hw.posture.evidence import Counters, Evidence, Scramble
from spire_hw.posture.heartbeat import HeartbeatAnswer, HeartbeatChallenge, SignedQuote
from spire_hw.posture.judge import EvidenceRequest
from spire_hw.posture.memory import Memory, advance, decode_memory, encode_memory
from spire_hw.tpm.verify import qualifier
from spire_hw.tpm.wire import PcrSelection
from spire_hw_plugins.nodeattestor.tpm import wire
from spire_hw_sim.softtpm import OWNER, SoftTpm, make_ak, make_ek
from spire_hw_sim.tpmlab import Lab

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_sim.tpmnode import TpmNode

pytestmark = pytest.mark.asyncio
PCRS = PcrSelection("sha256", (0, 2, 4, 7))
WANTED = EvidenceRequest(pcrs=((PCRS.bank, PCRS.pcrs),))
HOUR = timedelta(hours=1)
# So large that adding it runs over.
ADDED = 2**64 - 5


@dataclass
class Node:
    """A node that attested, and what its server remembers."""

    lab: Lab
    node: TpmNode
    memory: Memory

    @property
    def tpm(self) -> SoftTpm:
        return self.node.tpm

    async def beat(self) -> Evidence:
        await self.lab.clock.advance(HOUR)
        svid = hashlib.sha256(self.node.spki or b"").digest()
        challenge = HeartbeatChallenge(secrets.token_bytes(32), WANTED)
        extra = qualifier("heartbeat", challenge.nonce, svid, b"", self.tpm.ak.name)
        quote = SignedQuote(*self.tpm.quote((PCRS,), extra), self.tpm.pcr_values(PCRS))
        known, now = self.memory.known_node(svid), self.lab.clock.now()
        answer = HeartbeatAnswer((quote,))
        return await self.lab.server.check_heartbeat(known, challenge, answer, now)

    def drift(self, shown: Evidence) -> list[str]:
        return [c.code for c in compare(self.memory, shown, DriftRules()) if not c.holds]

    def remember(self, shown: Evidence) -> None:
        """Accept evidence, and store and load what is remembered."""
        memory = advance(self.memory, shown)
        document = decode_evidence(encode_evidence(memory.last))
        self.memory = decode_memory(encode_memory(memory), document)
        assert self.memory == memory


async def attested(directory: Path, *, shows_time: bool) -> Node:
    lab = await Lab.make(directory, "allow_owner_ak = true\n")
    tpm = SoftTpm(ek=make_ek("L-2"), ak=make_ak(parent=OWNER), scramble=ADDED)
    node = lab.node(tpm)

    async def answer(message: bytes) -> bytes:
        honest = node.respond(wire.decode_challenge(message))
        return wire.encode_response(honest if shows_time else replace(honest, time=None))

    evidence = (await lab.attest(node, answer=answer)).evidence
    assert evidence is not None
    return Node(lab, node, advance(None, evidence))


@pytest_asyncio.fixture
async def node(tmp_path: Path) -> Node:
    return await attested(tmp_path, shows_time=True)


async def test_heartbeats_have_the_true_counters(node: Node) -> None:
    for restarts in range(3):
        node.tpm.clock_ms += 1000
        node.tpm.restart_count = restarts
        shown = await node.beat()
        assert shown.counters == Counters(
            clock_ms=node.tpm.clock_ms,
            reset_count=2,
            restart_count=restarts,
            safe=True,
            firmware_version=0x2019102300163636,
        )
        assert node.drift(shown) == []
        node.remember(shown)


async def test_drift_is_told_behind_the_scramble(node: Node) -> None:
    node.remember(await node.beat())
    node.tpm.reset_count += 1
    node.remember(await node.beat())
    changes: dict[str, dict[str, int]] = {
        "tpm_replaced": {"reset_count": 1},
        "tpm_firmware": {"firmware_version": 7},
        "clock_rollback": {"clock_ms": 1},
    }
    for code, changed in changes.items():
        honest = {name: getattr(node.tpm, name) for name in changed}
        for name, value in changed.items():
            setattr(node.tpm, name, value)
        assert node.drift(await node.beat()) == [code]
        for name, value in honest.items():
            setattr(node.tpm, name, value)
    node.tpm.pcrs["sha256", 4] = bytes(31) + b"x"
    assert node.drift(await node.beat()) == ["pcr_changed_without_reset"]


async def test_a_counter_that_runs_over_goes_on(node: Node) -> None:
    node.tpm.reset_count = 2**32 - 1
    shown = await node.beat()
    assert shown.counters is not None
    assert shown.counters.reset_count == 2**32 - 1


async def test_nothing_is_made_up_where_no_time_was_proved(tmp_path: Path) -> None:
    node = await attested(tmp_path, shows_time=False)
    shown = await node.beat()
    assert (shown.counters, shown.ak_scramble) == (None, None)
    assert node.drift(shown) == []
    node.remember(shown)


async def test_what_was_stored_before_is_read(node: Node) -> None:
    evidence = node.memory.last
    document = json.loads(encode_evidence(evidence))
    del document["ak"]["scramble"]
    assert decode_evidence(json.dumps(document).encode()) == replace(evidence, ak_scramble=None)


async def test_scrambling_is_taken_back_whatever_was_added() -> None:
    true = Counters(1, 2, 3, True, 4)
    for added in (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1):
        said = replace(
            true,
            reset_count=(2 + added) % 2**32,
            restart_count=(3 + added) % 2**32,
            firmware_version=(4 + added) % 2**64,
        )
        assert Scramble.between(said, true).undo(said) == true
