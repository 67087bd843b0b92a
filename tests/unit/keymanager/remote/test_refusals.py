"""What a signer's refusal says here."""

from __future__ import annotations

from spire_hw._pb import hw_signer_pb2 as pb
from spire_hw_plugins.keymanager.remote.wire import refused
from spire_hw_signer.policy import Denial, Reason


def test_a_refusal_names_its_word_once_and_when_to_come_back() -> None:
    denial = Denial(Reason.GENERATE_INTERVAL, "this key was made a short while ago", 3599.6)
    told = pb.Refusal(
        code=8, reason=denial.reason.word, message=denial.message, retry_after_ms=3_599_600
    )
    assert refused(told).error.message == (
        "signer: this key was made a short while ago; it may work in 3600 s [generate_interval]"
    )
    for retry_ms, words in ((1, "0.1 s"), (101, "0.1 s"), (949, "0.9 s"), (1_501, "2 s")):
        told = pb.Refusal(code=8, reason="in_flight", message="full", retry_after_ms=retry_ms)
        assert refused(told).error.message == f"signer: full; it may work in {words} [in_flight]"
    told = pb.Refusal(code=7, message="no: not this one")
    assert refused(told).error.message == "signer: no: not this one"
