"""Which heavy libraries a module brings in, found out in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "grpc",
    "sqlalchemy",
    "alembic",
    "tpm2_pytss",
    "pkcs11",
    "click",
    "aiohttp",
    "lark",
    "rich",
)

# Module -> the heavy libraries it may load.
ALLOWED = {
    "spire_hw.spiffeid": set(),
    "spire_hw.selector": set(),
    "spire_hw.rotation": set(),
    "spire_hw.x509.issue": set(),
    "spire_hw.x509.chain": set(),
    "spire_hw.jose.jws": set(),
    "spire_hw.bundle.document": set(),
    "spire_hw.svid.x509svid": set(),
    "spire_hw.svid.jwtsvid": set(),
    "spire_hw.config.hcl": set(),
    "spire_hw.config.schema": set(),
    "spire_hw.log": set(),
    "spire_hw.catalog": set(),
    "spire_hw.tpm.verify": set(),
    "spire_hw.tpm.ekcert": set(),
    "spire_hw.tpm.credential": set(),
    "spire_hw.pkcs11.uri": set(),
    "spire_hw.pkcs11.pool.pool": set(),
    "spire_hw.transport.tcpfront": set(),
    "spire_hw.transport.unixfront": set(),
    "spire_hw.transport.dialer": set(),
    "spire_hw_plugins.builtin": set(),
    "spire_hw_plugins.nodeattestor.tpm.server": set(),
    "spire_hw_plugins.keymanager.pkcs11": set(),
    "spire_hw_plugins.workloadattestor.unix": set(),
    "spire_hw_server.config": set(),
    "spire_hw_server.admission": set(),
    "spire_hw_server.entries": set(),
    "spire_hw_server.bundles": set(),
    "spire_hw_server.ca.slots": set(),
    "spire_hw_server.ca.manager": set(),
    "spire_hw_server.ca.authority": set(),
    "spire_hw_server.api.caller": set(),
    "spire_hw_server.api.policy": set(),
    "spire_hw_server.datastore.interface": set(),
    "spire_hw_server.datastore.records": set(),
    "spire_hw_server.api.svid": set(),
    "spire_hw_server.cli.main": set(),
    "spire_hw_server.cli.commands": {"click"},
    "spire_hw_server.app": {"sqlalchemy", "alembic", "aiohttp"},
    "spire_hw_server.offline": set(),
    "spire_hw_signer.policy": set(),
    "spire_hw_signer.purpose": set(),
    "spire_hw_signer.config": set(),
    "spire_hw_signer.service": set(),
    "spire_hw_signer.cli.main": set(),
    "spire_hw_signer.cli.commands": {"click"},
    "spire_hw_signer.app": set(),
    "spire_hw_agent.config": set(),
    "spire_hw_agent.cache": set(),
    "spire_hw_agent.sync": set(),
    "spire_hw_agent.storage": set(),
    "spire_hw_agent.cli.main": set(),
    "spire_hw_agent.cli.commands": {"click"},
    "spire_hw_agent.app": {"aiohttp"},
}


@pytest.mark.parametrize("module", ALLOWED)
def test_a_module_loads_no_heavy_library_it_has_no_use_for(module: str) -> None:
    code = f"import sys, {module}; print(*[n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert set(done.stdout.split()) <= ALLOWED[module]


@pytest.mark.parametrize("program", ["spire_hw_server", "spire_hw_agent"])
def test_a_program_shows_its_help_without_device_and_database_libraries(program: str) -> None:
    code = (
        f"import sys; sys.argv = [{program!r}, 'tpm', '-help']\n"
        f"from {program}.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        f"print('loaded', *[n for n in {HEAVY!r} if n in sys.modules])"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.splitlines()[-1].split()[1:])
    assert not loaded & {"sqlalchemy", "alembic", "tpm2_pytss", "pkcs11", "aiohttp", "lark"}
