"""Repeats the hostile act of every numbered case and looks at what is left behind.

    python -m tests.soak                       all cases, 10 000 times each
    python -m tests.soak --times 200 98 150    these cases, 200 times each

First every test of the cases runs as it is, so that it is known which acts there are; then each file
of tests in a process of its own, with its acts repeated. A case's repetitions are shared by its acts.
SPIRE_HW_SOAK says how often where --times does not. Results go to build/soak; it is killed and begun
anew with --known and --files (those whose path has one of these words in it) without loss.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
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
    """Run one worker and return where its results are."""
    plan, result = place / f"{name}.plan.json", place / f"{name}.jsonl"
    numbers = [case.number for case in cases if not case.beyond]
    plan.write_text(json.dumps({"cases": numbers, "times": times}))
    result.unlink(missing_ok=True)
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


def soak(
    chosen: Sequence[Case], times: int, place: Path, words: Sequence[str] = (), *, known: bool
) -> int:
    """Soak some cases; return the exit status."""
    place.mkdir(parents=True, exist_ok=True)
    files = sorted({file for case in chosen for file in case.files() if not case.beyond})
    files = [file for file in files if not words or any(word in file for word in words)]
    once = place / "once.jsonl" if known else run(place, files, chosen, {}, "once")
    seen, faults = report.read(once)
    planned = report.plan(seen, chosen, times)
    acts: list[report.Act] = []
    for file in files:
        part = {test: each for test, each in planned.items() if test.startswith(file)}
        if not part:
            continue
        name = file.removeprefix("tests/").removesuffix(".py").replace("/", "-")
        done, failures = report.read(run(place, [file], chosen, part, name))
        acts += done
        faults += failures
        repeated = {case.number for act in done if act.growth is not None for case in act.cases}
        lines, found = report.table(done, [c for c in chosen if c.number in repeated], 0)
        sys.stdout.write(f"\n{file}\n" + "\n".join(lines) + "\n")
        sys.stdout.flush()
    lines, found = report.table(acts, chosen, times)
    faults += found
    text = "\n".join([*lines, "", *(f"FAULT {fault}" for fault in faults)]) + "\n"
    (place / "table.txt").write_text(text)
    sys.stdout.write(f"\n{text}{len(chosen)} cases, {len(faults)} faults\n")
    return 1 if faults else 0


def main(arguments: list[str]) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("cases", nargs="*", type=int, metavar="CASE")
    default = int(os.environ.get("SPIRE_HW_SOAK", TIMES))
    parser.add_argument("--times", type=int, default=default, help="for each case")
    parser.add_argument("--files", nargs="*", default=[], help="only tests in such files")
    parser.add_argument("--place", type=Path, default=PLACE, help="for results")
    parser.add_argument("--known", action="store_true", help="acts are those of the last run")
    asked = parser.parse_args(arguments)
    chosen = [case for case in CASES if not asked.cases or case.number in asked.cases]
    return soak(chosen, asked.times, asked.place, asked.files, known=asked.known)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
