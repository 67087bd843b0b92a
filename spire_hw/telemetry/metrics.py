"""The face of metrics that every room counts through, and the one that takes nothing down.

A name is a tuple of words in upstream's spelling, such as `("ca", "manager", "x509_ca",
"activate")`; what reads them joins the words its own way. Names and label names are written in
the source: nothing that a peer sends becomes one. Label values come from small sets.

All methods are quick, never raise, never wait, and may be called from any thread.

Source: upstream's `telemetry` package; names: docs/operations.md.
"""

from __future__ import annotations

import asyncio
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol, Self

from spire_hw.errors import ErrorKind, SpireHwError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

Name = tuple[str, ...]

NO_LABELS: Final[Mapping[str, str]] = MappingProxyType({})
ELAPSED: Final = "elapsed_time"
STATUS: Final = "status"

# What gRPC calls its codes in Go: the values of the label `status`.
_STATUS_WORDS: Final = {
    ErrorKind.CANCELLED: "Canceled",
    ErrorKind.UNKNOWN: "Unknown",
    ErrorKind.INVALID_ARGUMENT: "InvalidArgument",
    ErrorKind.DEADLINE_EXCEEDED: "DeadlineExceeded",
    ErrorKind.NOT_FOUND: "NotFound",
    ErrorKind.ALREADY_EXISTS: "AlreadyExists",
    ErrorKind.PERMISSION_DENIED: "PermissionDenied",
    ErrorKind.RESOURCE_EXHAUSTED: "ResourceExhausted",
    ErrorKind.FAILED_PRECONDITION: "FailedPrecondition",
    ErrorKind.ABORTED: "Aborted",
    ErrorKind.UNIMPLEMENTED: "Unimplemented",
    ErrorKind.INTERNAL: "Internal",
    ErrorKind.UNAVAILABLE: "Unavailable",
    ErrorKind.UNAUTHENTICATED: "Unauthenticated",
}
OK: Final = "OK"


class Metrics(Protocol):
    """Takes measurements."""

    def count(self, name: Name, by: float = 1.0, labels: Mapping[str, str] = NO_LABELS) -> None:
        """Add to a counter; `by` is not negative."""
        ...

    def gauge(self, name: Name, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        """Set a value that goes up and down."""
        ...

    def sample(self, name: Name, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        """Add to a distribution; times are in milliseconds."""
        ...


class _NoMetrics:
    def count(self, name: Name, by: float = 1.0, labels: Mapping[str, str] = NO_LABELS) -> None:
        pass

    def gauge(self, name: Name, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        pass

    def sample(self, name: Name, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        pass


NO_METRICS: Final[Metrics] = _NoMetrics()


class Labelled:
    """Takes measurements for others, with labels that each of them gets besides its own."""

    def __init__(self, metrics: Metrics, labels: Mapping[str, str]) -> None:
        self._metrics = metrics
        self._labels = dict(labels)

    def count(self, name: Name, by: float = 1.0, labels: Mapping[str, str] = NO_LABELS) -> None:
        """Add to a counter."""
        self._metrics.count(name, by, {**self._labels, **labels})

    def gauge(self, name: Name, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        """Set a value that goes up and down."""
        self._metrics.gauge(name, value, {**self._labels, **labels})

    def sample(self, name: Name, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        """Add to a distribution."""
        self._metrics.sample(name, value, {**self._labels, **labels})


def status_of(error: BaseException | None) -> str:
    """Return the value of the label `status` for how a call ended; None is success."""
    if error is None:
        return OK
    if isinstance(error, SpireHwError):
        return _STATUS_WORDS[error.kind]
    # A stream whose caller went away is closed where it stands.
    return "Canceled" if isinstance(error, asyncio.CancelledError | GeneratorExit) else "Unknown"


class Timed:
    """Upstream's call counter, as a context manager around one call.

    It counts `<name>` and samples `<name>.elapsed_time` in milliseconds, both with the label
    `status`.
    """

    __slots__ = ("_labels", "_metrics", "_name", "_start")

    def __init__(self, metrics: Metrics, name: Name, labels: Mapping[str, str] = NO_LABELS) -> None:
        self._metrics = metrics
        self._name = name
        self._labels = labels
        self._start = 0.0

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._metrics is NO_METRICS:
            return
        taken_ms = (time.monotonic() - self._start) * 1000
        labels = {**self._labels, STATUS: status_of(error)}
        self._metrics.count(self._name, labels=labels)
        self._metrics.sample((*self._name, ELAPSED), taken_ms, labels)


def count_fault(metrics: Metrics, code: str) -> None:
    """Count a fault of a device under its stable code, such as `hsm.token_missing`.

    The metric is `<room>.fault` with the rest of the code as label `code`.
    """
    room, _, rest = code.partition(".")
    metrics.count((room, "fault"), labels={"code": rest})
