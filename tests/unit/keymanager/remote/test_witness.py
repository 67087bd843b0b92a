"""Heads of a log: forward only, and each number one hash."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spire_hw_plugins.keymanager.remote.witness import LogHead, Witness


def head(seq: int, fork: int = 0) -> LogHead:
    return LogHead(seq, bytes([fork]) * 28 + seq.to_bytes(4))


def test_first_head_is_taken_and_later_ones_move_it() -> None:
    witness = Witness()
    assert witness.floor == 0
    assert witness.saw(head(7), 0) == ""
    assert witness.saw(head(9), witness.floor) == ""
    assert (witness.floor, witness.head) == (9, head(9))


def test_an_older_head_is_right_for_a_call_that_was_sent_before() -> None:
    witness = Witness(head(5))
    assert witness.saw(head(9), 5) == ""
    assert witness.saw(head(6), 5) == ""
    assert witness.floor == 9


def test_going_back_is_told_and_changes_nothing() -> None:
    witness = Witness(head(9))
    assert witness.saw(head(8), 9) == "head went back from record 9 to 8"
    assert witness.head == head(9)


def test_another_hash_under_a_number_is_told() -> None:
    witness = Witness(head(9))
    assert witness.saw(head(9, fork=1), 9) == "record 9 is another one than before"
    assert witness.saw(head(10), 9) == ""
    assert witness.saw(head(10, fork=1), 9) == "record 10 is another one than before"


def test_malformed_heads_are_told() -> None:
    witness = Witness()
    for bad in (
        LogHead(0, bytes(32)),
        LogHead(1, b""),
        LogHead(1, bytes(31)),
        LogHead(1, bytes(33)),
    ):
        assert witness.saw(bad, 0).endswith("is malformed")
    assert witness.head is None


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300))
def test_head_is_the_newest_that_was_seen_and_memory_is_bounded(seqs: list[int]) -> None:
    witness = Witness()
    for seq in seqs:
        against = witness.saw(head(seq), witness.floor)
        assert bool(against) == (seq < witness.floor)
    assert witness.floor == max(seqs)
    assert len(witness._hashes) <= 1024


def test_checkpoints_vouch_for_what_was_seen_and_do_not_go_back() -> None:
    witness = Witness()
    for seq in range(1, 6):
        assert witness.saw(head(seq), 0) == ""
    assert witness.saw_checkpoint(None, head(5)) == "", "before the first there is none"
    assert witness.saw_checkpoint(head(3), head(5)) == ""
    assert witness.saw_checkpoint(head(3), head(5)) == ""
    assert witness.saw_checkpoint(head(2), head(5)) == "its checkpoint went back from record 3 to 2"
    assert "for record 6, it has 5" in witness.saw_checkpoint(head(6), head(5))
    other = LogHead(4, bytes(32))
    assert "for another record 4" in witness.saw_checkpoint(other, head(5))
    assert witness.saw_checkpoint(None, head(5)) == "it shows no checkpoint any more"
