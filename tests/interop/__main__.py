"""Runs the interoperability tests and shows what works with what.

    python -m tests.interop            all of them
    python -m tests.interop ARGUMENTS  with arguments of pytest, such as `-k x509pop`

A matrix goes to standard output, the cases to build/interop.json. The exit status is that of pytest:
0 when nothing failed; what was skipped, for want of somebody else's programs, is shown with the reason.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Final, TypedDict

import pytest
from rich.console import Console
from rich.table import Table

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
REPORT: Final = ROOT / "build" / "interop.json"
_WIDTH: Final = 160
_MOST_COLUMNS = 6  # more do not fit: then a line for each case
_REASON: Final = 300
_SIGNS: Final = {
    "passed": "[green]passed[/]",
    "failed": "[bold red]failed[/]",
    "skipped": "[dim]skipped[/]",
}


class Case(TypedDict):
    """One line of the report."""

    case: str
    result: str
    reason: str


class Collector:
    """A pytest plugin that keeps the last word on every test."""

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take note of one phase of one test."""
        name = name_of(report.nodeid)
        if report.outcome == "failed":
            self.cases[name] = Case(case=name, result="failed", reason=_cause(report))
        elif report.outcome == "skipped":
            self.cases[name] = Case(case=name, result="skipped", reason=_cause(report))
        elif report.outcome == "passed" and report.when == "call":
            self.cases[name] = Case(case=name, result="passed", reason="")


def name_of(nodeid: str) -> str:
    """Return `file/test[parameters]` for pytest's id of a test, without the word `test_`."""
    path, _, rest = nodeid.partition("::")
    if "]@" in rest:  # the group of pytest-xdist
        rest = rest[: rest.index("]@") + 1]
    function, bracket, parameters = rest.rpartition("::")[2].partition("[")
    stem = Path(path).stem.removeprefix("test_")
    return f"{stem}/{function.removeprefix('test_')}{bracket}{parameters}"


def _cause(report: pytest.TestReport) -> str:
    found = report.longrepr
    if isinstance(found, tuple):
        return str(found[2]).removeprefix("Skipped: ")
    crash = getattr(found, "reprcrash", None)
    return str(getattr(crash, "message", found)).splitlines()[0][:_REASON]


def show(cases: list[Case], console: Console) -> None:
    """Print one table for each file: tests down, their parameters across."""
    files: dict[str, dict[str, dict[str, Case]]] = {}
    for one in cases:
        test, _, parameters = one["case"].partition("[")
        file, _, step = test.partition("/")
        files.setdefault(file, {}).setdefault(step, {})[parameters.rstrip("]")] = one
    for file, found in files.items():
        steps = found
        columns = list(dict.fromkeys(name for row in steps.values() for name in row))
        if len(columns) > _MOST_COLUMNS:
            steps = {
                f"{step} {name}": {"": one}
                for step, row in found.items()
                for name, one in row.items()
            }
            columns = [""]
        table = Table(title=file, title_justify="left")
        table.add_column("")
        for name in columns:
            table.add_column(name or "result", overflow="fold")
        for step, row in steps.items():
            results = (row[name]["result"] if name in row else "" for name in columns)
            table.add_row(step.replace("_", " "), *(_SIGNS.get(r, "") for r in results))
        console.print(table)
    for word in ("failed", "skipped"):
        reasons = Counter(c["reason"] for c in cases if c["result"] == word)
        for reason, number in reasons.most_common():
            console.print(f"{word} {number}: {reason}", markup=False, soft_wrap=True)
    counts = Counter(c["result"] for c in cases)
    console.print(", ".join(f"{counts[word]} {word}" for word in _SIGNS), markup=False)


def main(arguments: list[str]) -> int:
    """Run, print, write; return the exit status."""
    collector = Collector()
    status = pytest.main([str(HERE), "-q", "-rN", *arguments], plugins=[collector])
    cases = list(collector.cases.values())
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(cases, indent=2) + "\n")
    show(cases, Console(width=None if sys.stdout.isatty() else _WIDTH))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
