"""Start the signer; check its configuration and policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw.cli.flags import GoCommand
from spire_hw.cli.program import (
    COMMON_SETTINGS,
    Setting,
    overrides,
    run_check,
    run_until_stopped,
    settings_flags,
    validate_command,
)
from spire_hw.errors import ConfigFault, SpireHwError
from spire_hw_signer.config import DEFAULT_CONFIG, load_settings
from spire_hw_signer.operators import load_operators

if TYPE_CHECKING:
    from spire_hw_signer.config import SignerSettings

_FLAGS: Final = settings_flags(
    (
        *(setting for setting in COMMON_SETTINGS if setting.key.startswith("log_")),
        Setting("adminSocketPath", "admin_socket_path", "Path of the admin socket."),
        Setting("bindAddress", "bind_address", "IP address clients connect to."),
        Setting("bindPort", "bind_port", "Port clients connect to."),
        Setting("dataDir", "data_dir", "Directory for the signer's data."),
        Setting("policyFile", "policy_file", "The policy: who may do what with which key."),
    ),
    DEFAULT_CONFIG,
)


@click.command(
    "run",
    cls=GoCommand,
    examples="""
    spire-hw-signer run -config /etc/spire-hw/signer.conf
    spire-hw-signer run -config signer.conf -logLevel debug
    """,
)
@_FLAGS
def run(config: str, *, expand_env: bool, **given: Any) -> None:
    """Run the signer until SIGINT or SIGTERM; SIGHUP reads policy and TLS files again."""
    from spire_hw_signer import app  # noqa: PLC0415 - commands that only ask need none of it

    settings = load_settings(Path(config), expand_env=expand_env, overrides=overrides(given))

    run_until_stopped("signer", settings.log, lambda: app.run(settings))


def find_faults(settings: SignerSettings) -> list[ConfigFault]:
    """Return what is wrong with settings although they could be loaded."""
    from spire_hw_signer import app  # noqa: PLC0415 - loads what the signer is made of

    faults = run_check(app.check_settings(settings))
    try:
        load_operators(settings.operators)
    except SpireHwError as e:
        faults.append(ConfigFault(0, f"operators: {e.message}"))
    return faults


validate = validate_command("signer", _FLAGS, load_settings, find_faults)
