"""The runner of the benchmarks: what it reads, when it fails, what it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_runner", BENCH / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(runner: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> tuple[int, Any]:
    (tmp_path / "one.py").write_text(text)
    goals = (
        runner.Goal("fast_x", "one.py", "1/s", ">=", 10),
        runner.Goal("small_y", "one.py", "MiB", "<", 5),
    )
    monkeypatch.setattr(runner, "GOALS", goals)
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "REPORT", tmp_path / "build" / "bench.json")
    status = runner.main([])
    return status, json.loads((tmp_path / "build" / "bench.json").read_text())


def test_every_goal_has_its_script(runner: Any) -> None:
    assert len({goal.name for goal in runner.GOALS}) == len(runner.GOALS) > 10
    for goal in runner.GOALS:
        assert (BENCH / goal.script).is_file()
        assert goal.name in (BENCH / goal.script).read_text()


def test_figures_are_collected_and_compared(
    runner: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = 'print("some words 3")\nprint("fast_x 9.5")\nprint("fast_x 12.5 (best)\\nsmall_y 5")'
    status, rows = run(runner, monkeypatch, tmp_path, text)
    assert status == 0
    assert all(row.pop("openssl_us") > 0 for row in rows)
    assert rows == [
        {"name": "fast_x", "value": 12.5, "unit": "1/s", "target": 10, "met": True},
        {"name": "small_y", "value": 5.0, "unit": "MiB", "target": 5, "met": False},
    ]
    assert "[1/1] one.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "case",
    [
        ('print("fast_x 11\\nsmall_y 1")\nraise SystemExit("broke")', "exit status 1"),
        ('print("fast_x 11\\nsmall_y nan")', "did not print small_y"),
    ],
)
def test_a_script_that_fails_is_shown_and_fails_the_run(
    runner: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: tuple[str, str],
) -> None:
    text, said = case
    status, rows = run(runner, monkeypatch, tmp_path, text)
    assert status == 1
    assert [row["name"] for row in rows] == ["fast_x", "small_y"]
    shown = capsys.readouterr().out
    assert said in shown
    assert "    fast_x 11" in shown


def test_a_script_that_hangs_is_ended(
    runner: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "SCRIPT_S", 1.0)
    status, rows = run(runner, monkeypatch, tmp_path, "import threading\nthreading.Event().wait()")
    assert status == 1
    assert rows[0]["value"] is None
    assert not rows[0]["met"]


def test_unknown_names_are_refused(runner: Any) -> None:
    with pytest.raises(SystemExit, match="no such figure: nonsense"):
        runner.chosen(["nonsense"])
    assert [g.name for g in runner.chosen(["stream_kib"])] == ["stream_kib"]
