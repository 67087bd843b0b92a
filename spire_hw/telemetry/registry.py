"""Holds what was measured, within bounds, until somebody reads it.

A family is all that goes by one name, a series one set of labels in it. Distributions keep their
last values of the last ten minutes: what upstream's library estimates is exact here.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

from spire_hw.telemetry.metrics import NO_LABELS
from spire_hw.telemetry.naming import clean, family_name, label_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from spire_hw.telemetry.metrics import Name
    from spire_hw.telemetry.naming import Selection

QUANTILES: Final = (0.5, 0.9, 0.99)
WINDOW_S: Final = 600.0
MAX_SERIES: Final = 5000
_KEPT: Final = 256
_PARTS: Final = ("_sum", "_count")
# Counts what found no room; it has its own from the start.
DROPPED: Final = ("telemetry", "dropped")

LabelPairs = tuple[tuple[str, str], ...]


class Kind(Enum):
    """What a family holds; the values are Prometheus's words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    SUMMARY = "summary"


class Summary:
    """One distribution: all of it counted, the last values kept."""

    __slots__ = ("_at", "_times", "_values", "count", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._values = array("d")
        self._times = array("d")
        self._at = 0

    def add(self, value: float, now: float) -> None:
        """Take one value in."""
        self.count += 1
        self.total += value
        if len(self._values) < _KEPT:
            self._values.append(value)
            self._times.append(now)
            return
        self._values[self._at] = value
        self._times[self._at] = now
        self._at = (self._at + 1) % _KEPT

    def quantiles(self, now: float) -> tuple[float, ...]:
        """Return `QUANTILES` of the values that are young enough; NaN when there are none."""
        young = sorted(
            v for v, t in zip(self._values, self._times, strict=True) if now - t <= WINDOW_S
        )
        if not young:
            return tuple(math.nan for _ in QUANTILES)
        return tuple(young[max(0, math.ceil(q * len(young)) - 1)] for q in QUANTILES)


@dataclass(frozen=True, slots=True)
class Reading:
    """One family as it stands.

    Attributes:
        series: labels and the value, which is a tuple for a summary: quantiles, sum, count.
    """

    name: str
    kind: Kind
    series: tuple[tuple[LabelPairs, float | tuple[float, ...]], ...]


@dataclass(slots=True)
class _Family:
    kind: Kind
    values: dict[LabelPairs, float] = field(default_factory=dict)
    summaries: dict[LabelPairs, Summary] = field(default_factory=dict)


class Registry:
    """The metrics of one process; see `spire_hw.telemetry.metrics.Metrics`."""

    def __init__(
        self,
        selection: Selection,
        *,
        constant: Mapping[str, str] = NO_LABELS,
        monotonic: Callable[[], float] = time.monotonic,
        max_series: int = MAX_SERIES,
    ) -> None:
        """Make an empty one.

        Args:
            selection: prefix of names, and what of names and labels is kept.
            constant: labels of every series.
            monotonic: seconds that never go back.
            max_series: beyond this nothing new is taken in, only counted as dropped.
        """
        self._selection = selection
        self._constant = tuple((label_name(k), v) for k, v in constant.items())
        self._monotonic = monotonic
        self._max_series = max_series
        self._families: dict[str, _Family] = {}
        self._routes: dict[tuple[Kind, Name, LabelPairs], tuple[_Family, LabelPairs] | None] = {}
        self._lock = threading.Lock()
        self._readers: list[Callable[[], None]] = []
        self._dropped = self._route(Kind.COUNTER, DROPPED, ())

    def before_reading(self, measure: Callable[[], None]) -> None:
        """Have a function set gauges right before they are read."""
        self._readers.append(measure)

    def count(self, name: Name, by: float = 1.0, labels: Mapping[str, str] = NO_LABELS) -> None:
        """Add to a counter."""
        self._add(Kind.COUNTER, name, by, labels)

    def gauge(self, name: Name, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        """Set a value that goes up and down."""
        self._add(Kind.GAUGE, name, value, labels)

    def sample(self, name: Name, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        """Add to a distribution."""
        self._add(Kind.SUMMARY, name, value, labels)

    def forget(self, name: Name) -> None:
        """Drop all series of a gauge whose labels name things that come and go."""
        flat = family_name(self._selection.prefix, name)
        with self._lock:
            family = self._families.pop(flat, None)
            if family is None:
                return
            gone = [k for k, r in self._routes.items() if r is not None and r[0] is family]
            for key in gone:
                del self._routes[key]

    def read(self) -> Iterator[Reading]:
        """Return every family, in the order of names."""
        for measure in self._readers:
            measure()
        now = self._monotonic()
        with self._lock:
            found = [
                Reading(name, family.kind, tuple(_series(family, now)))
                for name, family in self._families.items()
                if family.values or family.summaries
            ]
        yield from sorted(found, key=lambda r: r.name)

    def _add(self, kind: Kind, name: Name, value: float, labels: Mapping[str, str]) -> None:
        given = tuple(labels.items())
        now = self._monotonic() if kind is Kind.SUMMARY else 0.0
        with self._lock:
            try:
                route = self._routes[kind, name, given]
            except KeyError:
                route = self._route(kind, name, given)
            if route is None:
                return
            family, pairs = route
            if kind is Kind.SUMMARY:
                family.summaries[pairs].add(value, now)
            elif kind is Kind.COUNTER:
                family.values[pairs] += value
            else:
                family.values[pairs] = float(value)

    def _route(
        self, kind: Kind, name: Name, given: LabelPairs
    ) -> tuple[_Family, LabelPairs] | None:
        """Find or make the place of a series; None when it is not wanted or has no room."""
        if len(self._routes) >= self._max_series:
            self._drop()
            return None
        selection = self._selection
        if not selection.takes(name):
            self._routes[kind, name, given] = None
            return None
        flat = family_name(selection.prefix, name)
        if self._is_taken(flat, kind):
            self._drop()
            return None
        family = self._families.setdefault(flat, _Family(kind))
        labels = {label_name(k): clean(v) for k, v in given} | dict(self._constant)
        pairs = tuple(sorted((k, v) for k, v in labels.items() if selection.takes_label(k)))
        if kind is Kind.SUMMARY:
            family.summaries.setdefault(pairs, Summary())
        else:
            family.values.setdefault(pairs, 0.0)
        route = self._routes[kind, name, given] = (family, pairs)
        return route

    def _is_taken(self, name: str, kind: Kind) -> bool:
        """Tell whether a name is of another kind, or means a part of a distribution."""
        family = self._families.get(name)
        if family is not None:
            return family.kind is not kind
        if kind is Kind.SUMMARY:
            return any(name + suffix in self._families for suffix in _PARTS)
        return any(
            name.endswith(suffix) and self._is_summary(name.removesuffix(suffix))
            for suffix in _PARTS
        )

    def _is_summary(self, name: str) -> bool:
        family = self._families.get(name)
        return family is not None and family.kind is Kind.SUMMARY

    def _drop(self) -> None:
        if self._dropped is not None:
            family, pairs = self._dropped
            family.values[pairs] += 1


def _series(family: _Family, now: float) -> Iterator[tuple[LabelPairs, float | tuple[float, ...]]]:
    yield from family.values.items()
    for pairs, summary in family.summaries.items():
        yield pairs, (*summary.quantiles(now), summary.total, float(summary.count))
