"""What a soak came to, case by case."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tests.hostile.cases.case import level_of
from tests.hostile.cases.table import CASES
from tests.soak.meter import Growth

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tests.hostile.cases.case import Case

_MOST_ACTS: Final = 2
_ACT_TIMES: Final = 5000  # of one act at least, where a case has several: less tells little
HEAD: Final = (
    f"{'case':>4} {'level':<13} {'acts':>4} {'times':>7} {'B each':>7} {'KiB':>6} {'rss KiB':>8}"
    f" {'fds':>5} {'tasks':>5} {'s':>6}  ends in"
)


@dataclass(frozen=True, slots=True)
class Act:
    """One act of one test.

    Attributes:
        test: pytest's name of it.
        number: of the act in it.
        kind: of the refusal.
        message: likewise.
        growth: None where it was not repeated.
        seconds: that it took.
    """

    test: str
    number: int
    kind: str
    message: str
    growth: Growth | None
    seconds: float

    @property
    def cases(self) -> list[Case]:
        """Return the cases it belongs to: those of its test that end as it did."""
        return [
            case for case in CASES if case.has(self.test) and case.fits(self.kind, self.message)
        ]


def read(result: Path) -> tuple[list[Act], list[str]]:
    """Return the acts that workers wrote down, and how their tests failed; what came last counts."""
    acts: dict[tuple[str, int], Act] = {}
    failures: dict[str, str] = {}
    lines = result.read_text().splitlines() if result.exists() else []
    for line in lines:
        found: dict[str, Any] = json.loads(line)
        test = found["test"]
        if "act" in found:
            growth = None if found["growth"] is None else Growth(**found["growth"])
            place = (test, found["act"], found["kind"], found["message"])
            acts[test, found["act"]] = Act(*place, growth, found["seconds"])
        elif found["outcome"] == "failed":
            failures[test] = f"{test}: {found['text']}"
        else:
            failures.pop(test, None)
    return list(acts.values()), list(failures.values())


def plan(acts: Iterable[Act], chosen: Sequence[Case], times: int) -> dict[str, list[int]]:
    """Return how often each act is repeated, so that each case has its share.

    Of a case with very many acts, as sweeps have them, some are taken that lie evenly among them.
    """
    counts: dict[tuple[str, int], int] = Counter()
    by_case: dict[int, list[Act]] = {case.number: [] for case in chosen}
    sizes: dict[str, int] = Counter()
    for act in acts:
        sizes[act.test] = max(sizes[act.test], act.number + 1)
        for case in act.cases:
            if case.number in by_case:
                by_case[case.number].append(act)
    for found in by_case.values():
        most = min(_MOST_ACTS, max(times // _ACT_TIMES, 1))
        some = found[:: -(-len(found) // most)] if found else []
        for act in some:
            place = act.test, act.number
            counts[place] = max(counts[place], -(-times // len(some)))
    planned = {
        test: [counts.get((test, n), 0) for n in range(size)] for test, size in sizes.items()
    }
    return {test: each for test, each in planned.items() if any(each)}


def size(planned: dict[str, list[int]]) -> int:
    """Return how many repetitions are planned."""
    return sum(map(sum, planned.values()))


def left(
    acts: Iterable[Act], failures: Iterable[str], planned: dict[str, list[int]]
) -> dict[str, list[int]]:
    """Return what is planned and was not done as often, or not well."""
    done = {
        (act.test, act.number): act.growth.times
        for act in acts
        if act.growth is not None and not act.growth.faults()
    }
    failed = list(failures)
    return {
        test: each
        for test, each in planned.items()
        if any(text.startswith(f"{test}: ") for text in failed)
        or any(done.get((test, n), 0) < times for n, times in enumerate(each) if times)
    }


def table(acts: Sequence[Act], chosen: Sequence[Case], times: int) -> tuple[list[str], list[str]]:
    """Return one line for each case, and what is wrong."""
    lines, faults = [HEAD], []
    for case in chosen:
        found = [a for a in acts if a.growth is not None and case in a.cases]
        if not found:
            lines.append(f"{case.number:>4} {case.beyond or 'NOT REPEATED'}: {case.what}")
            if not case.beyond:
                faults.append(f"case {case.number}: no act of it was repeated")
            continue
        growths = [a.growth for a in found if a.growth is not None]
        done = sum(g.times for g in growths)
        if done < times:
            faults.append(f"case {case.number}: {done} repetitions")
        faults += [
            f"case {case.number}: {fault}: {act.test}, act {act.number}"
            for act, growth in zip(found, growths, strict=True)
            for fault in growth.faults()
        ]
        levels = "+".join(dict.fromkeys(level_of(a.test).value for a in found))
        reason = found[0].message.removeprefix("nodeattestor(tpm): ")[:60]
        lines.append(
            f"{case.number:>4} {levels[:13]:<13} {len(found):>4} {done:>7}"
            f" {max(g.heap for g in growths):>7.2f} {max(g.bytes for g in growths) / 1024:>6.1f}"
            f" {max(g.resident for g in growths) / 1024:>8.0f}"
            f" {max(g.files for g in growths):>5.2f} {max(g.tasks for g in growths):>5.2f}"
            f" {sum(a.seconds for a in found):>6.0f}  {found[0].kind}: {reason}"
        )
    return lines, faults
