from __future__ import annotations

from datetime import timedelta

import pytest

from spire_hw.config.duration import format_duration, parse_duration
from spire_hw.errors import InvalidInputError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("1h30m", 5400),
        ("500ms", 0.5),
        ("-2.5s", -2.5),
        ("+1m", 60),
        (".5h", 1800),
        ("1.s", 1),
        ("1h0.5m", 3630),
        ("10us", 0.00001),
        ("10\u00b5s", 0.00001),
        ("10\u03bcs", 0.00001),
        ("999ns", 0),
    ],
)
def test_durations_of_go_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "h",
        "1x",
        "1h ",
        " 1h",
        "1h\n",
        "--1h",
        "1.2.3s",
        ".s",
        "1e3s",
        "\u0661s",
        "300000000h",
    ],
)
def test_what_go_refuses_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_duration(text)


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (0, "0s"),
        (10, "10\u00b5s"),
        (1500, "1.5ms"),
        (1_500_000, "1.5s"),
        (60_000_000, "1m0s"),
        (3_600_000_000, "1h0m0s"),
        (86_400_000_000, "24h0m0s"),
        (-90_000_000, "-1m30s"),
    ],
)
def test_durations_print_as_go_prints_them(microseconds: int, text: str) -> None:
    assert format_duration(timedelta(microseconds=microseconds)) == text
