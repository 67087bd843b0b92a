"""What was measured as Prometheus's text, version 0.0.4.

Written here rather than with prometheus-client, which puts `_total` behind the names of counters:
upstream's have none, and dashboards ask for them by name.

Source: prometheus.io, "Exposition formats"; upstream's help text of a metric is its name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from spire_hw.telemetry.registry import QUANTILES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from spire_hw.telemetry.registry import LabelPairs, Reading

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def encode(readings: Iterable[Reading]) -> bytes:
    """Return the text of all families."""
    return "".join(line for reading in readings for line in _lines(reading)).encode()


def _lines(reading: Reading) -> Iterator[str]:
    name = reading.name
    yield f"# HELP {name} {name}\n# TYPE {name} {reading.kind.value}\n"
    for labels, value in reading.series:
        if not isinstance(value, tuple):
            yield f"{name}{_labels(labels)} {_number(value)}\n"
            continue
        *quantiles, total, count = value
        for quantile, at in zip(QUANTILES, quantiles, strict=True):
            yield f"{name}{_labels((*labels, ('quantile', str(quantile))))} {_number(at)}\n"
        yield f"{name}_sum{_labels(labels)} {_number(total)}\n"
        yield f"{name}_count{_labels(labels)} {_number(count)}\n"


def _labels(pairs: LabelPairs) -> str:
    if not pairs:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
