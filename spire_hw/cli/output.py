"""Answers on standard output: text for people, the API's message as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import click
from google.protobuf.json_format import MessageToDict

from spire_hw.cli.flags import F, flag
from spire_hw.errors import InvalidInputError

if TYPE_CHECKING:
    from google.protobuf.message import Message

_MINUTE: Final = 60
_HOUR: Final = 60 * _MINUTE
_DAY: Final = 24 * _HOUR


@dataclass(frozen=True, slots=True)
class Printer:
    """Writes one command's answer.

    Attributes:
        as_json: the answer is one line of JSON.
        field: only this part of the answer, `results.0.entry.id`; "" for all of it.
    """

    as_json: bool = False
    field: str = ""

    def message(self, message: Message, pretty: Callable[[], None]) -> None:
        """Write an API message, or what `pretty` writes about it."""
        self.value(to_dict(message) if self.as_json or self.field else {}, pretty)

    def value(self, value: Mapping[str, Any], pretty: Callable[[], None]) -> None:
        """Write plain values, or what `pretty` writes about them."""
        if self.field:
            picked = pick(value, self.field)
            click.echo(picked if isinstance(picked, str) else dump(picked))
        elif self.as_json:
            click.echo(dump(value))
        else:
            pretty()


def output_flags(command: F) -> F:
    """Add `-output` and `-field`; the command gets `output` and `field`."""
    command = flag(
        "field", "Print only this field of the answer, such as results.0.entry.id.", default=""
    )(command)
    kinds = click.Choice(["pretty", "json"])
    return flag("output", "How the answer is printed.", type=kinds, default="pretty")(command)


def to_dict(message: Message) -> dict[str, Any]:
    """Return a message with proto field names, unset scalars and lists included."""
    made: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return made


def dump(value: object) -> str:
    """Return one line of JSON with sorted keys; what could steer a terminal is escaped."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _json_escape(c) for c in text)


def shown(text: str) -> str:
    """Return text from elsewhere as it may be written to a terminal: one line, nothing hidden."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _json_escape(char: str) -> str:
    return json.dumps(char)[1:-1]


def pick(value: Any, path: str) -> Any:
    """Return a part of plain values by keys and list positions with dots between.

    Raises:
        InvalidInputError: there is no such part; the message lists what there is.
    """
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif (
            isinstance(value, list) and step.isascii() and step.isdigit() and int(step) < len(value)
        ):
            value = value[int(step)]
        else:
            there = ", ".join(value) if isinstance(value, Mapping) else "positions from 0"
            raise InvalidInputError(
                f'the answer has no field "{step}" in "{path}"; there is: {there}'
            )
    return value


def table(rows: list[tuple[str, str]], width: int) -> str:
    """Return `label : value` lines, labels padded to width; see `shown`."""
    return "".join(f"{label:<{width}}: {shown(value)}\n" for label, value in rows)


def count_of(number: int, one: str, many: str) -> str:
    """Return `1 entry`, `2 entries`."""
    return f"{number} {one if number == 1 else many}"


def go_time(seconds: int, *, utc: bool = False) -> str:
    """Return epoch seconds as Go prints a time: `2026-11-22 05:00:00 +0000 UTC`."""
    moment = epoch(seconds)
    return (moment if utc else moment.astimezone()).strftime("%Y-%m-%d %H:%M:%S %z %Z")


def rfc3339(seconds: int) -> str:
    """Return epoch seconds as RFC 3339 in UTC."""
    return epoch(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def epoch(seconds: int) -> datetime:
    """Return epoch seconds as a time; years past 9999 become the last second of that year."""
    try:
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    except OverflowError:
        return datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


def relative(then: datetime, now: datetime) -> str:
    """Return how far a time is: `in 3 h 12 min (2026-11-22 08:12 UTC)`, `2 d 1 h ago (...)`."""
    seconds = int((then - now).total_seconds())
    size = abs(seconds)
    if size >= _DAY:
        words = f"{size // _DAY} d {size % _DAY // _HOUR} h"
    elif size >= _HOUR:
        words = f"{size // _HOUR} h {size % _HOUR // _MINUTE} min"
    elif size >= _MINUTE:
        words = f"{size // _MINUTE} min"
    elif size:
        words = f"{size} s"
    else:
        return f"now ({then.astimezone(UTC):%Y-%m-%d %H:%M} UTC)"
    words = f"in {words}" if seconds > 0 else f"{words} ago"
    return f"{words} ({then.astimezone(UTC):%Y-%m-%d %H:%M} UTC)"


def complain(text: str) -> None:
    """Write a line to standard error."""
    print(text, file=sys.stderr, flush=True)
