from __future__ import annotations

import pytest

from spire_hw.pkcs11.pool.pace import Pace


def paced(*answers: tuple[float, int]) -> Pace:
    """Return a pace after batches that took some seconds each, one right after the other."""
    pace, now = Pace(), 1000.0
    for took, items in answers:
        pace.measured(now, now + took, items)
        now += took
    return pace


def test_nothing_is_known_before_three_answers_and_the_first_batches_are_of_one() -> None:
    assert Pace().batch_limit(64) == 1
    assert Pace().settled_s is None
    assert paced((0.5, 1), (0.5, 1)).settled_s is None
    assert paced((0.5, 1), (0.5, 1), (0.5, 1)).settled_s == pytest.approx(0.5)


def test_a_hiccup_says_nothing_and_a_token_that_has_become_slow_is_told_soon() -> None:
    quick = [(0.0128, 64)] * 5
    assert paced(*quick, (5.0, 1), (5.0, 1)).settled_s == pytest.approx(0.0002)
    assert paced(*quick, *[(0.5, 1)] * 3).settled_s == pytest.approx(0.5)
    assert paced(*[(0.5, 1)] * 5, *quick[:3]).settled_s == pytest.approx(0.0002)


def test_what_was_long_ago_does_not_count() -> None:
    pace = paced(*[(0.5, 1)] * 5)
    pace.measured(2000.0, 2000.0002, 1)
    assert pace.settled_s is None


def test_batches_are_as_long_as_the_token_is_quick() -> None:
    quick, slow = paced(*[(0.0128, 64)] * 5), paced(*[(0.05, 1)] * 5)
    assert (quick.batch_limit(64), slow.batch_limit(64)) == (64, 1)
    assert quick.is_quick(0.0)
    assert not quick.is_quick(0.5)
    assert not slow.is_quick(0.0)


def test_after_a_batch_that_took_too_long_the_next_one_is_of_one() -> None:
    pace = paced(*[(0.0128, 64)] * 5)
    pace.forget()
    assert pace.batch_limit(64) == 1
    assert pace.settled_s is None
