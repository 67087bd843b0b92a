"""How a fleet fared: latencies, failures by reason, and a line about it now and then."""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import SpireHwError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_CODE: Final = re.compile(r"\[([a-z0-9_]+)\]")
_QUANTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
_PLAIN_S: Final = 10.0
_TERMINAL_S: Final = 0.5


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is not below this share of all; 0 when there are none."""
    if not values:
        return 0.0
    rank = -int(-share * len(values) // 1)
    return sorted(values)[max(rank, 1) - 1]


def reason_of(error: SpireHwError) -> str:
    """Return the reason code of a refusal, else the kind of the error."""
    found = _CODE.search(error.message)
    return found[1] if found else error.kind.name.lower()


@dataclass(slots=True)
class Tally:
    """One kind of exchange.

    Attributes:
        name: what people call it, in the plural.
        times_s: of those that went well.
        failures: how often each reason was given.
        last_error: the latest failure in words, "" without one.
    """

    name: str
    times_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    last_error: str = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count and time what is done meanwhile; an error of ours is counted and goes on."""
        begun = asyncio.get_running_loop().time()
        try:
            yield
        except SpireHwError as e:
            self.failed(e)
            raise
        self.times_s.append(asyncio.get_running_loop().time() - begun)

    def failed(self, error: SpireHwError) -> None:
        """Count a failure."""
        self.failures[reason_of(error)] += 1
        self.last_error = error.message

    def clear(self) -> None:
        """Begin anew."""
        self.times_s.clear()
        self.failures.clear()

    def summary(self) -> dict[str, Any]:
        """Return the figures; latencies in milliseconds."""
        latency = {name: round(quantile(self.times_s, q) * 1000, 2) for name, q in _QUANTILES}
        latency["max"] = round(max(self.times_s, default=0.0) * 1000, 2)
        return {
            "done": len(self.times_s),
            "failed": self.failures.total(),
            "latency_ms": latency,
            "failures": dict(self.failures.most_common()),
        }

    def lines(self) -> Iterator[str]:
        """Yield the same for people."""
        told = self.summary()
        latency = "  ".join(f"{name} {value:g}" for name, value in told["latency_ms"].items())
        yield f"{self.name:<13} {told['done']} done, {told['failed']} failed; ms: {latency}"
        for reason, count in told["failures"].items():
            yield f"  {reason}: {count}"
        if self.last_error:
            yield f"  last: {self.last_error}"


async def show(text: Callable[[], str]) -> None:
    """Write how far a run is, for ever: one changing line on a terminal, else one every ten seconds.

    Args:
        text: one line.
    """
    if not sys.stderr.isatty():
        while True:
            await asyncio.sleep(_PLAIN_S)
            sys.stderr.write(text() + "\n")
            sys.stderr.flush()
    try:
        while True:
            sys.stderr.write(f"\r\x1b[K{text()}")
            sys.stderr.flush()
            await asyncio.sleep(_TERMINAL_S)
    finally:
        sys.stderr.write("\n")
