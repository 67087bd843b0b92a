"""How much the running server logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw._pb import server_logger_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.cli.flags import GoGroup, flag
from spire_hw.log import Level
from spire_hw_server.cli.connect import admin_flags

if TYPE_CHECKING:
    from spire_hw.cli.admin import Admin

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["Logger"]


@click.group("logger", cls=GoGroup)
def group() -> None:
    """The log level of the running server."""


@group.command("get", examples="spire-hw-server logger get")
@admin_flags
def get(admin: Admin) -> None:
    """Show the log level and the one the server was started with."""
    _print(admin, admin.call(_SERVICE, "GetLogger", pb.GetLoggerRequest()))


@group.command("set", examples="spire-hw-server logger set -level debug")
@flag("level", "panic, fatal, error, warn, info, debug or trace.", default="")
@admin_flags
def set_level(admin: Admin, level: str) -> None:
    """Change the log level until the next start."""
    if not level:
        raise click.UsageError("a log level is required (-level)")
    wanted = Level.parse(level).name
    _print(admin, admin.call(_SERVICE, "SetLogLevel", pb.SetLogLevelRequest(new_level=wanted)))


@group.command("reset", examples="spire-hw-server logger reset")
@admin_flags
def reset(admin: Admin) -> None:
    """Go back to the log level of the configuration."""
    _print(admin, admin.call(_SERVICE, "ResetLogLevel", pb.ResetLogLevelRequest()))


def _print(admin: Admin, answer: Any) -> None:
    def pretty() -> None:
        click.echo(f"Logger Level : {_label(answer.current_level)}")
        click.echo(f"Launch Level : {_label(answer.launch_level)}\n")

    admin.printer.message(answer, pretty)


def _label(number: int) -> str:
    return Level[types_pb2.LogLevel.Name(number)].label
