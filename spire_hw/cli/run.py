"""From arguments to exit status: runs a command group and reports what went wrong.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 server, agent or device out of reach, 4 not
permitted, 5 not found, 6 partly done, 127 unknown command, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import click

from spire_hw.cli.output import complain, dump
from spire_hw.errors import ConfigError, ErrorKind, SpireHwError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class ExitCode(IntEnum):
    """What a program's exit status says."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    DENIED = 4
    NOT_FOUND = 5
    PARTLY = 6
    INTERRUPTED = 130


_CODES: Final = {
    ErrorKind.INVALID_ARGUMENT: ExitCode.USAGE,
    ErrorKind.NOT_FOUND: ExitCode.NOT_FOUND,
    ErrorKind.PERMISSION_DENIED: ExitCode.DENIED,
    ErrorKind.UNAUTHENTICATED: ExitCode.DENIED,
    ErrorKind.UNAVAILABLE: ExitCode.UNREACHABLE,
    ErrorKind.DEADLINE_EXCEEDED: ExitCode.UNREACHABLE,
}


def exit_code(error: SpireHwError) -> ExitCode:
    """Return the exit status for an error."""
    if isinstance(error, ConfigError):
        return ExitCode.FAILED
    return _CODES.get(error.kind, ExitCode.FAILED)


def batch_code(done: int, failed: int) -> ExitCode:
    """Return the exit status of a command that did several things."""
    if not failed:
        return ExitCode.DONE
    return ExitCode.PARTLY if done else ExitCode.FAILED


def run(group: click.Command, program: str, args: Sequence[str] | None = None) -> int:  # noqa: PLR0911 - one per kind of end
    """Run a command line and return the exit status; errors go to standard error.

    Args:
        group: the program's commands.
        program: its name.
        args: arguments without the program's name; those of the process without them.
    """
    given = list(sys.argv[1:] if args is None else args)
    as_json = wants_json(given, os.environ)
    try:
        result = group.main(args=given, prog_name=program, standalone_mode=False)
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.UsageError as e:
        _report(as_json, "INVALID_ARGUMENT", e.format_message())
        if not as_json and e.ctx is not None:
            complain(f"Try '{e.ctx.command_path} -help'.")
        return ExitCode.USAGE
    except click.ClickException as e:
        _report(as_json, "UNKNOWN", e.format_message())
        return ExitCode.FAILED
    except (click.Abort, KeyboardInterrupt):
        complain("Interrupted.")
        return ExitCode.INTERRUPTED
    except SpireHwError as e:
        _report(as_json, e.kind.name, e.message)
        return exit_code(e)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    return result if isinstance(result, int) else ExitCode.DONE


def wants_json(args: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Tell whether JSON was asked for, also where the arguments are otherwise wrong."""
    for before, arg in zip(["", *args], args, strict=False):
        name, _, value = arg.lstrip("-").partition("=")
        if arg.startswith("-") and name == "output" and value:
            return value == "json"
        if before.startswith("-") and before.lstrip("-") == "output":
            return arg == "json"
    return environ.get("SPIRE_HW_OUTPUT") == "json"


def _report(as_json: bool, code: str, message: str) -> None:
    if as_json:
        complain(dump({"error": {"code": code, "message": message}}))
    else:
        complain(f"Error: {message}")
