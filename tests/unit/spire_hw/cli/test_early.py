from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spire_hw.cli.early import end_quietly


def catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("program", ["spire_hw_server", "spire_hw_agent"])
def test_a_signal_while_the_program_loads_ends_it_as_it_ends_a_running_one(
    program: str, number: signal.Signals, tmp_path: Path
) -> None:
    conf = tmp_path / "conf"
    os.mkfifo(conf)  # it waits there for its configuration
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", program, "run", "-config", str(conf)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with process:
        while not catches(process.pid, signal.SIGTERM):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b""


def test_other_commands_end_as_the_shell_expects() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for args in ([], ["entry", "show"], ["-help", "run"]):
        end_quietly(args)
    assert signal.getsignal(signal.SIGTERM) is before
