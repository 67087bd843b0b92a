"""`spire-hw-sim tpm`: a TPM by hand, and what a machine that booted on it left."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from spire_hw.tpm import boot, eventlog, ima
from spire_hw.tpm.attest import read_pcrs
from spire_hw.tpm.device import TpmDevice
from spire_hw.tpm.wire import PcrSelection
from spire_hw_sim import swtpm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.tpm,
    pytest.mark.skipif(not swtpm.is_available(), reason="swtpm or swtpm_setup is not installed"),
]
BANK = "sha256"


async def _held(tcti: str) -> dict[tuple[str, int], bytes]:
    device = TpmDevice(tcti)
    try:
        selection = PcrSelection(BANK, tuple(range(24)))
        values = await device.run("read", lambda c: read_pcrs(c, selection))
    finally:
        await device.close()
    return {(BANK, n): value for n, value in values.items()}


def test_a_booted_machine_has_logs_that_fit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spire_hw_sim", "tpm", str(tmp_path / "tpm"), "--boot", "uki"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:  # noqa: S603
        assert program.stdout is not None
        told = dict(program.stdout.readline().split(maxsplit=1) for _ in range(4))
        try:
            pcrs = asyncio.run(_held(told["tcti"].strip()))
        finally:
            program.send_signal(signal.SIGINT)
        assert program.wait(timeout=60) == 0
    log = eventlog.parse((tmp_path / "tpm" / "boot-log").read_bytes())
    assert boot.facts(log, pcrs, BANK).uki is not None
    listed = (tmp_path / "tpm" / "ima-log").read_bytes()
    assert len(ima.replay([listed], None, pcrs, BANK).entries) == 20
    assert told["boot_log_path"].strip() == str(tmp_path / "tpm" / "boot-log")


def test_one_way_to_measure_at_a_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spire_hw_sim", "tpm", str(tmp_path / "tpm"), "--measure"]
    done = subprocess.run(  # noqa: S603
        [*command, "--boot", "clean"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "leave --measure out" in done.stderr
