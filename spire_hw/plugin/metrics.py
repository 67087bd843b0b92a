"""Measurements of plugins: to the host's metrics, and as lines of the log for who writes plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.telemetry.metrics import NO_LABELS, NO_METRICS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.telemetry.metrics import Metrics

_LINES_PER_WINDOW: Final = 100
_WINDOW_S: Final = 1.0


class PluginMetrics:
    """Hands each measurement on, and logs it at debug level, at most a hundred in a second."""

    def __init__(self, log: Logger, clock: Clock, metrics: Metrics = NO_METRICS) -> None:
        self._log = log
        self._metrics = metrics
        self._clock = clock
        self._window_end = 0.0
        self._lines = 0

    async def set_gauge(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        """Set a value that goes up and down."""
        self._metrics.gauge(tuple(key), value, labels or NO_LABELS)
        self._tell("gauge", key, value, labels)

    async def emit_key(self, key: Sequence[str], value: float) -> None:
        """Tell one value; Prometheus has no place for it, upstream's does not take it either."""
        self._tell("value", key, value, None)

    async def incr_counter(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        """Count something."""
        self._metrics.count(tuple(key), max(0.0, value), labels or NO_LABELS)
        self._tell("counter", key, value, labels)

    async def add_sample(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        """Add to a distribution."""
        self._metrics.sample(tuple(key), value, labels or NO_LABELS)
        self._tell("sample", key, value, labels)

    async def measure_since(
        self, key: Sequence[str], start: datetime, labels: Mapping[str, str] | None = None
    ) -> None:
        """Add the time from start to now to a distribution, in milliseconds."""
        taken_ms = (self._clock.now() - start).total_seconds() * 1000
        self._metrics.sample(tuple(key), taken_ms, labels or NO_LABELS)
        self._tell("sample", key, taken_ms, labels)

    def _tell(
        self, what: str, key: Sequence[str], value: float, labels: Mapping[str, str] | None
    ) -> None:
        now = self._clock.monotonic()
        if now >= self._window_end:
            self._window_end, self._lines = now + _WINDOW_S, 0
        self._lines += 1
        if self._lines <= _LINES_PER_WINDOW:
            self._log.debug(
                "Measurement of a plugin",
                metric=".".join(key),
                metric_type=what,
                metric_value=value,
                labels=dict(labels or {}),
            )
