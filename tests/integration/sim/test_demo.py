"""The demo shows what it promises, ends by itself and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.tpm, pytest.mark.hsm, pytest.mark.slow, pytest.mark.timeout(300)]


def _run(temporary: Path, *, break_openssl: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(temporary), "NO_COLOR": "1"}
    if break_openssl:
        tools = temporary / "bin"
        tools.mkdir()
        (tools / "openssl").write_text("#!/bin/sh\necho broken; exit 1\n")
        (tools / "openssl").chmod(0o755)
        environment["PATH"] = f"{tools}:{environment['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", "spire_hw_sim", "demo"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=environment,
    )


def _processes_of(temporary: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(temporary):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Socket paths below it have to stay under 108 bytes.
    return tmp_path_factory.mktemp("d")


def test_demo_ends_well_and_leaves_nothing(temporary: Path) -> None:
    done = _run(temporary)
    assert done.returncode == 0, done.stdout + done.stderr
    for shown in (
        "sensitive, always sensitive, never extractable, local",
        "tpm:key:tpm",
        "svid.0.pem: OK",
        "SVID is valid.",
        "[ek_unlisted]",
        "[key_not_in_tpm]",
        "[pcr_mismatch]",
    ):
        assert shown in done.stdout
    assert _processes_of(temporary) == []
    assert list(temporary.iterdir()) == []


def test_a_step_that_fails_ends_the_demo_with_the_reason(temporary: Path) -> None:
    done = _run(temporary, break_openssl=True)
    assert done.returncode == 1
    assert "openssl does not accept the chain: broken" in done.stderr
    assert _processes_of(temporary) == []
