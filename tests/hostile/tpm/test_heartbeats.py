"""Answers to a heartbeat that do not hold, before the verifier of the server's attestor."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import AttestationError, ErrorKind
from spire_hw.posture.evidence import EkFacts
from spire_hw.posture.heartbeat import HeartbeatAnswer, HeartbeatChallenge, KnownNode, SignedQuote
from spire_hw.posture.judge import EvidenceRequest
from spire_hw.tpm.verify import qualifier
from spire_hw.tpm.wire import PcrSelection
from spire_hw_sim.again import refused
from spire_hw_sim.softtpm import make_ak, make_svid_key
from spire_hw_sim.tpmlab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spire_hw_sim.tpmnode import TpmNode

pytestmark = pytest.mark.asyncio
WANTED = EvidenceRequest(pcrs=(("sha256", (0, 4, 7)),))


def known(node: TpmNode) -> KnownNode:
    svid = hashlib.sha256(node.spki or b"").digest()
    ek, ak = EkFacts(node.ek_hash, ("ca",)), node.tpm.ak
    return KnownNode(ek, ak.public, "endorsement", svid, True, ak.qualified_name)


def answered(node: TpmNode, challenge: HeartbeatChallenge, role: str) -> HeartbeatAnswer:
    svid = hashlib.sha256(node.spki or b"").digest()
    extra = qualifier(role, challenge.nonce, svid, b"", node.tpm.ak.name)
    quotes = []
    for bank, numbers in challenge.wanted.pcrs:
        selection = PcrSelection(bank, numbers)
        made = node.tpm.quote((selection,), extra)
        quotes.append(SignedQuote(*made, node.tpm.pcr_values(selection)))
    return HeartbeatAnswer(tuple(quotes), boot_id=str(uuid.UUID(int=5)))


def as_it_is(answer: HeartbeatAnswer) -> HeartbeatAnswer:
    return answer


def flipped(answer: HeartbeatAnswer) -> HeartbeatAnswer:
    quote = answer.quotes[0]
    bent = quote.signature[:-1] + bytes((quote.signature[-1] ^ 1,))
    return replace(answer, quotes=(replace(quote, signature=bent),))


ROWS: dict[str, tuple[str, str, Callable[[HeartbeatAnswer], HeartbeatAnswer], str]] = {
    "another key": ("ak", "heartbeat", as_it_is, "quote_signature"),
    "flipped": ("", "heartbeat", flipped, "quote_signature"),
    "another role": ("", "quote", as_it_is, "nonce_mismatch"),
    "another SVID": ("svid", "heartbeat", as_it_is, "nonce_mismatch"),
    "no quotes": ("", "heartbeat", lambda a: replace(a, quotes=()), "evidence_missing"),
}


@pytest.mark.parametrize("row", ROWS)
async def test_answer_that_does_not_hold(tmp_path: Path, row: str) -> None:
    other, role, bend, reason = ROWS[row]
    lab = await Lab.make(tmp_path)
    node = lab.node()
    enrolled = known(node)
    if other == "ak":
        node.tpm.ak = make_ak()
    elif other == "svid":
        node.key = make_svid_key()

    async def act() -> object:
        challenge = HeartbeatChallenge(secrets.token_bytes(32), WANTED)
        answer = bend(answered(node, challenge, role))
        return await lab.server.check_heartbeat(enrolled, challenge, answer, lab.clock.now())

    error = await refused(act)
    assert isinstance(error, AttestationError)
    assert error.kind is ErrorKind.INVALID_ARGUMENT
    assert error.findings[0].code == reason


async def test_an_honest_answer_is_evidence(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    challenge = HeartbeatChallenge(secrets.token_bytes(32), WANTED)
    answer = answered(node, challenge, "heartbeat")
    shown = await lab.server.check_heartbeat(known(node), challenge, answer, lab.clock.now())
    assert shown.ek.hash == node.ek_hash
    assert {number for _, number in shown.pcrs} == {0, 4, 7}
