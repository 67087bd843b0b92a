"""Request ids that come again."""

from __future__ import annotations

import pytest

from spire_hw_signer.replay import Replay, ReuseError


def test_the_same_request_gets_the_same_answer() -> None:
    replay: Replay[str] = Replay(120)
    assert replay.find(b"1", "content", 0) is None
    replay.remember(b"1", "content", 0, "answer")
    assert replay.find(b"1", "content", 119) == "answer"


def test_another_request_with_its_id_is_refused() -> None:
    replay: Replay[str] = Replay(120)
    replay.remember(b"1", "content", 0, "answer")
    with pytest.raises(ReuseError):
        replay.find(b"1", "other", 60)
    assert replay.find(b"1", "content", 60) == "answer"


def test_what_is_old_is_forgotten() -> None:
    replay: Replay[str] = Replay(120)
    replay.remember(b"1", "content", 0, "answer")
    assert replay.find(b"1", "other", 120) is None
    assert len(replay) == 0


def test_what_came_to_nothing_may_be_tried_again() -> None:
    replay: Replay[str] = Replay(120)
    replay.remember(b"1", "content", 0, "answer")
    replay.forget(b"1")
    replay.forget(b"2")
    assert replay.find(b"1", "content", 1) is None


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first() -> None:
    replay: Replay[int] = Replay(120, limit=10)
    for n in range(25):
        replay.remember(bytes([n]), "content", float(n), n)
    assert len(replay) == 10
    assert replay.find(bytes([14]), "content", 25) is None
    assert replay.find(bytes([15]), "content", 25) == 15
