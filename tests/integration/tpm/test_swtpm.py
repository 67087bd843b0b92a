"""The simulator behaves like a TPM, and leaves nothing behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

from spire_hw_sim.swtpm import Swtpm
from spire_hw_sim.tpm_command import ENDORSEMENT
from tests.integration.tpm.leaks import loaded

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.tpm.conftest import Factory

CHILD = """
import sys
from pathlib import Path
from spire_hw_sim.swtpm import Swtpm
tpm = Swtpm(Path(sys.argv[1]))
tpm.start()
print(tpm.pid, flush=True)
sys.stdin.read()
"""


def test_a_reset_empties_memory_and_keeps_storage(tpm: Swtpm) -> None:
    from spire_hw.tpm.attest import _AK_TEMPLATE  # noqa: PLC0415 - loads libtss2

    tcti = tpm.tcti
    for clean in (True, False):
        tpm.commands.create_primary(ENDORSEMENT, _AK_TEMPLATE)
        stored = tpm.commands.handles(0x01000000)
        tpm.reset(clean=clean)
        assert loaded(tpm) == []
        assert tpm.commands.handles(0x01000000) == stored != []
    assert tpm.tcti == tcti


def test_a_copy_is_the_same_tpm_and_another_one_is_not(
    factory: Factory, tpm: Swtpm, other_tpm: Swtpm, tmp_path: Path
) -> None:
    with Swtpm(tmp_path / "copy", clone_of=factory.first) as copy:
        keys = [t.commands.read_public(0x81010001) for t in (tpm, copy, other_tpm)]
    assert keys[0] == keys[1] != keys[2]


def test_stopping_twice_and_starting_twice_is_harmless(tpm: Swtpm) -> None:
    pid = tpm.pid
    tpm.start()
    assert tpm.pid == pid
    tpm.stop()
    tpm.stop()
    assert not tpm.is_running
    tpm.start()
    assert tpm.is_running


def test_the_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    sockets = tempfile.TemporaryDirectory()
    parent = subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-c", CHILD, str(tmp_path / "tpm")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": sockets.name},
    )
    with sockets, parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    try:
        ended, _, _ = select.select([child], [], [], 10)
        assert ended == [child]
    finally:
        os.close(child)
