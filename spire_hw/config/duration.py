"""Durations as Go writes them: `1h30m`, `500ms`, `-2.5s`."""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal
from typing import Final

from spire_hw.errors import InvalidInputError

_UNITS_NS: Final[dict[str, int]] = {
    "ns": 1,
    "us": 1_000,
    "\u00b5s": 1_000,
    "\u03bcs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_PART: Final = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|\u00b5s|\u03bcs|ms|s|m|h)", re.ASCII)
_WHOLE: Final = re.compile(
    r"(?P<sign>[+-]?)(?P<parts>(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:ns|us|\u00b5s|\u03bcs|ms|s|m|h))+)",
    re.ASCII,
)
_US_PER_MS: Final = 1_000
_US_PER_S: Final = 1_000_000
_MAX_NS: Final = 2**63 - 1
_MAX_CHARS: Final = 128


def parse_duration(text: str) -> timedelta:
    """Return the duration a Go program would read.

    Args:
        text: a sequence of decimal numbers with units (ns, us, ms, s, m, h), one sign in front;
            a bare `0` needs no unit.

    Returns:
        The duration, cut to whole microseconds.

    Raises:
        InvalidInputError: not a duration, or longer than about 292 years.

    Source: Go `time.ParseDuration`.
    """
    if text in {"0", "+0", "-0"}:
        return timedelta()
    whole = _WHOLE.fullmatch(text) if len(text) <= _MAX_CHARS else None
    if whole is None:
        raise InvalidInputError(
            f'"{text[:40]}" is not a duration; write it like "1h30m" or "500ms"'
        )
    nanoseconds = sum(
        int(Decimal(number) * _UNITS_NS[unit]) for number, unit in _PART.findall(whole["parts"])
    )
    if nanoseconds > _MAX_NS:
        raise InvalidInputError(f'duration "{text}" is out of range')
    duration = timedelta(microseconds=nanoseconds // 1_000)
    return -duration if whole["sign"] == "-" else duration


def format_duration(duration: timedelta) -> str:
    """Return a duration as Go prints it: `1h30m0s`, `1.5s`, `250ms`, `10µs`, `0s`."""
    micros = duration // timedelta(microseconds=1)
    sign, micros = ("-", -micros) if micros < 0 else ("", micros)
    if micros == 0:
        return "0s"
    if micros < _US_PER_MS:
        return f"{sign}{micros}\u00b5s"
    if micros < _US_PER_S:
        return f"{sign}{_fraction(micros, _US_PER_MS)}ms"
    minutes, rest = divmod(micros, 60 * _US_PER_S)
    hours, minutes = divmod(minutes, 60)
    text = f"{_fraction(rest, _US_PER_S)}s"
    if hours:
        return f"{sign}{hours}h{minutes}m{text}"
    return f"{sign}{minutes}m{text}" if minutes else sign + text


def _fraction(value: int, unit: int) -> str:
    whole, rest = divmod(value, unit)
    if not rest:
        return str(whole)
    digits = str(rest).rjust(len(str(unit)) - 1, "0").rstrip("0")
    return f"{whole}.{digits}"
