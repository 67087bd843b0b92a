"""Heartbeats of strangers: whatever an answer holds, only our own errors come out, or the truth."""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spire_hw.errors import SpireHwError
from spire_hw.posture.evidence import EkFacts, Evidence
from spire_hw.posture.heartbeat import (
    HeartbeatAnswer,
    HeartbeatChallenge,
    KnownNode,
    SignedQuote,
)
from spire_hw.posture.judge import EvidenceRequest
from spire_hw.posture.policy import ima_start
from spire_hw.tpm.verify import qualifier
from spire_hw.tpm.wire import PcrSelection
from spire_hw_plugins.nodeattestor.tpm.heartbeat import check_heartbeat
from spire_hw_sim.firmware import Firmware
from spire_hw_sim.imawriter import ImaList
from spire_hw_sim.softtpm import SoftTpm

NOW = datetime(2026, 6, 1, tzinfo=UTC)
SPKI, NONCE = bytes(range(32)), bytes(range(32, 64))
BOOT = Firmware(commands=3).boot()
LISTED = ImaList.start(BOOT.values("sha256")).files(5)
PCRS = PcrSelection("sha256", tuple(range(11)))
TPM = SoftTpm(pcrs=BOOT.pcrs("sha256") | {("sha256", 10): LISTED.pcr()})
NODE = KnownNode(EkFacts("0" * 64, ("ca",)), TPM.ak.public, "endorsement", SPKI, key_in_tpm=True)
ASKED = HeartbeatChallenge(
    NONCE,
    EvidenceRequest(pcrs=((PCRS.bank, PCRS.pcrs),), boot_log=True, ima=ima_start("sha256")),
)
BOUND = qualifier("heartbeat", NONCE, SPKI, b"", TPM.ak.name)
QUOTE = SignedQuote(*TPM.quote((PCRS,), BOUND), TPM.pcr_values(PCRS))
GOOD = HeartbeatAnswer((QUOTE,), zlib.compress(BOOT.log()), (zlib.compress(LISTED.ascii()),), 0)

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check(answer: HeartbeatAnswer) -> Evidence | None:
    try:
        return asyncio.run(check_heartbeat(NODE, ASKED, answer, NOW))
    except SpireHwError:
        return None


TRUTH = check(GOOD)


@st.composite
def bent(draw: st.DrawFn, data: bytes) -> bytes:
    """Return data with some bytes replaced, cut out or put in."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(made)))
        made[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(made)


LOGS = st.none() | st.binary(max_size=60) | bent(GOOD.boot_log or b"")
QUOTES = st.builds(
    SignedQuote,
    bent(QUOTE.attest) | st.just(QUOTE.attest),
    bent(QUOTE.signature) | st.just(QUOTE.signature),
    st.just(QUOTE.pcrs)
    | st.dictionaries(
        st.sampled_from(["sha1", "sha256", "md5"]),
        st.dictionaries(st.integers(-1, 25), st.binary(max_size=40), max_size=12),
        max_size=2,
    ),
)
PARTS = bent(zlib.compress(LISTED.ascii())) | bent(LISTED.ascii()).map(zlib.compress)
ANSWERS = st.builds(
    HeartbeatAnswer,
    quotes=st.lists(QUOTES, max_size=2).map(tuple),
    boot_log=LOGS,
    ima=st.none() | st.lists(PARTS, min_size=1, max_size=3).map(tuple),
    ima_from=st.none() | st.integers(0, 2**63),
)


def test_the_good_one_is_proved() -> None:
    assert TRUTH is not None
    assert TRUTH.boot is not None
    assert TRUTH.ima is not None
    assert len(TRUTH.ima.entries) == 5


@quick
@given(ANSWERS)
def test_answers_of_any_shape(answer: HeartbeatAnswer) -> None:
    found = check(answer)
    assert found is None or found.pcrs == TRUTH.pcrs  # type: ignore[union-attr]


@quick
@given(bent(BOOT.log()).map(zlib.compress))
def test_a_bent_log_tells_nothing_else(log: bytes) -> None:
    found = check(replace(GOOD, boot_log=log))
    # Data that no digest covers may differ, and the log's own digest with it.
    assert found is None or found.boot.variables == TRUTH.boot.variables  # type: ignore[union-attr]


@quick
@given(bent(LISTED.ascii()).map(zlib.compress))
def test_a_bent_list_tells_nothing_else(listed: bytes) -> None:
    found = check(replace(GOOD, ima=(listed,)))
    assert found is None or found.ima.entries == TRUTH.ima.entries  # type: ignore[union-attr]
