"""The local sockets commands talk to: which one, and why it cannot be used, in words."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import click

from spire_hw.errors import DeniedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def find_socket(
    socket_path: str,
    instance: str,
    environ: Mapping[str, str],
    *,
    variable: str,
    default: Path,
) -> Path:
    """Return the socket that -socketPath or -instance name.

    Args:
        socket_path: value of -socketPath, "" when not given.
        instance: value of -instance; replaces `%i` in the environment variable's path.
        environ: environment variables.
        variable: the one that holds the template.
        default: without both flags.

    Raises:
        UsageError: both are given, or there is no template for the instance.
    """
    if not instance:
        return type(default)(socket_path) if socket_path else default
    if socket_path:
        raise click.UsageError("give -socketPath or -instance, not both")
    template = environ.get(variable, "")
    if "%i" not in template:
        raise click.UsageError(f"-instance needs a path with %i in {variable}")
    return type(default)(template.replace("%i", instance))


def check_socket(path: Path, program: str) -> None:
    """Say in words why a socket cannot be used, before gRPC says it in codes.

    Args:
        path: the socket.
        program: whose it is, such as `spire-hw-server`.

    Raises:
        UnavailableError: there is none.
        DeniedError: this user may not use it.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as e:
        raise UnavailableError(
            f"no socket at {path}; is {program} running? Start it with `{program} run`, or name"
            " its socket with -socketPath"
        ) from e
    except PermissionError as e:
        raise DeniedError(f"this user may not reach {path}; run as the user of {program}") from e
    except OSError as e:
        raise UnavailableError(f"{path}: {e.strerror}") from e
    if not stat.S_ISSOCK(mode):
        raise UnavailableError(
            f"{path} is not a socket; name the one of {program} with -socketPath"
        )
    if not os.access(path, os.W_OK):
        raise DeniedError(f"this user may not use {path}; run as the user of {program}")
