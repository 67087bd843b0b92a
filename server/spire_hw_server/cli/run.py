"""Start the server; check its configuration."""

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
from spire_hw_server.config import DEFAULT_CONFIG, load_settings

if TYPE_CHECKING:
    from spire_hw.errors import ConfigFault
    from spire_hw_server.config import ServerSettings

_FLAGS: Final = settings_flags(
    (
        *COMMON_SETTINGS,
        Setting("bindAddress", "bind_address", "IP address the API listens on."),
        Setting("serverPort", "bind_port", "Port the API listens on."),
        Setting("dataDir", "data_dir", "Directory for the server's data."),
        Setting("socketPath", "socket_path", "Path of the admin socket.", from_environment=False),
    ),
    DEFAULT_CONFIG,
)


@click.command(
    "run",
    cls=GoCommand,
    examples="""
    spire-hw-server run -config server/server.conf
    spire-hw-server run -config server.conf -expandEnv -logLevel debug
    """,
)
@_FLAGS
def run(config: str, *, expand_env: bool, **given: Any) -> None:
    """Run the server until SIGINT or SIGTERM."""
    settings = load_settings(Path(config), expand_env=expand_env, overrides=overrides(given))
    from spire_hw_server import app  # noqa: PLC0415 - commands that only ask need none of it

    run_until_stopped("server", settings.log, lambda: app.run(settings))


def find_faults(settings: ServerSettings) -> list[ConfigFault]:
    """Return what is wrong with settings although they could be loaded."""
    from spire_hw_server import offline  # noqa: PLC0415 - loads what the server is made of

    return run_check(offline.check_settings(settings))


validate = validate_command("server", _FLAGS, load_settings, find_faults)
