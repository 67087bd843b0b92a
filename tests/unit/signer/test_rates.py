"""Buckets, budgets and what is under way."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw_signer.policy import GenerateRule, Rate, Reason
from spire_hw_signer.rates import DAY_S, Buckets, InFlight, check_budget
from tests.unit.signer.test_policy import client

RULE = GenerateRule(timedelta(hours=1), 3)


def test_a_bucket_lets_its_burst_through_and_then_its_rate() -> None:
    buckets = Buckets()
    rate = Rate(10, 5)
    assert [buckets.take("c", "k", rate, None, 0.0) for _ in range(5)] == [None] * 5
    denial = buckets.take("c", "k", rate, None, 0.0)
    assert denial is not None
    assert (denial.reason, denial.retry_after_s) == (Reason.RATE, pytest.approx(0.1))
    assert buckets.take("c", "k", rate, None, 0.1) is None
    assert buckets.take("c", "k", rate, None, 0.1) is not None


def test_keys_and_clients_have_buckets_of_their_own() -> None:
    buckets = Buckets()
    rate = Rate(1, 1)
    assert buckets.take("c", "k", rate, None, 0) is None
    assert buckets.take("c", "other", rate, None, 0) is None
    assert buckets.take("other", "k", rate, None, 0) is None


def test_a_client_is_bounded_over_all_its_keys_and_a_refusal_takes_nothing() -> None:
    buckets = Buckets()
    whole = Rate(1, 2)
    assert buckets.take("c", "a", Rate(9, 9), whole, 0) is None
    assert buckets.take("c", "b", Rate(9, 9), whole, 0) is None
    for _ in range(20):
        denial = buckets.take("c", "a", Rate(9, 9), whole, 0)
        assert denial is not None
        assert denial.reason is Reason.CLIENT_RATE
    assert buckets.take("c", "a", Rate(9, 9), None, 0) is None


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    buckets = Buckets()
    assert buckets.take("c", "k", Rate(1, 1), None, 100) is None
    assert buckets.take("c", "k", Rate(1, 1), None, 50) is not None
    assert buckets.take("c", "k", Rate(1, 1), None, 100.5) is not None


def test_a_new_rate_starts_anew() -> None:
    buckets = Buckets()
    assert buckets.take("c", "k", Rate(1, 1), None, 0) is None
    assert buckets.take("c", "k", Rate(2, 2), None, 0) is None


def test_full_buckets_are_forgotten_when_there_are_many() -> None:
    buckets = Buckets()
    for n in range(10_000):
        buckets.take("c", f"k{n}", Rate(1, 1), None, float(n))
    assert len(buckets._buckets) <= 4096


@given(st.lists(st.floats(0, 5), max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_never_more_than_burst_and_rate_allow(steps: list[float], rate: int, burst: int) -> None:
    buckets, now, passed = Buckets(), 0.0, 0
    for step in steps:
        now += step
        passed += buckets.take("c", "k", Rate(rate, burst), None, now) is None
    assert passed <= burst + rate * now + 1e-6


def test_only_so_many_are_under_way() -> None:
    one, flight = client(max_in_flight=2), InFlight()
    assert flight.enter(one) is None
    assert flight.enter(one) is None
    denial = flight.enter(one)
    assert denial is not None
    assert denial.reason is Reason.IN_FLIGHT
    flight.leave(one)
    assert flight.enter(one) is None
    flight.leave(one)
    flight.leave(one)
    assert not flight._counts


def test_a_part_of_what_may_be_under_way_is_kept_for_what_is_urgent() -> None:
    one, flight = client(max_in_flight=32), InFlight()
    for _ in range(30):
        assert flight.enter(one) is None
    denial = flight.enter(one)
    assert denial is not None
    assert denial.message == "in_flight: more than 30 signatures at once"
    for _ in range(2):
        assert flight.enter(one, urgent=True) is None
    denial = flight.enter(one, urgent=True)
    assert denial is not None
    assert denial.message == "in_flight: more than 32 signatures at once"
    for _ in range(3):
        flight.leave(one)
    assert flight.enter(one) is None


def test_a_key_is_not_made_twice_in_its_interval() -> None:
    denial = check_budget(RULE, [("a", 1000.0)], "a", 1000.0 + 3599)
    assert denial is not None
    assert (denial.reason, denial.retry_after_s) == (Reason.GENERATE_INTERVAL, 1.0)
    assert "made 3599 s ago, and is made once in 3600 s" in denial.text
    assert check_budget(RULE, [("a", 1000.0)], "a", 1000.0 + 3600) is None
    assert check_budget(RULE, [("a", 1000.0)], "b", 1000.0) is None


def test_who_runs_into_both_is_told_when_neither_is_left() -> None:
    made = [("b", 0.0), ("b", 1.0), ("a", 4000.0)]
    denial = check_budget(RULE, made, "a", 4000.0)
    assert denial is not None
    assert (denial.reason, denial.retry_after_s) == (Reason.GENERATE_INTERVAL, DAY_S - 4000.0)


def test_alternating_between_keys_does_not_help() -> None:
    made = [("a", 0.0), ("b", 4000.0), ("a", 8000.0)]
    denial = check_budget(RULE, made, "b", 12_000.0)
    assert denial is not None
    assert denial.reason is Reason.GENERATE_BUDGET
    assert denial.retry_after_s == DAY_S - 12_000.0
    assert check_budget(RULE, made, "b", DAY_S) is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 50_000)), max_size=80))
def test_no_window_of_a_day_has_more_than_the_budget(asked: list[tuple[str, float]]) -> None:
    made: list[tuple[str, float]] = []
    now = 0.0
    for key_id, step in asked:
        now += step
        if check_budget(RULE, made, key_id, now) is None:
            made.append((key_id, now))
    for _, start in made:
        assert sum(start <= at < start + DAY_S for _, at in made) <= RULE.per_day
