"""What an external plugin writes to its standard error, as lines of our log.

A line is hclog's JSON, or text with a level in brackets in front, or anything else. Nothing a
plugin writes can break the log: what does not fit hclog's rules is taken as text, lines are cut,
and who writes too much is slowed down and has lines dropped, with a note of how many.

Source: contract of go-plugin's client, section 10.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from spire_hw.log import Level

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.clock import Clock
    from spire_hw.log import Logger

MAX_LINE_BYTES: Final = 64 * 1024
# In a window of this length; what is more is dropped, and read no faster than that either.
WINDOW_S: Final = 1.0
LOGGED_LINES: Final = 500
_READ_LINES: Final = 10_000
_READ_BYTES: Final = 1 << 20
_MAX_FIELDS: Final = 32
_KEPT_LINES: Final = 3
_KEPT_CHARS: Final = 300

_LEVELS: Final = {
    "trace": Level.TRACE,
    "debug": Level.DEBUG,
    "info": Level.INFO,
    "warn": Level.WARN,
    "warning": Level.WARN,
    "error": Level.ERROR,
    "critical": Level.ERROR,
    "fatal": Level.ERROR,
}
_BRACKETS: Final = {
    f"[{name.upper()}]": _LEVELS[name] for name in ("trace", "debug", "info", "warn", "error")
}
_CRASHES: Final = ("panic: ", "fatal error: ", "Traceback (most recent call last):")
_LEVEL, _MESSAGE, _TIME = "@level", "@message", "@timestamp"
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.\-]{0,63}", re.ASCII)
# Names with a meaning of their own on the way to the log, or that say who speaks.
_TAKEN: Final = frozenset(
    [
        "event",
        "exc_info",
        "stack",
        "stack_info",
        "error_type",
        "level",
        "msg",
        "time",
        "func",
        "file",
        "subsystem_name",
        "plugin_name",
        "plugin_type",
        "external",
        "self",
    ]
)


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a plugin, ready for the log."""

    level: Level
    message: str
    fields: dict[str, Any] = field(default_factory=dict)


class Interpreter:
    """Turns a plugin's lines into log lines; knows whether a crash is being told."""

    def __init__(self) -> None:
        self._crashing = False

    def read(self, line: bytes) -> LogLine:
        """Return what a line without its newline means; takes anything."""
        text = line.decode("utf-8", "replace").rstrip("\r")
        found = _json_line(text) if text.startswith("{") else None
        if found is not None:
            self._crashing = False
            return found
        for mark, level in _BRACKETS.items():
            if text.startswith(mark):
                self._crashing = False
                return LogLine(level, text.removeprefix(mark).strip())
        self._crashing = self._crashing or text.startswith(_CRASHES)
        return LogLine(Level.ERROR if self._crashing else Level.DEBUG, text)


def _json_line(text: str) -> LogLine | None:
    """Return the meaning of hclog's JSON, None for what is not quite that."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not values.keys() & {_LEVEL, _MESSAGE, _TIME}:
        return None
    message, level, time = values.get(_MESSAGE, ""), values.get(_LEVEL, ""), values.get(_TIME, "")
    if not (isinstance(message, str) and isinstance(level, str) and isinstance(time, str)):
        return None
    fields: dict[str, Any] = {}
    for key, value in values.items():
        if key in {_LEVEL, _MESSAGE} or len(fields) >= _MAX_FIELDS:
            continue
        fields[_field_name(key)] = value
    return LogLine(_LEVELS.get(level.lower(), Level.DEBUG), message, fields)


def _field_name(key: str) -> str:
    name = key.removeprefix("@")
    if key == _TIME:
        return "plugin_timestamp"
    return name if _NAME.fullmatch(name) and name not in _TAKEN else f"field.{key[:64]}"


class LineLog:
    """Puts a plugin's lines into our log, at most so many in a second."""

    def __init__(self, log: Logger, clock: Clock) -> None:
        self._log = log
        self._clock = clock
        self._interpreter = Interpreter()
        self._window_end = clock.monotonic() + WINDOW_S
        self._logged = 0
        self._dropped = 0
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)

    def write(self, line: bytes) -> None:
        """Take one line, without its newline."""
        if not line.strip():
            return
        now = self._clock.monotonic()
        if now >= self._window_end:
            self._window_end, self._logged = now + WINDOW_S, 0
            self.tell_dropped()
        if self._logged >= LOGGED_LINES:
            self._dropped += 1
            return
        self._logged += 1
        found = self._interpreter.read(line)
        self._last.append(found.message)
        self._put(found)

    def _put(self, found: LogLine) -> None:
        match found.level:
            case Level.TRACE:
                return
            case Level.DEBUG:
                self._log.debug(found.message, **found.fields)
            case Level.INFO:
                self._log.info(found.message, **found.fields)
            case Level.WARN:
                self._log.warning(found.message, **found.fields)
            case _:
                self._log.error(found.message, **found.fields)

    def tell_dropped(self) -> None:
        """Say how many lines were dropped since this was last said."""
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._log.warning(
                "Log lines of the plugin were dropped, it writes too many", count=dropped
            )

    def complain(self, task: str, error: BaseException) -> None:
        """Say that looking after the plugin went wrong."""
        self._log.error("Plugin was not cleared away", task=task, exc_info=error)

    @property
    def last_words(self) -> str:
        """Return the end of what the plugin said, for messages about its end; "" for nothing."""
        text = " | ".join(line.strip() for line in self._last)
        return ascii(text[-_KEPT_CHARS:])[1:-1] if text else ""


class LineCutter:
    """Cuts what comes in pieces into lines; a line over the limit into pieces."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._rest = b""

    def feed(self, data: bytes) -> int:
        """Hand on the lines that are complete; return how many there were."""
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            for start in range(0, max(1, len(line)), MAX_LINE_BYTES):
                self._take(line[start : start + MAX_LINE_BYTES])
        while len(rest) > MAX_LINE_BYTES:
            self._take(rest[:MAX_LINE_BYTES])
            rest = rest[MAX_LINE_BYTES:]
        self._rest = rest
        return len(lines)

    def flush(self) -> None:
        """Hand on what is left, at the end."""
        if self._rest:
            self._take(self._rest)
            self._rest = b""


class Throttle:
    """Tells when so much came in that the rest may wait."""

    def __init__(self, now: Callable[[], float]) -> None:
        """Begin.

        Args:
            now: seconds from any start.
        """
        self._now = now
        self._window_end = now() + WINDOW_S
        self._bytes = 0
        self._lines = 0

    def pause_s(self, size: int, lines: int) -> float:
        """Count what came in; return for how many seconds nothing more should be read."""
        now = self._now()
        if now >= self._window_end:
            self._window_end, self._bytes, self._lines = now + WINDOW_S, 0, 0
        self._bytes += size
        self._lines += lines
        if self._bytes <= _READ_BYTES and self._lines <= _READ_LINES:
            return 0.0
        return self._window_end - now


class LinePipe(asyncio.Protocol):
    """Reads lines out of a pipe, not faster than is good for the host.

    Attributes:
        ended: done when the other end is closed.
    """

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._cutter = LineCutter(take)
        self._loop = asyncio.get_running_loop()
        self._throttle = Throttle(self._loop.time)
        self._transport: asyncio.ReadTransport | None = None
        self.ended: asyncio.Future[None] = self._loop.create_future()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        assert isinstance(transport, asyncio.ReadTransport)  # noqa: S101 - narrows the type
        self._transport = transport

    @override
    def data_received(self, data: bytes) -> None:
        """Hand on complete lines; when a lot came, read no more for a while: the plugin waits."""
        pause_s = self._throttle.pause_s(len(data), self._cutter.feed(data))
        if pause_s and self._transport is not None:
            self._transport.pause_reading()
            self._loop.call_later(pause_s, self._resume)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """Hand on what is left."""
        self._cutter.flush()
        self._transport = None
        if not self.ended.done():
            self.ended.set_result(None)

    def close(self) -> None:
        """Stop reading."""
        if self._transport is not None:
            self._transport.close()

    def _resume(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()
