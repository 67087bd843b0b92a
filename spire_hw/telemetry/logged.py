"""Counts what the log tells under a stable code: `hsm.read_only` as `hsm.event`, code `read_only`.

What is worth a code of its own in the log is worth a counter; this way no place can have one
without the other.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from spire_hw import log as logs

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.telemetry.metrics import Metrics

_CODE: Final = re.compile(r"([a-z][a-z0-9]{1,15})\.([a-z][a-z0-9_]{1,60})")


def count_log_lines(metrics: Metrics) -> Callable[[], None]:
    """Count from now on; the level is a label too.

    Returns:
        What stops it.
    """

    def count(level: logs.Level, message: str) -> None:
        found = _CODE.fullmatch(message)
        if found is not None:
            labels = {"code": found[2], "level": level.label}
            metrics.count((found[1], "event"), labels=labels)

    output = logs.output()
    output.observer = count

    def stop() -> None:
        if output.observer is count:
            output.observer = None

    return stop
