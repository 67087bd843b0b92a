"""Runs the benchmarks and holds their figures against the targets.

    python -m tests.bench            all of them
    python -m tests.bench NAME...    those that print these figures

Each script runs as a process of its own and prints lines `name value`. The table goes to standard
output, the figures to build/bench.json, and with each how fast the machine was around it: microseconds
that OpenSSL took to verify and make a P-256 signature. The exit status is 1 when a script failed; a
target that is missed is shown, not punished: machines differ.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import psutil
from rich.console import Console
from rich.table import Table

from spire_hw_sim.meter import OpenSsl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
REPORT: Final = ROOT / "build" / "bench.json"
SCRIPT_S: Final = 300.0  # the longest takes a third of that on a machine that does nothing else
_FIGURE: Final = re.compile(r"([a-z][a-z0-9_]*)[ \t]+([0-9.eE+-]+)(?:[ \t].*)?")
_TAIL: Final = 30


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure: where it comes from and what it should be.

    Attributes:
        script: file beside this one.
        sign: `>=` or `<`.
        arguments: given to the script.
    """

    name: str
    script: str
    unit: str
    sign: str
    target: float
    arguments: tuple[str, ...] = ()

    def met(self, value: float) -> bool:
        """Tell whether a value is good enough."""
        return _COMPARISONS[self.sign](value, self.target)


_COMPARISONS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<": operator.lt,
}

GOALS: Final = (
    Goal("x509_issue_core_vs_openssl", "bench_issue_core.py", "ratio", ">=", 0.55),
    Goal("x509_api_vs_openssl", "bench_server_api.py", "ratio", ">=", 0.25),
    Goal("softhsm_sign_vs_raw", "bench_pkcs11.py", "ratio", ">=", 0.85),
    Goal("softhsm_two_workers_vs_one", "bench_pkcs11_workers.py", "ratio", ">=", 1.5),
    Goal("slow_token_other_rpc_p99_ratio", "bench_slow_token.py", "ratio", "<", 1.5),
    Goal("attestations_per_server_cpu_s", "bench_attest.py", "1/s", ">=", 200),
    Goal("ima_10k_ms", "bench_ima.py", "ms", "<", 60),
    Goal("attestation_cpu_ms", "bench_attest_evidence.py", "ms", "<", 4),
    Goal("heartbeat_cpu_ms", "bench_attest_evidence.py", "ms", "<", 1),
    Goal("fleet_2000_core_share", "bench_fleet.py", "cores", "<", 0.33),
    Goal("fleet_2000_p99_ms", "bench_fleet.py", "ms", "<", 100),
    Goal("drift_to_cutoff_s", "bench_drift.py", "s", "<", 2),
    Goal("jwt_api_per_cpu_s", "bench_server_api.py", "1/s", ">=", 800),
    Goal("workload_first_answer_p99_ms", "bench_agent.py", "ms", "<", 20),
    Goal("agent_start_to_svid_s", "bench_agent.py", "s", "<", 3),
    Goal("agent_rss_mib", "bench_agent.py", "MiB", "<", 80),
    Goal("server_rss_mib", "bench_agent.py", "MiB", "<", 120),
    Goal("stream_kib", "bench_streams.py", "KiB", "<", 90),
    Goal("remote_sign_added_p50_ms", "bench_remote.py", "ms", "<", 1),
    Goal("remote_sign_per_s", "bench_remote.py", "1/s", ">=", 1500),
    Goal("external_plugin_sign_added_ms", "bench_plugin.py", "ms", "<", 0.6),
)


@dataclass(slots=True)
class Outcome:
    """What one script did.

    Attributes:
        figures: last value printed for each name.
        problem: why it counts as failed, "" when it does not.
        output: everything it printed.
        took_s: how long it ran.
        openssl_us: CPU microseconds of OpenSSL's verifying and making a signature, around it.
    """

    figures: dict[str, float] = field(default_factory=dict)
    problem: str = ""
    output: str = ""
    took_s: float = 0.0
    openssl_us: float = 0.0


class Display(Protocol):
    """Shows how far the run is."""

    def script(self, number: int, total: int, name: str) -> contextlib.AbstractContextManager[None]:
        """Show that a script runs while the context is open."""
        ...

    def line(self, text: str) -> None:
        """Show what happened."""
        ...


class TerminalDisplay:
    """A spinner on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextlib.contextmanager
    def script(self, number: int, total: int, name: str) -> Iterator[None]:
        with self._console.status(f"[{number}/{total}] {name}"):
            yield

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


class PlainDisplay:
    """Lines, for logs."""

    @contextlib.contextmanager
    def script(self, number: int, total: int, name: str) -> Iterator[None]:
        self.line(f"[{number}/{total}] {name}")
        yield

    def line(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def chosen(names: Sequence[str]) -> list[Goal]:
    """Return the goals with these names, all of them without names.

    Raises:
        SystemExit: there is no such figure.
    """
    known = {goal.name for goal in GOALS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no such figure: {', '.join(unknown)}\nknown: {', '.join(sorted(known))}")
    return [goal for goal in GOALS if not names or goal.name in names]


def run_script(command: Sequence[str], wanted: Sequence[str]) -> Outcome:
    """Run one script to its end and collect the figures wanted of it."""
    start = time.monotonic()
    process = subprocess.Popen(  # noqa: S603 - ours
        command,
        cwd=ROOT,
        env={**os.environ, "GRPC_VERBOSITY": "ERROR", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    problem = ""
    try:
        output, _ = process.communicate(timeout=SCRIPT_S)
    except subprocess.TimeoutExpired:
        problem = f"did not end within {SCRIPT_S:g} s"
        _end(process)
        output, _ = process.communicate()
    except BaseException:
        _end(process)
        raise
    figures = collect(output)
    if not problem and process.returncode:
        problem = f"exit status {process.returncode}"
    missing = [name for name in wanted if name not in figures]
    if not problem and missing:
        problem = f"did not print {', '.join(missing)}"
    return Outcome(figures, problem, output, time.monotonic() - start)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a script with the processes it started, whatever session they are in."""
    with contextlib.suppress(psutil.NoSuchProcess):
        script = psutil.Process(process.pid)
        for one in (*script.children(recursive=True), script):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def collect(output: str) -> dict[str, float]:
    """Return the figures in a script's output: lines `name value`, the last one of a name counts."""
    figures = {}
    for line in output.splitlines():
        found = _FIGURE.fullmatch(line)
        if found is None:
            continue
        with contextlib.suppress(ValueError):
            value = float(found[2])
            if math.isfinite(value):
                figures[found[1]] = value
    return figures


def run_all(goals: Sequence[Goal], display: Display) -> dict[str, Outcome]:
    """Run the scripts the goals need, each once; return what each did."""
    wanted: dict[tuple[str, ...], list[str]] = {}
    for goal in goals:
        wanted.setdefault((goal.script, *goal.arguments), []).append(goal.name)
    outcomes = {}
    openssl = OpenSsl()
    before_s = openssl.pair_s()
    for number, ((script, *arguments), names) in enumerate(wanted.items(), 1):
        with display.script(number, len(wanted), script):
            outcome = run_script([sys.executable, str(HERE / script), *arguments], names)
        after_s = openssl.pair_s()
        outcome.openssl_us = (before_s + after_s) / 2 * 1e6
        before_s = after_s
        outcomes[script] = outcome
        if outcome.problem:
            display.line(f"{script}: {outcome.problem}")
            for line in outcome.output.splitlines()[-_TAIL:]:
                display.line(f"    {line}")
        else:
            shown = ", ".join(f"{name} {outcome.figures[name]:.4g}" for name in names)
            speed = f"OpenSSL {outcome.openssl_us:.0f} us"
            display.line(f"{script}: {shown} ({outcome.took_s:.0f} s, {speed})")
    return outcomes


def report(goals: Sequence[Goal], outcomes: dict[str, Outcome]) -> list[dict[str, object]]:
    """Return the list that goes to build/bench.json."""
    rows: list[dict[str, object]] = []
    for goal in goals:
        value = outcomes[goal.script].figures.get(goal.name)
        rows.append(
            {
                "name": goal.name,
                "value": value,
                "unit": goal.unit,
                "target": goal.target,
                "met": value is not None and goal.met(value),
                "openssl_us": round(outcomes[goal.script].openssl_us, 1),
            }
        )
    return rows


def table(goals: Sequence[Goal], rows: Sequence[dict[str, object]]) -> Table:
    """Return the table of figures."""
    made = Table("figure", "value", "unit", "target", "met", box=None, pad_edge=False)
    for goal, row in zip(goals, rows, strict=True):
        value = row["value"]
        text = "-" if not isinstance(value, float) else f"{value:.4g}"
        met = "yes" if row["met"] else "NO"
        made.add_row(goal.name, text, goal.unit, f"{goal.sign} {goal.target:g}", met)
    return made


def main(names: Sequence[str]) -> int:
    """Run, show, write the report; return the exit status."""
    goals = chosen(names)
    console = Console()
    display: Display = TerminalDisplay(console) if console.is_terminal else PlainDisplay()
    outcomes = run_all(goals, display)
    rows = report(goals, outcomes)
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(rows, indent=2) + "\n")
    console.print(table(goals, rows))
    return 1 if any(outcome.problem for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
