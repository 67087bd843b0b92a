"""One process that runs hostile cases: pytest with a plugin that repeats their acts.

    python -m tests.soak.worker PLAN.json RESULT.jsonl FILE...

PLAN is {"cases": [number, ...], "times": {test: [times of its first act, of its second, ...]}}; without
times the tests of the cases run as they are. A line of RESULT is one act, or the end of one test.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from spire_hw.errors import SpireHwError
from spire_hw_sim.again import soaking
from tests.hostile.cases.table import CASES
from tests.soak.meter import Growth, Held

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

SLICES: Final = 10
OPTIONS: Final = (
    *("-o", "addopts=", "--import-mode=importlib", "-q", "-s", "--timeout=0"),
    *("-p", "no:logging", "-p", "no:cacheprovider", "-p", "no:xdist"),
)
_CHANGING: Final = re.compile(r"[0-9a-fA-F]{8,}|\d+")


def _warm(times: int) -> int:
    """Return how many repetitions fill what is filled once."""
    return max(times // 10, 200)


def _plain(error: SpireHwError) -> tuple[str, str]:
    return error.kind.name, _CHANGING.sub("#", error.message)


class Repeater:
    """A pytest plugin that is told of acts."""

    def __init__(self, plan: dict[str, Any], result: Path) -> None:
        """Describe it; see the module for both."""
        self._cases = [case for case in CASES if case.number in plan["cases"]]
        self._times: dict[str, list[int]] = plan["times"]
        self._result = result
        self._test = ""
        self._act = 0

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave out what belongs to no case, and what is not to be repeated."""
        chosen = [item for item in items if any(case.has(item.nodeid) for case in self._cases)]
        if self._times:
            chosen = [item for item in chosen if item.nodeid in self._times]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Count acts anew."""
        self.begin(item.nodeid)
        return (yield)

    def begin(self, test: str) -> None:
        """Take the acts to come for those of a test."""
        self._test, self._act = test, 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write down how a test ended."""
        if report.when == "call" or not report.passed:
            self._write(
                test=report.nodeid, outcome=report.outcome, text=report.longreprtext[-3000:]
            )

    def _write(self, **what: Any) -> None:
        with self._result.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def _times_of_next(self) -> int:
        times = self._times.get(self._test, [])
        self._act += 1
        return times[self._act - 1] if self._act <= len(times) else 0

    def repeat(self, act: Callable[[], object], error: SpireHwError) -> None:
        """Repeat an act."""
        times, wanted = self._times_of_next(), _plain(error)

        def once() -> None:
            try:
                act()
            except SpireHwError as e:
                if _plain(e) == wanted:
                    return
                raise AssertionError(f"another refusal: {e}, not {error}") from e
            raise AssertionError("a hostile act succeeded later on")

        def run(count: int) -> None:
            for _ in range(count):
                once()

        begun, growth = time.monotonic(), None
        if times:
            each = -(-times // SLICES)
            gc.freeze()
            run(_warm(times))
            moments = [Held.now()]
            for _ in range(SLICES):
                run(each)
                moments.append(Held.now())
            gc.unfreeze()
            growth = Growth.of(moments, each)
        self._told(error, growth, time.monotonic() - begun)

    async def repeat_async(self, act: Callable[[], Awaitable[object]], error: SpireHwError) -> None:
        """Repeat an act."""
        times, wanted = self._times_of_next(), _plain(error)

        async def once() -> None:
            try:
                await act()
            except SpireHwError as e:
                if _plain(e) == wanted:
                    return
                raise AssertionError(f"another refusal: {e}, not {error}") from e
            raise AssertionError("a hostile act succeeded later on")

        async def run(count: int) -> None:
            for _ in range(count):
                await once()
                await asyncio.sleep(0)  # as the next message of a socket would have it

        begun, growth = time.monotonic(), None
        if times:
            each = -(-times // SLICES)
            await asyncio.sleep(0)
            gc.freeze()
            await run(_warm(times))
            moments = [await Held.settled()]
            for _ in range(SLICES):
                await run(each)
                moments.append(await Held.settled(moments[0].tasks))
            gc.unfreeze()
            growth = Growth.of(moments, each)
        self._told(error, growth, time.monotonic() - begun)

    def _told(self, error: SpireHwError, growth: Growth | None, seconds: float) -> None:
        self._write(
            test=self._test,
            act=self._act - 1,
            kind=error.kind.name,
            message=error.message,
            growth=None if growth is None else asdict(growth),
            seconds=seconds,
        )


def _main(arguments: list[str]) -> int:
    plan, result, *files = arguments
    repeater = Repeater(json.loads(Path(plan).read_text()), Path(result))
    with soaking(repeater):
        return int(pytest.main([*OPTIONS, *files], plugins=[repeater]))


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
