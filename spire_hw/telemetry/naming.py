"""Names and labels as upstream's Prometheus exposition spells them, and which are kept.

Source: upstream's `telemetry.SanitizeLabels`; go-metrics' Prometheus sink and its filters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from spire_hw.telemetry.metrics import Name

_UNCLEAN: Final = re.compile(r"\W+_?", re.ASCII)
_UNNAMEABLE: Final = re.compile(r"[^a-zA-Z0-9_:]")
_MAX_CHARS: Final = 200
_RESERVED: Final = frozenset({"le", "quantile"})


def clean(text: str) -> str:
    """Return a label's name or value with everything but letters, digits and _ replaced."""
    return _UNCLEAN.sub("_", text[:_MAX_CHARS])


def label_name(text: str) -> str:
    """Return a label's name as Prometheus takes one from outside: `__` and `quantile` are its own."""
    name = clean(text)
    if name.startswith("__") or not name or name[0].isdigit():
        name = "_" + name.lstrip("_")
    return f"exported_{name}" if name in _RESERVED else name


def family_name(prefix: str, name: Name) -> str:
    """Return `<prefix>_<word>_<word>`, which is a Prometheus name whatever the words hold."""
    return _UNNAMEABLE.sub("_", "_".join((prefix, *name))[:_MAX_CHARS])


@dataclass(frozen=True, slots=True)
class Selection:
    """Which metrics and labels are kept, and what is put before names.

    Attributes:
        prefix: such as `spire_server`.
        allowed, blocked: beginnings of dotted names, prefix included; the longest one that fits
            decides, and without one a metric is kept.
        allowed_labels: when not None, labels not in it are left out.
        blocked_labels: labels that are left out.
    """

    prefix: str
    allowed: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()
    allowed_labels: frozenset[str] | None = None
    blocked_labels: frozenset[str] = frozenset()

    def takes(self, name: Name) -> bool:
        """Tell whether a metric is kept."""
        dotted = ".".join((self.prefix, *name))
        allowed = max((len(p) for p in self.allowed if dotted.startswith(p)), default=-1)
        blocked = max((len(p) for p in self.blocked if dotted.startswith(p)), default=-1)
        return allowed > blocked or blocked < 0

    def takes_label(self, name: str) -> bool:
        """Tell whether a label is kept."""
        if self.allowed_labels is not None and name not in self.allowed_labels:
            return False
        return name not in self.blocked_labels
