"""Start the agent; check its configuration."""

from __future__ import annotations

import os
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
from spire_hw_agent.config import DEFAULT_CONFIG, load_settings

if TYPE_CHECKING:
    from spire_hw.errors import ConfigFault
    from spire_hw_agent.config import AgentSettings

_UMASK: Final = 0o027
_FLAGS: Final = settings_flags(
    (
        *COMMON_SETTINGS,
        Setting(
            "allowUnauthenticatedVerifiers",
            "allow_unauthenticated_verifiers",
            "Serve the trust domain's bundle to processes without an identity.",
            bool,
        ),
        Setting("dataDir", "data_dir", "Directory for the agent's state."),
        Setting("disableSDSAPI", "disable_sds_api", "Serve no Envoy SDS; there is none yet.", bool),
        Setting("disableWorkloadAPI", "disable_workload_api", "Serve no Workload API.", bool),
        Setting(
            "insecureBootstrap",
            "insecure_bootstrap",
            "Trust the server of the first connection without proof.",
            bool,
        ),
        Setting(
            "joinToken",
            "join_token",
            "Join token; visible in process lists, prefer -joinTokenFile.",
        ),
        Setting("joinTokenFile", "join_token_file", "File that holds a join token."),
        Setting(
            "rebootstrapDelay",
            "rebootstrap_delay",
            "How long a mismatch has to last before the agent bootstraps again.",
        ),
        Setting("rebootstrapMode", "rebootstrap_mode", "never, auto or always."),
        Setting("serverAddress", "server_address", "Address of the server."),
        Setting("serverPort", "server_port", "Port of the server.", int),
        Setting(
            "socketPath", "socket_path", "Path of the Workload API socket.", from_environment=False
        ),
        Setting("trustBundle", "trust_bundle_path", "File with the bundle to trust the server by."),
        Setting("trustBundleFormat", "trust_bundle_format", "pem or spiffe."),
        Setting("trustBundleUrl", "trust_bundle_url", "Where to fetch that bundle."),
    ),
    DEFAULT_CONFIG,
)


@click.command(
    "run",
    cls=GoCommand,
    examples="""
    spire-hw-agent run -config /etc/spire-hw/agent.conf
    spire-hw-agent run -config agent.conf -joinTokenFile token
    """,
)
@_FLAGS
def run(config: str, *, expand_env: bool, **given: Any) -> None:
    """Run the agent in the foreground; SIGTERM stops it."""
    settings = load_settings(Path(config), expand_env=expand_env, overrides=overrides(given))
    from spire_hw_agent import app  # noqa: PLC0415 - commands that only ask need none of it

    os.umask(os.umask(0o077) | _UMASK)
    run_until_stopped("agent", settings.log, lambda: app.run(settings))


def find_faults(settings: AgentSettings) -> list[ConfigFault]:
    """Return what is wrong with settings although they could be loaded."""
    from spire_hw_agent import app  # noqa: PLC0415 - loads what the agent is made of

    return run_check(app.check(settings))


validate = validate_command("agent", _FLAGS, load_settings, find_faults)
