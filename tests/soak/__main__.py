"""Repeats the hostile act of every numbered case and looks at what is left behind.

    python -m tests.soak                       all cases, 10 000 times each
    python -m tests.soak --times 200 98 150    these cases, 200 times each

First every test of the cases runs as it is, so that it is known which acts there are; then each file
of tests in a process of its own, with its acts repeated, as many files at a time as --jobs says. A
case's repetitions are shared by its acts. SPIRE_HW_SOAK says how often where --times does not. Results
go to build/soak; begun anew with --known it goes on with the tests that were not finished, or not well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.hostile.cases.table import CASES
from tests.soak import report
from tests.soak.meter import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.hostile.cases.case import Case

ROOT: Final = Path(__file__).resolve().parents[2]
PLACE: Final = ROOT / "build" / "soak"
TIMES: Final = 10_000


def run(
    place: Path, files: Sequence[str], cases: Sequence[Case], times: dict[str, list[int]], name: str
) -> Path:
    """Run one worker and return where its results are; they are added to older ones."""
    plan, result = place / f"{name}.plan.json", place / f"{name}.jsonl"
    numbers = [case.number for case in cases if not case.beyond]
    plan.write_text(json.dumps({"cases": numbers, "times": times}))
    with (place / f"{name}.log").open("w") as log:
        subprocess.run(  # noqa: S603
            [sys.executable, "-m", "tests.soak.worker", str(plan), str(result), *files],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return result


@dataclass(frozen=True, slots=True)
class Soak:
    """A soak of some cases.

    Attributes:
        chosen: the cases.
        times: that each is repeated.
        place: for results.
        words: only files of tests whose path has one of them; all without any.
        known: acts, and the results of finished tests, are those of the last run.
        jobs: files at a time.
    """

    chosen: Sequence[Case]
    times: int
    place: Path
    words: Sequence[str] = ()
    known: bool = False
    jobs: int = 1

    def run(self) -> int:
        """Soak; return the exit status."""
        self.place.mkdir(parents=True, exist_ok=True)
        files = sorted({file for case in self.chosen for file in case.files() if not case.beyond})
        files = [f for f in files if not self.words or any(word in f for word in self.words)]
        once = self.place / "once.jsonl"
        if not self.known:
            once.unlink(missing_ok=True)
            run(self.place, files, self.chosen, {}, "once")
        seen, faults = report.read(once)
        planned = report.plan(seen, self.chosen, self.times)
        parts = [{t: each for t, each in planned.items() if t.startswith(f)} for f in files]
        weighed = sorted(zip(files, parts, strict=True), key=lambda each: -report.size(each[1]))
        acts: list[report.Act] = []
        with ThreadPoolExecutor(self.jobs) as pool:
            running = {pool.submit(self._file, file, part): file for file, part in weighed if part}
            for each in as_completed(running):
                done, failures = each.result()
                acts += done
                faults += failures
                self._show(running[each], done)
        lines, found = report.table(acts, self.chosen, self.times)
        faults += found
        text = "\n".join([*lines, "", *(f"FAULT {fault}" for fault in faults)]) + "\n"
        (self.place / "table.txt").write_text(text)
        sys.stdout.write(f"\n{text}{len(self.chosen)} cases, {len(faults)} faults\n")
        return 1 if faults else 0

    def _file(self, file: str, part: dict[str, list[int]]) -> tuple[list[report.Act], list[str]]:
        name = file.removeprefix("tests/").removesuffix(".py").replace("/", "-")
        result = self.place / f"{name}.jsonl"
        if not self.known:
            result.unlink(missing_ok=True)
        if left := report.left(*report.read(result), part):
            run(self.place, [file], self.chosen, left, name)
        return report.read(result)

    def _show(self, file: str, done: Sequence[report.Act]) -> None:
        repeated = {case.number for act in done if act.growth is not None for case in act.cases}
        lines, _ = report.table(done, [c for c in self.chosen if c.number in repeated], 0)
        sys.stdout.write(f"\n{file}\n" + "\n".join(lines) + "\n")
        sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("cases", nargs="*", type=int, metavar="CASE")
    default = int(os.environ.get("SPIRE_HW_SOAK", TIMES))
    parser.add_argument("--times", type=int, default=default, help="for each case")
    parser.add_argument("--files", nargs="*", default=[], help="only tests in such files")
    parser.add_argument("--place", type=Path, default=PLACE, help="for results")
    parser.add_argument("--known", action="store_true", help="go on with the last run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="files at a time")
    asked = parser.parse_args(arguments)
    chosen = [case for case in CASES if not asked.cases or case.number in asked.cases]
    return Soak(
        chosen, asked.times, asked.place, asked.files, known=asked.known, jobs=asked.jobs
    ).run()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
