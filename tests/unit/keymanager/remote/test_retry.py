"""Retries: a tenth of what is asked, spread out."""

from __future__ import annotations

from spire_hw_plugins.keymanager.remote.retry import RetryBudget, jitter_s


def test_reserve_then_one_in_ten() -> None:
    budget = RetryBudget()
    assert [budget.spend() for _ in range(11)] == [True] * 10 + [False]
    spent = 0
    for _ in range(200):
        budget.earn()
        spent += budget.spend()
    assert 19 <= spent <= 20


def test_saved_retries_are_bounded() -> None:
    budget = RetryBudget(reserve=3)
    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(10)) == 3


def test_jitter_stays_below_a_bound_that_doubles() -> None:
    for attempt, bound in ((1, 0.02), (2, 0.04), (6, 0.64), (7, 1.0), (60, 1.0)):
        waits = {jitter_s(attempt) for _ in range(50)}
        assert max(waits) < bound
        assert len(waits) > 10
