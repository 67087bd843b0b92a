"""Fuzzes the parsers of what attesting nodes send, each for a while.

    python -m tests.fuzz                      all targets, a minute each
    python -m tests.fuzz --seconds 600 NAME   these targets, ten minutes each

What reached new code stays in build/fuzz/corpus and is where the next run begins; an input that got
anything but one of our own errors out of a parser, or took more than 100 ms or 64 MiB, is named and
makes the exit status 1. Needs atheris (`pip install -e .[fuzz]`).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.fuzz.targets import TARGETS

ROOT: Final = Path(__file__).resolve().parents[2]
PLACE: Final = ROOT / "build" / "fuzz"
_ONE_INPUT_S = 10
_MEMORY_MIB = 2048
_TAIL = 30


def _fuzz(name: str, seconds: int) -> bool:
    """Fuzz one target; tell whether nothing was found."""
    corpus, found = PLACE / "corpus" / name, PLACE / "found"
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in TARGETS[name].seeds:
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)  # noqa: S324 - libFuzzer's names
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={TARGETS[name].longest}",
        f"-timeout={_ONE_INPUT_S}",
        f"-rss_limit_mb={_MEMORY_MIB}",
        f"-artifact_prefix={found}/{name}-",
    ]
    fuzzed = _worker("fuzz", name, corpus, *options)
    if fuzzed.returncode:
        lines = fuzzed.stdout.splitlines()[-_TAIL:]
        sys.stdout.write("\n".join([f"{name}: FAILED", *lines]) + "\n")
        return False
    checked = _worker("check", name, corpus)
    sys.stdout.write(f"{name}: {checked.stdout}")
    sys.stdout.flush()
    return checked.returncode == 0


def _worker(mode: str, name: str, corpus: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        [sys.executable, "-m", "tests.fuzz.worker", mode, name, str(corpus), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def main(arguments: list[str]) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.names) - TARGETS.keys():
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if importlib.util.find_spec("atheris") is None:
        sys.stderr.write("fuzz: atheris is not installed; pip install -e .[fuzz]\n")
        return 1
    results = [_fuzz(name, asked.seconds) for name in asked.names or TARGETS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
