from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random

import pytest

from spire_hw.rotation import (
    activation_due_at,
    draw_jitter,
    is_target_reachable,
    preparation_due_at,
    rotation_due_at,
    should_rotate,
)

START = datetime(2026, 11, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def test_due_at_half_of_the_life() -> None:
    end = START + HOUR
    assert not should_rotate(START + HOUR / 2 - timedelta(seconds=1), START, end)
    assert should_rotate(START + HOUR / 2, START, end)
    assert should_rotate(end + HOUR, START, end)


def test_jitter_moves_it_by_a_tenth_of_the_half() -> None:
    end = START + HOUR
    assert rotation_due_at(START, end, jitter=0.1) == START + timedelta(minutes=27)
    assert rotation_due_at(START, end, jitter=-0.1) == START + timedelta(minutes=33)
    drawn = [draw_jitter(Random(seed)) for seed in range(200)]  # noqa: S311 - not a secret
    assert all(-0.1 <= value <= 0.1 for value in drawn)
    assert min(drawn) < 0 < max(drawn)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 5.0])
def test_it_never_leaves_the_validity(fraction: float) -> None:
    due = rotation_due_at(START, START + HOUR, fraction=fraction, jitter=0.1)
    assert START <= due <= START + HOUR


def test_an_availability_target_replaces_the_half_life() -> None:
    end, target = START + timedelta(hours=48), timedelta(hours=24)
    assert is_target_reachable(end - START, target)
    first = rotation_due_at(START, end, jitter=0.1, availability_target=target)
    last = rotation_due_at(START, end, jitter=-0.1, availability_target=target)
    assert last - first == timedelta(minutes=10)
    assert last == end - target


def test_an_unreachable_target_falls_back_to_half_life() -> None:
    end = START + timedelta(hours=36)
    due = rotation_due_at(START, end, availability_target=timedelta(hours=24))
    assert due == START + timedelta(hours=18)


def test_thresholds_of_authorities() -> None:
    end = START + timedelta(hours=24)
    assert preparation_due_at(START, end) == START + timedelta(hours=12)
    assert activation_due_at(START, end) == START + timedelta(hours=20)


def test_thresholds_of_long_lived_authorities_are_capped() -> None:
    end = START + timedelta(days=3650)
    assert preparation_due_at(START, end) == end - timedelta(days=30)
    assert activation_due_at(START, end) == end - timedelta(days=7)
