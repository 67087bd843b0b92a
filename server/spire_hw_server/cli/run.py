"""Start the server; check its configuration."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw import log
from spire_hw.cli.flags import F, GoCommand, flag
from spire_hw.cli.output import Printer, complain, output_flags
from spire_hw.errors import ConfigError, ConfigFault
from spire_hw_server.config import DEFAULT_CONFIG, ServerSettings, load_settings

if TYPE_CHECKING:
    from spire_hw.config.host import Override

# Flags that stand for keys of `server {}`: flag, parameter, key, type, help.
_OVERRIDES: Final = (
    ("bindAddress", "bind_address", "bind_address", str, "IP address the API listens on."),
    ("serverPort", "server_port", "bind_port", str, "Port the API listens on."),
    ("dataDir", "data_dir", "data_dir", str, "Directory for the server's data."),
    ("logFile", "log_file", "log_file", str, "File to write logs to."),
    ("logFormat", "log_format", "log_format", str, "text or json."),
    ("logLevel", "log_level", "log_level", str, "debug, info, warn or error."),
    ("logSourceLocation", "log_source_location", "log_source_location", bool, "Add code locations."),
    ("socketPath", "socket_path", "socket_path", str, "Path of the admin socket."),
    ("trustDomain", "trust_domain", "trust_domain", str, "Trust domain the server is for."),
)  # fmt: skip


def _config_flags(command: F) -> F:
    for name, dest, _, kind, text in reversed(_OVERRIDES):
        command = flag(name, text, type=kind, dest=dest)(command)
    command = flag(
        "expandEnv", "Expand environment variables in the file.", type=bool, default=False
    )(command)
    return flag("config", "The configuration file.", default=str(DEFAULT_CONFIG))(command)


def _settings(config: str, *, expand_env: bool, flags: dict[str, Any]) -> ServerSettings:
    keys = {dest: key for _, dest, key, _, _ in _OVERRIDES}
    overrides: dict[str, Override] = {keys[d]: v for d, v in flags.items() if v is not None}
    return load_settings(Path(config), expand_env=expand_env, overrides=overrides)


@click.command(
    "run",
    cls=GoCommand,
    examples="""
    spire-hw-server run -config server/server.conf
    spire-hw-server run -config server.conf -expandEnv -logLevel debug
    """,
)
@_config_flags
def run(config: str, *, expand_env: bool, **flags: Any) -> None:
    """Run the server until SIGINT or SIGTERM."""
    settings = _settings(config, expand_env=expand_env, flags=flags)
    from spire_hw_server import app  # noqa: PLC0415 - commands that only ask need none of it

    async def serve() -> None:
        log.output().reopen_on_signal(asyncio.get_running_loop())
        await app.run(settings)

    log.configure(settings.log)
    asyncio.run(serve())


@click.command(
    "validate",
    cls=GoCommand,
    examples="spire-hw-server validate -config server/server.conf",
)
@_config_flags
@output_flags
@click.pass_context
def validate(
    ctx: click.Context, /, config: str, *, expand_env: bool, output: str, field: str, **flags: Any
) -> None:
    """Check a configuration file and its plugins' configurations; nothing is started."""
    printer = Printer(as_json=output == "json", field=field)
    faults, notices = _check(config, expand_env=expand_env, flags=flags)
    values = {
        "valid": not faults,
        "faults": [{"line": f.line, "message": f.message} for f in faults],
        "notices": list(notices),
    }

    def pretty() -> None:
        for notice in notices:
            complain(f"Warning: {notice}")
        if not faults:
            click.echo("SPIRE server configuration file is valid.")
            return
        text = ConfigError(config, faults).message
        complain(f"SPIRE server configuration file is invalid: {len(faults)} found\n{text}")

    printer.value(values, pretty)
    ctx.exit(1 if faults else 0)


def _check(
    config: str, *, expand_env: bool, flags: dict[str, Any]
) -> tuple[list[ConfigFault], tuple[str, ...]]:
    try:
        settings = _settings(config, expand_env=expand_env, flags=flags)
    except ConfigError as e:
        return e.faults, ()
    from spire_hw_server import app  # noqa: PLC0415 - loads what the server is made of

    log.output().level = log.Level.ERROR
    return asyncio.run(app.check_settings(settings)), settings.notices
