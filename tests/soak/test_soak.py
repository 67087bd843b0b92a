"""The soak finds leaks, its table is whole, and a case of each group is flat over 2000 repetitions.

`make soak` does all cases, 10 000 times each.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import SpireHwError
from tests.hostile.cases.case import IA, Case
from tests.hostile.cases.table import CASES
from tests.soak import report
from tests.soak.__main__ import ROOT, main
from tests.soak.meter import ENVIRONMENT, Growth, Held
from tests.soak.report import Act

if TYPE_CHECKING:
    from pathlib import Path

# Of most groups one: envelope, endorsement key, attestation key, quote, boot log, measurement list,
# DevID, a heartbeat, a lying server.
SAMPLE = (14, 34, 68, 113, 161, 178, 190, 213, 216)


def test_every_number_is_a_case_with_a_test_or_says_why_not() -> None:
    assert [case.number for case in CASES] == [*range(1, 226)]
    for case in CASES:
        assert case.tests or case.beyond, case
        assert case.kinds
        re.compile(case.says)


@pytest.mark.slow
def test_every_test_of_the_table_is_there() -> None:
    files = sorted({file for case in CASES for file in case.files()})
    collected = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = [line for line in collected.stdout.splitlines() if "::" in line]
    for case in CASES:
        for pattern in case.tests:
            function, _, rows = pattern.partition("[")
            for row in rows.removesuffix("]").split("|") if rows else [""]:
                one = f"{function}[{row}]" if row else function
                alone = Case(case.number, case.what, case.kinds, case.says, (one,))
                assert any(alone.has(node_id) for node_id in found), (case.number, one)


def test_leaks_are_found_however_small(tmp_path: Path) -> None:
    ran = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "tests.soak.leaking", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, list[str]] = json.loads(ran.stdout)
    clean = {"nothing", "cycle", "async nothing", "cancelled timer"}
    assert {name for name, faults in found.items() if not faults} == clean
    for name in ("number", "error", "table", "native", "future"):
        assert all("bytes" in fault for fault in found[name])
    for name in ("file", "task", "thread"):
        assert any(f"{name}s stay behind each time" in fault for fault in found[name])


def test_nothing_is_counted_in_a_process_that_was_not_prepared() -> None:
    with pytest.raises(SpireHwError, match="ENVIRONMENT"):
        Held.now()


CASE = Case(14, "brackets", IA, "nested too deep", ("tpm/envelope:first_message_is_refused",))
TEST = "tests/hostile/tpm/test_envelope.py::test_first_message_is_refused"


def act(number: int, message: str = "envelope: nested too deep", row: str = "a") -> Act:
    return Act(f"{TEST}[{row}]", number, "INVALID_ARGUMENT", message, None, 0)


def test_a_case_is_shared_by_its_acts_and_by_no_others() -> None:
    acts = [act(0), act(1, "something else"), act(2), act(0, row="b")]
    assert report.plan(acts[:3], [CASE], 12_000) == {f"{TEST}[a]": [6000, 0, 6000]}
    assert report.plan(acts, [CASE], 12_000) == {
        f"{TEST}[a]": [6000, 0, 0],
        f"{TEST}[b]": [6000],
    }
    many = [act(n) for n in range(1000)]
    planned = report.plan(many, [CASE], 10_000)[f"{TEST}[a]"]
    assert 1 < sum(times > 0 for times in planned) <= 2
    assert sum(planned) >= 10_000
    assert sum(report.plan(many, [CASE], 200)[f"{TEST}[a]"]) == 200


def test_a_test_is_left_until_all_its_acts_were_repeated_and_found_well() -> None:
    planned = {f"{TEST}[a]": [0, 50]}
    growth = Growth(times=50, heap=0, files=0, threads=0, tasks=0, bytes=0, floor=0, resident=0)
    done = replace(act(1), growth=growth)
    assert report.size(planned) == 50
    assert report.left([act(0), done], [], planned) == {}
    assert report.left([act(0), done], [f"{TEST}[b]: broke"], planned) == {}
    assert report.left([act(0), done], [f"{TEST}[a]: broke"], planned) == planned
    assert report.left([act(0), act(1)], [], planned) == planned
    for short in (replace(growth, times=49), replace(growth, files=1)):
        assert report.left([replace(act(1), growth=short)], [], planned) == planned


def test_what_was_written_last_counts(tmp_path: Path) -> None:
    result = tmp_path / "x.jsonl"
    line = {"test": TEST, "act": 0, "kind": "K", "message": "m", "growth": None, "seconds": 1}
    lines = [line, {"test": TEST, "outcome": "failed", "text": "broke"}, line | {"seconds": 2}]
    result.write_text("".join(json.dumps(one) + "\n" for one in lines))
    acts, failures = report.read(result)
    assert ([a.seconds for a in acts], failures) == ([2], [f"{TEST}: broke"])
    with result.open("a") as more:
        more.write(json.dumps({"test": TEST, "outcome": "passed", "text": ""}) + "\n")
    assert report.read(result)[1] == []


def test_a_case_that_was_not_repeated_is_a_fault() -> None:
    _, faults = report.table([act(0)], [CASE], 10)
    assert faults == ["case 14: no act of it was repeated"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_case_of_each_group_leaves_memory_flat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["--times", "2000", "--place", str(tmp_path), *map(str, SAMPLE)])
    shown = capsys.readouterr().out
    assert status == 0, shown
    assert f"{len(SAMPLE)} cases, 0 faults" in shown
