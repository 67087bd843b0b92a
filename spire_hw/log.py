"""Structured logs with upstream's key names, as text or JSON.

One `Output` per process takes every line: those of our loggers, those of the standard library's
`logging` (grpc, alembic, aiohttp). It is the last place before a line leaves the process, so it
redacts secrets and escapes whatever could forge a line.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TextIO

from typing_extensions import override

from spire_hw.clock import Clock, SystemClock
from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw.logpipe import LinePipe, may_block
from spire_hw.logtext import clean_key, hidden, plain_text, redacted, render_json, render_text

_RICH: Final = "rich"
if _RICH not in sys.modules:
    # structlog takes rich along wherever it is installed: 5 MiB for tracebacks we do not draw.
    sys.modules[_RICH] = None  # type: ignore[assignment]
    import structlog
    from structlog.typing import FilteringBoundLogger

    del sys.modules[_RICH]
else:
    import structlog
    from structlog.typing import FilteringBoundLogger

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, MutableMapping
    from datetime import datetime
    from pathlib import Path

Logger = FilteringBoundLogger


class Level(enum.IntEnum):
    """How much is logged; the numbers are those of the standard library where it has one."""

    PANIC = 60
    FATAL = 50
    ERROR = 40
    WARN = 30
    INFO = 20
    DEBUG = 10
    TRACE = 5

    @property
    def label(self) -> str:
        """Return the name as it stands in a log line, such as `warning`."""
        return "warning" if self is Level.WARN else self.name.lower()

    @classmethod
    def parse(cls, text: str) -> Level:
        """Return the level for a name in any case.

        Raises:
            InvalidInputError: no such level; the message lists those there are.
        """
        name = text.upper()
        if name == "WARNING":
            return cls.WARN
        if name in cls.__members__:
            return cls[name]
        known = ", ".join(level.name.lower() for level in cls)
        raise InvalidInputError(f'log level "{text[:40]}" is unknown; use one of {known}')

    @classmethod
    def of(cls, number: int) -> Level:
        """Return the level a number of the standard library falls into."""
        return next((level for level in cls if number >= level), cls.TRACE)


class Format(enum.Enum):
    """How a line is written."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Where lines go and which.

    Attributes:
        file: appended to, created with mode 0640; None means standard output.
        source_location: adds `func` and `file` of the calling code.
    """

    level: Level = Level.INFO
    format: Format = Format.TEXT
    file: Path | None = None
    source_location: bool = False


class Output:
    """The end of all log lines of a process; safe to use from any thread.

    Lines that cannot be written (disk full, pipe gone, or full for more than a moment) are counted,
    and the count is the first thing written once it goes on.
    """

    def __init__(
        self,
        settings: LogSettings | None = None,
        *,
        clock: Clock | None = None,
        stream: TextIO | None = None,
    ) -> None:
        """Make an output.

        Args:
            settings: what to write; the defaults without it.
            clock: where the time of a line comes from.
            stream: takes the lines when settings name no file; standard output without it.

        Raises:
            UnavailableError: the log file cannot be opened.
        """
        self._lock = threading.RLock()
        self._descriptor: int | None = None
        self._lost = 0
        # Told of every line that is written: its level and message.
        self.observer: Callable[[Level, str], None] | None = None
        self._take(settings or LogSettings(), clock or SystemClock(), stream)

    def _take(self, settings: LogSettings, clock: Clock, stream: TextIO | None) -> None:
        with self._lock:
            opened = None if settings.file is None else _open(settings.file)
            self._close_file()
            self.settings = settings
            self._descriptor = opened
            self._clock = clock
            self._stream = stream
            self._pipe: tuple[TextIO, LinePipe | None] | None = None
            self.level = settings.level

    def reset_level(self) -> None:
        """Go back to the level of the configuration."""
        self.level = self.settings.level

    def reopen(self) -> None:
        """Open the log file anew, for logrotate; when that fails the old one stays in use."""
        if self.settings.file is None:
            return
        try:
            opened = _open(self.settings.file)
        except UnavailableError as e:
            self.write(Level.ERROR, "Failed to rotate log", {"error": e.message})
            return
        with self._lock:
            self._close_file()
            self._descriptor = opened

    def reopen_on_signal(self, loop: asyncio.AbstractEventLoop) -> None:
        """Reopen the file whenever the process gets SIGUSR2."""
        loop.add_signal_handler(signal.SIGUSR2, self.reopen)

    def close(self) -> None:
        """Close the file; later lines go to standard output."""
        with self._lock:
            self._close_file()

    def _close_file(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def write(self, level: Level, message: str, fields: Mapping[str, Any]) -> None:
        """Write one line, whatever its level; `message` and values may hold anything."""
        now = self._clock.now()
        observer = self.observer
        if observer is not None:
            observer(level, message)
        with self._lock:
            if self._lost:
                told = {"count": self._lost}
                if self._put(self._render(Level.ERROR, now, "Log lines were lost", told)):
                    self._lost = 0
            if not self._put(self._render(level, now, message, fields)):
                self._lost += 1

    def _render(self, level: Level, now: datetime, message: str, fields: Mapping[str, Any]) -> str:
        clean = {clean_key(k): redacted(k, v) for k, v in fields.items()}
        message = hidden(plain_text(message))
        render = render_json if self.settings.format is Format.JSON else render_text
        return render(level.label, now, message, clean)

    def _put(self, line: str) -> bool:
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        try:
            if self._descriptor is not None:
                while data:
                    data = data[os.write(self._descriptor, data) :]
                return True
            stream = sys.stdout if self._stream is None else self._stream
            pipe = self._pipe_of(stream)
            if pipe is not None:
                return pipe.write(data)
            stream.write(data.decode())
            stream.flush()
        except (OSError, ValueError):  # disk full, pipe gone, stream closed: serving goes on
            return False
        return True

    def _pipe_of(self, stream: TextIO) -> LinePipe | None:
        if self._pipe is None or self._pipe[0] is not stream:
            try:
                descriptor = stream.fileno()
                pipe = LinePipe(descriptor) if may_block(descriptor) else None
            except (OSError, ValueError):  # no file behind it
                pipe = None
            self._pipe = (stream, pipe)
        return self._pipe[1]

    def logger(self, subsystem: str) -> Logger:
        """Return a logger that writes here, bound to a subsystem name."""
        made: Logger = structlog.wrap_logger(
            _Sink(self),
            processors=[self._filter, self._locate, _exception, _deliver],
            wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
            context_class=dict,
            cache_logger_on_first_use=True,
            subsystem_name=subsystem,
        )
        return made

    def _filter(
        self, _logger: object, method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        level = _METHODS.get(method, Level.INFO)
        if level < self.level:
            raise structlog.DropEvent
        event["_level"] = level
        return event

    def _locate(
        self, _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        if self.settings.source_location:
            frame = sys._getframe(1)  # noqa: SLF001 - the documented way is inspect, ten times slower
            while frame.f_back and frame.f_globals.get("__name__", "").startswith(_INNER):
                frame = frame.f_back
            event["_func"] = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"
            event["_file"] = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"  # noqa: PTH119
        return event


_INNER: Final = ("structlog", "spire_hw.log", "logging")
_METHODS: Final = {
    "debug": Level.DEBUG,
    "info": Level.INFO,
    "warning": Level.WARN,
    "error": Level.ERROR,
    "exception": Level.ERROR,
    "critical": Level.FATAL,
}


class _Sink:
    """What structlog calls at the end of the chain."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def msg(self, level: Level, message: str, fields: dict[str, Any]) -> None:
        self._output.write(level, message, fields)

    debug = info = warning = error = exception = critical = msg


def _exception(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    given = event.pop("exc_info", None)
    if given is True:
        given = sys.exc_info()[1]
    if isinstance(given, tuple):
        given = given[1]
    if isinstance(given, BaseException):
        event.setdefault("error", str(given) or type(given).__name__)
        event["stack"] = "".join(traceback.format_exception(given))
    return event


def _deliver(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    level = event.pop("_level")
    message = event.pop("event", "")
    return (level, str(message), dict(event)), {}


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as e:
        raise UnavailableError(f"log file {file} cannot be opened: {e.strerror}") from e


# --- the process's output ---------------------------------------------------------------------

_OUTPUT: Final = Output()


class _Bridge(logging.Handler):
    """Hands records of the standard library's logging to our output."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    @override
    def emit(self, record: logging.LogRecord) -> None:
        level = Level.of(record.levelno)
        if level < self._output.level:
            return
        try:
            message = record.getMessage()
        except Exception as e:  # noqa: BLE001 - arguments that do not fit their format
            message = f"{record.msg} (arguments do not fit: {type(e).__name__})"
        fields: dict[str, Any] = {"subsystem_name": record.name}
        if record.exc_info and record.exc_info[1]:
            fields["error"] = str(record.exc_info[1]) or type(record.exc_info[1]).__name__
        self._output.write(level, message, fields)


def output() -> Output:
    """Return the process's output: its level can be read and set."""
    return _OUTPUT


def configure(
    settings: LogSettings, *, clock: Clock | None = None, stream: TextIO | None = None
) -> Output:
    """Set up the process's output and route the standard library's logging to it.

    Loggers made before keep working and follow the new settings.

    Raises:
        UnavailableError: the log file cannot be opened; nothing has changed then.
    """
    _OUTPUT._take(settings, clock or SystemClock(), stream)  # noqa: SLF001 - same module
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _Bridge)]:
        root.removeHandler(handler)
    root.addHandler(_Bridge(_OUTPUT))
    root.setLevel(logging.NOTSET)
    for chatty in ("asyncio", "aiohttp", "grpc"):
        logging.getLogger(chatty).setLevel(logging.INFO)
    # It tells of itself at every start; the datastore tells of migrations.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # At INFO SQLAlchemy tells every statement; `log_sql` asks for that.
    logging.getLogger("sqlalchemy").setLevel(logging.WARNING)
    return _OUTPUT


def unconfigure() -> None:
    """Undo `configure`, for tests and for programs that end."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _Bridge)]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)
    with contextlib.suppress(UnavailableError):
        _OUTPUT._take(LogSettings(), SystemClock(), None)  # noqa: SLF001 - same module


def get_logger(subsystem: str) -> Logger:
    """Return a logger bound to a subsystem name, such as `ca_manager`."""
    return _OUTPUT.logger(subsystem)


class LateLogger:
    """A logger that asks for its fields, and is bound to them, when its first line is written.

    For what is logged rarely: that costs more than the work of a short call.
    """

    __slots__ = ("_bound", "_fields", "_log", "_tell")

    def __init__(self, log: Logger, tell: Callable[[], Mapping[str, object]]) -> None:
        """Describe it; `tell` is called once at most."""
        self._log = log
        self._tell = tell
        self._fields: Mapping[str, object] | None = None
        self._bound: Logger | None = None

    def bind(self, **fields: object) -> LateLogger:
        """Return a logger with further fields."""
        return LateLogger(self._log, lambda: {**self._told(), **fields})

    def _told(self) -> Mapping[str, object]:
        if self._fields is None:
            self._fields = self._tell()
        return self._fields

    def __getattr__(self, name: str) -> Any:
        if self._bound is None:
            self._bound = self._log.bind(**self._told())
        return getattr(self._bound, name)
