"""All commands of `spire-hw-agent`."""

from __future__ import annotations

from spire_hw import __version__
from spire_hw.cli.program import root_group
from spire_hw_agent.cli import api, doctor, healthcheck, run, tpm, tpmdevid, tpmpolicy

PROGRAM = "spire-hw-agent"

root = root_group(
    "SPIFFE agent: attests this node by its TPM and serves SVIDs to its workloads.", __version__
)
root.add_command(run.run)
root.add_command(run.validate)
root.add_command(healthcheck.healthcheck)
root.add_command(doctor.doctor)
root.add_command(api.group)
tpm.group.add_command(tpmdevid.group)
tpm.group.add_command(tpmpolicy.group)
root.add_command(tpm.group)
