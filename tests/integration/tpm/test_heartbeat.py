"""Heartbeats of the `tpm` node attestor: both halves over a real TPM."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import AttestationError, ErrorKind, InvalidInputError
from spire_hw.posture.evidence import EkFacts, Occasion, Tier
from spire_hw.posture.heartbeat import (
    HeartbeatAnswer,
    HeartbeatChallenge,
    HeartbeatSource,
    HeartbeatVerifier,
    KnownNode,
)
from spire_hw.posture.judge import EvidenceRequest
from spire_hw_plugins.nodeattestor.tpm import wire
from tests.integration.tpm.leaks import nothing_left_behind
from tests.integration.tpm.parties import Bench, Exchange, Node, attest, codes, node, serving

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw_plugins.nodeattestor.tpm.server import TpmServer
    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.asyncio
NOW = datetime(2026, 6, 1, tzinfo=UTC)
SPKI = hashlib.sha256(b"the key of the SVID on the stream").digest()
PCRS = (("sha256", (0, 4, 7, 10)), ("sha384", tuple(range(8))))


def challenge(**wanted: object) -> HeartbeatChallenge:
    request = EvidenceRequest(pcrs=PCRS)
    return HeartbeatChallenge(secrets.token_bytes(32), replace(request, **wanted))  # type: ignore[arg-type]


async def known(n: Node, server: TpmServer) -> KnownNode:
    """Attest a node and return what a server then knows of it."""
    stream = Exchange()
    await attest(n.agent, server, n.key, stream)
    ak = wire.decode_attestation_data(stream.sent[0]).ak.public
    return KnownNode(EkFacts("00" * 32, ("ca",)), ak, "endorsement", SPKI, key_in_tpm=True)


async def test_a_heartbeat_is_bound_to_nonce_and_stream(bench: Bench, tpm: Swtpm) -> None:
    server = await serving(bench)
    async with node(bench, tpm) as n:
        assert isinstance(n.agent, HeartbeatSource)
        assert isinstance(server, HeartbeatVerifier)
        who, asked = await known(n, server), challenge()
        with nothing_left_behind(tpm):
            answer = await n.agent.heartbeat(asked, SPKI)
        proved = await server.check_heartbeat(who, asked, answer, NOW)
        assert (proved.occasion, proved.tier) == (Occasion.HEARTBEAT, Tier.QUOTE)
        assert set(proved.pcrs) == {(bank, pcr) for bank, pcrs in PCRS for pcr in pcrs}
        assert proved.counters is not None
        assert proved.key_in_tpm
        for other in (replace(asked, nonce=secrets.token_bytes(32)), challenge()):
            with pytest.raises(AttestationError) as caught:
                await server.check_heartbeat(who, other, answer, NOW)
            assert set(codes(caught.value)) == {"nonce_mismatch"}
        elsewhere = replace(who, svid_spki_sha256=bytes(32))
        with pytest.raises(AttestationError) as caught:
            await server.check_heartbeat(elsewhere, asked, answer, NOW)
        assert set(codes(caught.value)) == {"nonce_mismatch"}


async def test_an_agent_that_started_anew_needs_no_attestation(bench: Bench, tpm: Swtpm) -> None:
    server = await serving(bench)
    async with node(bench, tpm) as n:
        who = await known(n, server)
    tpm.reset()
    tpm.extend_pcr(0, b"firmware", banks=("sha256", "sha384"))
    async with node(bench, tpm) as n:
        asked = challenge()
        answer = await n.agent.heartbeat(asked, SPKI)
    before = (await server.check_heartbeat(who, asked, answer, NOW)).counters
    assert before is not None
    assert before.reset_count > 0


async def test_another_tpm_has_no_heartbeat_for_this_node(
    bench: Bench, tpm: Swtpm, other_tpm: Swtpm
) -> None:
    server = await serving(bench)
    async with node(bench, tpm) as n, node(bench, other_tpm) as thief:
        who, asked = await known(n, server), challenge()
        answer = await thief.agent.heartbeat(asked, SPKI)
        with pytest.raises(AttestationError) as caught:
            await server.check_heartbeat(who, asked, answer, NOW)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    assert "quote_signature" in codes(caught.value)


BENT: dict[str, tuple[Callable[[HeartbeatAnswer], HeartbeatAnswer], str]] = {
    "one quote short": (lambda a: replace(a, quotes=a.quotes[:1]), "evidence_missing"),
    "no quote": (lambda a: replace(a, quotes=()), "evidence_missing"),
    "quotes in another order": (lambda a: replace(a, quotes=a.quotes[::-1]), "pcr_selection"),
    "a log nobody asked for": (lambda a: replace(a, boot_log=b""), "evidence_unasked"),
    "a list nobody asked for": (lambda a: replace(a, ima=(b"",)), "evidence_unasked"),
}


@pytest.mark.parametrize("row", BENT)
async def test_bent_answers_are_refused(bench: Bench, tpm: Swtpm, row: str) -> None:
    bend, code = BENT[row]
    server = await serving(bench)
    async with node(bench, tpm) as n:
        who, asked = await known(n, server), challenge()
        answer = await n.agent.heartbeat(asked, SPKI)
    with pytest.raises(AttestationError) as caught:
        await server.check_heartbeat(who, asked, bend(answer), NOW)
    assert codes(caught.value)[0] == code
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "pcrs",
    [
        (),
        (("sha256", ()),),
        (("md5", (1,)),),
        (("sha256", (24,)),),
        (("sha256", (1, 1)),),
        PCRS * 2,
    ],
)
async def test_the_agent_refuses_a_malformed_challenge(
    bench: Bench, tpm: Swtpm, pcrs: tuple[tuple[str, tuple[int, ...]], ...]
) -> None:
    async with node(bench, tpm) as n:
        with nothing_left_behind(tpm), pytest.raises(InvalidInputError, match="PCR request"):
            await n.agent.heartbeat(challenge(pcrs=pcrs), SPKI)
        with pytest.raises(InvalidInputError, match="nonce must be 32 bytes"):
            await n.agent.heartbeat(replace(challenge(), nonce=bytes(31)), SPKI)


async def test_a_bank_the_firmware_never_used_is_in_the_evidence(bench: Bench, tpm: Swtpm) -> None:
    server = await serving(bench)
    async with node(bench, tpm) as n:
        who = await known(n, server)
        tpm.reset()
        asked = challenge(pcrs=PCRS[:1], boot_log=True)
        answer = await n.agent.heartbeat(replace(asked, wanted=EvidenceRequest(PCRS[:1])), SPKI)
    found = (await server.check_heartbeat(who, asked, answer, NOW)).findings
    assert [finding.code for finding in found] == ["bank_unused"]
