"""One fuzzing process, or one look at what such processes found.

    python -m tests.fuzz.worker fuzz NAME FOLDER OPTIONS...  coverage-guided, with atheris
    python -m tests.fuzz.worker check NAME FOLDER            each input in FOLDER again, measured,
                                                             and the worst there can be

libFuzzer ends the process it runs in, and what it watches is slow: bounds of time and memory are
checked afterwards, without it.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_S = 0.1
MOST_BYTES = 64 * 1024 * 1024
_TRIES = 3


def _fuzz(name: str, options: list[str]) -> None:
    import atheris  # noqa: PLC0415 - only here, and only where it is installed

    with atheris.instrument_imports(include=["spire_hw", "spire_hw_plugins"]):
        from tests.fuzz import targets  # noqa: PLC0415

    atheris.Setup([sys.argv[0], *options], lambda raw: targets.run(name, raw))
    atheris.Fuzz()


def _check(name: str, folder: Path) -> int:
    from tests.fuzz import targets, worst  # noqa: PLC0415

    slowest, largest, status = 0.0, 0, 0
    inputs = [(str(path), path.read_bytes()) for path in sorted(folder.iterdir())]
    inputs += [(f"worst {n}", make()) for n, make in enumerate(worst.WORST.get(name, []))]
    for path, raw in inputs:
        taken = min(_seconds(targets.run, name, raw) for _ in range(_TRIES))
        tracemalloc.start()
        targets.run(name, raw)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        slowest, largest = max(slowest, taken), max(largest, peak)
        if taken > MOST_S or peak > MOST_BYTES:
            sys.stdout.write(f"{path}: {taken * 1000:.0f} ms, {peak / 2**20:.0f} MiB\n")
            status = 1
    figures = f"{len(inputs)} inputs, {slowest * 1000:.1f} ms, {largest / 2**20:.1f} MiB at most"
    sys.stdout.write(figures + "\n")
    return status


def _seconds(run: Callable[[str, bytes], None], name: str, raw: bytes) -> float:
    start = time.process_time()
    run(name, raw)
    return time.process_time() - start


def _main() -> None:
    mode, name, folder, *options = sys.argv[1:]
    if mode == "check":
        raise SystemExit(_check(name, Path(folder)))
    _fuzz(name, [*options, folder])


if __name__ == "__main__":
    _main()
