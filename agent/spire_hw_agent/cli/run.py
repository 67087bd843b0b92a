"""Start the agent, or say what is wrong with its configuration."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw import log
from spire_hw.cli.flags import F, GoCommand, flag
from spire_hw.cli.output import complain
from spire_hw.errors import ConfigError, SpireHwError
from spire_hw.hardening import harden
from spire_hw_agent import app
from spire_hw_agent.config import DEFAULT_CONFIG, AgentSettings, load_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

# Flag, key of `agent { }`, whether it is boolean, help.
_OVERRIDES: Final = (
    (
        "allowUnauthenticatedVerifiers",
        "allow_unauthenticated_verifiers",
        bool,
        "Serve bundles to processes without an identity.",
    ),
    ("dataDir", "data_dir", str, "Directory for the agent's state."),
    (
        "insecureBootstrap",
        "insecure_bootstrap",
        bool,
        "Trust the server of the first connection without proof.",
    ),
    (
        "joinToken",
        "join_token",
        str,
        "Join token; visible in process lists, prefer -joinTokenFile.",
    ),
    ("joinTokenFile", "join_token_file", str, "File that holds a join token."),
    ("logFile", "log_file", str, "File to log to."),
    ("logFormat", "log_format", str, "text or json."),
    ("logLevel", "log_level", str, "debug, info, warn or error."),
    ("logSourceLocation", "log_source_location", bool, "Add file and function to log lines."),
    (
        "rebootstrapDelay",
        "rebootstrap_delay",
        str,
        "How long a mismatch has to last before the agent bootstraps again.",
    ),
    ("rebootstrapMode", "rebootstrap_mode", str, "never, auto or always."),
    ("serverAddress", "server_address", str, "Address of the server."),
    ("serverPort", "server_port", int, "Port of the server."),
    ("socketPath", "socket_path", str, "Path of the Workload API socket."),
    ("trustBundle", "trust_bundle_path", str, "File with the bundle to trust the server by."),
    ("trustBundleFormat", "trust_bundle_format", str, "pem or spiffe."),
    ("trustBundleUrl", "trust_bundle_url", str, "Where to fetch that bundle."),
    ("trustDomain", "trust_domain", str, "The trust domain, such as example.org."),
)


def _settings_flags(command: F) -> F:
    made: Any = command
    for name, key, kind, text in reversed(_OVERRIDES):
        made = flag(name, text, type=kind, dest=key)(made)
    made = flag("expandEnv", "Expand $VARIABLES in the file.", type=bool, default=False)(made)
    return flag("config", "Path of the configuration file.", default=str(DEFAULT_CONFIG))(made)  # type: ignore[no-any-return]


def _load(config: str, *, expand_env: bool, given: Mapping[str, Any]) -> AgentSettings:
    overrides = {key: value for key, value in given.items() if value is not None}
    return load_settings(Path(config), expand_env=expand_env, overrides=overrides)


@click.command(
    "run",
    cls=GoCommand,
    examples="""
    spire-hw-agent run -config /etc/spire-hw/agent.conf
    spire-hw-agent run -config agent.conf -joinTokenFile token
    """,
)
@_settings_flags
def run(config: str, *, expand_env: bool, **given: Any) -> None:
    """Run the agent in the foreground; SIGTERM stops it."""
    settings = _load(config, expand_env=expand_env, given=given)
    os.umask(os.umask(0o077) | 0o027)
    harden()
    log.configure(settings.log)
    logger = log.get_logger("agent")
    for notice in settings.notices:
        logger.warning(notice)
    try:
        asyncio.run(app.run(settings))
    except SpireHwError as e:
        logger.error("Agent crashed", error=e.message)  # noqa: TRY400 - the message says it all
        raise


@click.command(
    "validate", cls=GoCommand, examples="spire-hw-agent validate -config /etc/spire-hw/agent.conf"
)
@_settings_flags
def validate(config: str, *, expand_env: bool, **given: Any) -> None:
    """Check a configuration file and its plugins' data without starting anything."""
    try:
        settings = _load(config, expand_env=expand_env, given=given)
        found = asyncio.run(app.check(settings))
    except ConfigError as e:
        raise SpireHwError(
            f"SPIRE agent configuration file is invalid:\n{e.message}", kind=e.kind
        ) from e
    if found:
        raise ConfigError(settings.file or config, found)
    for notice in settings.notices:
        complain(f"Warning: {notice}")
    click.echo("SPIRE agent configuration file is valid.")
