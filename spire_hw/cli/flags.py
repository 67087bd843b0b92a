"""Commands and flags with Go's syntax on click.

`-flag value`, `-flag=value` and `--flag` all work, booleans are `-flag` or `-flag=false`. Every flag
can also be given as an environment variable: `-spiffeID` is `SPIRE_HW_SPIFFE_ID`. A command without
positional arguments stops at the first one, as Go's `flag` package does, and refuses it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from typing_extensions import override

from spire_hw.config.duration import format_duration, parse_duration
from spire_hw.config.schema import nearest
from spire_hw.errors import InvalidInputError

F = TypeVar("F", bound=Callable[..., Any])

UNKNOWN_COMMAND: Final = 127
_HELP_NAMES: Final = ("h", "help")
_TRUE: Final = frozenset(["1", "t", "T", "TRUE", "true", "True"])
_FALSE: Final = frozenset(["0", "f", "F", "FALSE", "false", "False"])
_BOUNDARY: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=SVID)(?=TTL)")


def snake_case(name: str) -> str:
    """Return `x509SVIDTTL` as `x509_svid_ttl`."""
    return _BOUNDARY.sub("_", name).lower()


def env_name(name: str) -> str:
    """Return the environment variable of a flag, such as `SPIRE_HW_SOCKET_PATH`."""
    return f"SPIRE_HW_{snake_case(name).upper()}"


if TYPE_CHECKING:
    _DurationBase = click.ParamType[timedelta]
else:
    _DurationBase = click.ParamType  # older releases of click cannot be subscripted


class GoDurationType(_DurationBase):
    """A duration such as `1h30m`."""

    name = "duration"

    @override
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        if isinstance(value, timedelta):
            return value
        try:
            return parse_duration(value)
        except InvalidInputError as e:
            self.fail(e.message, param, ctx)


DURATION: Final = GoDurationType()


def flag(
    name: str,
    help: str,  # noqa: A002 - click's word
    *,
    type: Any = str,  # noqa: A002 - click's word
    default: Any = None,
    repeated: bool = False,
    dest: str = "",
    hidden: bool = False,
    alias: str = "",
    from_environment: bool = True,
) -> Callable[[F], F]:
    """Add a flag to a command.

    Args:
        name: upstream's name without the dash, such as `spiffeID`.
        help: one sentence.
        type: click's type, or `bool`.
        default: value when it is not given.
        repeated: may be given several times; the value is a tuple.
        dest: parameter name; the flag's name in snake case without it.
        hidden: leave it out of the help.
        alias: another name it goes by.
        from_environment: whether `env_name` stands for it when it is not given.
    """
    shown = default
    if isinstance(default, timedelta):
        shown = format_duration(default)
    note = "" if shown in (None, "", False, ()) else f" [default: {shown}]"
    if repeated:
        note += " Can be used more than once."
    names = [f"-{one}" for one in (name, alias) if one]
    return click.option(
        *names,
        dest or snake_case(name),
        type=click.BOOL if type is bool else type,
        default=() if repeated else default,
        multiple=repeated,
        help=help + note,
        envvar=env_name(name) if from_environment else None,
        hidden=hidden,
        metavar="[=false]" if type is bool else None,
    )


class GoCommand(click.Command):
    """A command that reads its flags as Go does."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", {})["help_option_names"] = ["-h", "-help", "--help"]
        super().__init__(*args, **kwargs)
        self.examples = inspect.cleandoc(examples)

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, normalise(self, ctx, args))

    @override
    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if self.examples:
            formatter.write_paragraph()
            formatter.write("Examples:\n")
            formatter.write("".join(f"  {line}\n" for line in self.examples.splitlines()))


def normalise(command: click.Command, ctx: click.Context, args: list[str]) -> list[str]:
    """Return arguments as click takes them: every flag as one `-name=value`, positionals last."""
    options = {
        o.lstrip("-"): p for p in command.params if isinstance(p, click.Option) for o in p.opts
    }
    takes_arguments = any(isinstance(p, click.Argument) for p in command.params)
    flags: list[str] = []
    positional: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            positional += rest
            break
        if not arg.startswith("-") or arg == "-":
            positional.append(arg)
            if takes_arguments:
                continue
            positional += rest
            break
        flags.append(_one_flag(arg, rest, options, ctx))
    return [*flags, "--", *positional] if positional else flags


def _one_flag(
    arg: str, rest: list[str], options: dict[str, click.Option], ctx: click.Context
) -> str:
    name, has_value, value = arg.removeprefix("-").removeprefix("-").partition("=")
    if name in _HELP_NAMES:
        return "--help"
    option = options.get(name)
    if option is None:
        known = [n for n in options if n not in _HELP_NAMES]
        hint = nearest(name, known).replace('"', "-", 1).replace('"', "", 1)
        raise click.UsageError(f"flag provided but not defined: -{name}{hint}", ctx)
    if option.type is click.BOOL:
        value = _boolean(name, value if has_value else "true", ctx)
    elif not has_value:
        if not rest:
            raise click.UsageError(f"flag needs an argument: -{name}", ctx)
        value = rest.pop(0)
    return f"{option.opts[0]}={value}"


def _boolean(name: str, text: str, ctx: click.Context) -> str:
    if text in _TRUE:
        return "true"
    if text in _FALSE:
        return "false"
    raise click.UsageError(f'invalid boolean value "{text}" for -{name}; use true or false', ctx)


class GoGroup(click.Group):
    """A group of commands; alone it shows its help and fails, as upstream's does."""

    command_class = GoCommand
    group_class = type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", {})["help_option_names"] = ["-h", "-help", "--help"]
        kwargs["invoke_without_command"] = True
        kwargs["no_args_is_help"] = False
        super().__init__(*args, **kwargs)

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] in {"-help", "-h"}:
            args = ["--help", *args[1:]]
        return super().parse_args(ctx, args)

    @override
    def invoke(self, ctx: click.Context) -> Any:
        result = super().invoke(ctx)
        if ctx.invoked_subcommand is None:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(1)
        return result

    @override
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            hint = nearest(name, self.list_commands(ctx))
            click.echo(f'Error: unknown command "{name}"{hint}\n', err=True)
            click.echo(ctx.get_help(), err=True)
            ctx.exit(UNKNOWN_COMMAND)
        return super().resolve_command(ctx, args)
