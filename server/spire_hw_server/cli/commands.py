"""All commands of `spire-hw-server`."""

from __future__ import annotations

from spire_hw import __version__
from spire_hw.cli.pkcs11 import pkcs11_group
from spire_hw.cli.program import root_group
from spire_hw_server.cli import (
    agent,
    bundle,
    ca,
    doctor,
    entry,
    healthcheck,
    hsm,
    init,
    jwt,
    key,
    localauthority,
    logger,
    policy,
    run,
    token,
    tpm,
    tpmdevid,
    x509,
)

PROGRAM = "spire-hw-server"

root = root_group(
    "SPIFFE server: attests nodes by their TPM and signs SVIDs with keys in an HSM.", __version__
)
root.add_command(run.run)
root.add_command(run.validate)
root.add_command(healthcheck.healthcheck)
root.add_command(init.init)
root.add_command(doctor.doctor)
tpm.group.add_command(tpmdevid.group)
for _group in (
    token.group,
    entry.group,
    agent.group,
    bundle.group,
    x509.group,
    jwt.group,
    tpm.group,
    policy.group,
    key.group,
    localauthority.group,
    ca.group,
    logger.group,
    hsm.group,
    pkcs11_group(PROGRAM),
):
    root.add_command(_group)
