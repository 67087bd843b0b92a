"""All commands of `spire-hw-signer`."""

from __future__ import annotations

from spire_hw import __version__
from spire_hw.cli.pkcs11 import pkcs11_group
from spire_hw.cli.program import root_group
from spire_hw_signer.cli import admin, doctor, healthcheck, init, log, order, run

PROGRAM = "spire-hw-signer"

root = root_group(
    "Signs for SPIFFE servers on other hosts, within a policy they cannot change.", __version__
)
root.add_command(run.run)
root.add_command(run.validate)
root.add_command(healthcheck.healthcheck)
root.add_command(init.init)
root.add_command(doctor.doctor)
root.add_command(admin.status)
root.add_command(admin.key)
root.add_command(admin.client)
root.add_command(admin.policy)
root.add_command(admin.clock)
root.add_command(log.group)
log.group.add_command(admin.log_key)
root.add_command(order.group)
root.add_command(pkcs11_group(PROGRAM))
