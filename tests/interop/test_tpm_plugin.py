"""spire-tpm-plugin, a NodeAttestor that others wrote for SPIRE, as an external plugin of our hosts.

What it does with a TPM needs one that it can open itself; this shows that it comes up, takes its
configuration and ends, and that what it cannot do here comes back as an error with its cause.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spire_hw_sim.parties import find_program

VARIABLES = {"agent": "SPIRE_TPM_PLUGIN_AGENT_BIN", "server": "SPIRE_TPM_PLUGIN_SERVER_BIN"}
WANTED = (
    "starts, says where it listens and what it serves",
    "takes its configuration",
    "is told of its end",
    "ends when it is asked to",
)
PAYLOAD = "sends a payload before it hears anything"
HAS_TPM = Path("/dev/tpmrm0").exists() or Path("/dev/tpm0").exists()


@pytest.mark.parametrize("side", VARIABLES)
def test_spire_tpm_plugin_in_our_host(side: str, tmp_path: Path) -> None:
    program = find_program(VARIABLES[side], "")
    if program is None:
        pytest.skip(f"{VARIABLES[side]} is not set")
    data = tmp_path / "data.hcl"
    data.write_text(f'hash_path = "{tmp_path}"\n' if side == "server" else "")
    done = subprocess.run(  # noqa: S603 - the program that was named
        [
            Path(sys.executable).with_name("spire-hw-plugin"),
            *("check", "-kind", "NodeAttestor", "-side", side, "-output", "json"),
            *("-data", data, program),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    steps = {step["name"]: step for step in json.loads(done.stdout)["steps"]}
    assert {steps[name]["outcome"] for name in WANTED} == {"passed"}
    if side == "agent" and not HAS_TPM:
        assert "TPM device not available" in steps[PAYLOAD]["detail"]
