"""What the programs' command trees share: the root group, `run`, `healthcheck`, `validate`, settings flags."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import click
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from spire_hw import log
from spire_hw.cli.flags import F, GoCommand, GoGroup, flag
from spire_hw.cli.output import Printer, complain, output_flags, shown
from spire_hw.cli.run import exit_code
from spire_hw.errors import ConfigError, ConfigFault, SpireHwError

if TYPE_CHECKING:
    from spire_hw.config.host import Override


# Adds flags to a command.
Decorate = Callable[[Any], Any]


def root_group(help_text: str, version: str) -> GoGroup:
    """Return the group of all commands of a program, with `-version`."""

    def show(ctx: click.Context, _param: click.Parameter, asked: bool) -> None:
        if asked and not ctx.resilient_parsing:
            click.echo(version, err=True)
            ctx.exit(0)

    option = click.Option(
        ["-version", "--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="Print the version and exit.",
    )
    return GoGroup("root", help=help_text, params=[option])


# -- run --------------------------------------------------------------------------


def run_until_stopped(
    what: str, settings: log.LogSettings, program: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """Set the log up and run a program until it ends; why it broke down is the log's last line.

    Args:
        what: `server`, `signer` or `agent`.
        settings: of the log.
        program: runs it, until a signal.

    Raises:
        SpireHwError: it could not start, or broke down.
    """

    async def serve() -> None:
        log.output().reopen_on_signal(asyncio.get_running_loop())
        await program()

    log.configure(settings)
    try:
        asyncio.run(serve())
    except SpireHwError as e:
        text = f"{what.capitalize()} crashed"
        log.get_logger(what).error(text, error=e.message)
        raise


# -- healthcheck -----------------------------------------------------------------


class Target(Protocol):
    """What a command that talks to a socket gets."""

    @property
    def printer(self) -> Printer:
        """Return how answers are printed."""
        ...


def healthcheck_command(
    what: str,
    flags: Decorate,
    ask: Callable[[Any, Any], Any],
    why: Callable[[Any], str] = lambda _: "",
) -> click.Command:
    """Return `healthcheck`.

    Args:
        what: `server` or `agent`.
        flags: adds the flags that find the socket; the command gets a `Target` first.
        ask: calls `grpc.health.v1.Health/Check` on that target with a request.
        why: says in words why a target does not serve, "" when it cannot tell.
    """

    @click.pass_context
    def healthcheck(ctx: click.Context, /, target: Target, *, shallow: bool, verbose: bool) -> None:
        del shallow  # upstream's flag; there is one depth
        if verbose and not target.printer.as_json:
            click.echo(f"Checking {what} health...")
        try:
            answer = ask(target, health_pb2.HealthCheckRequest())
        except SpireHwError as e:
            if target.printer.as_json:
                raise
            complain(f"Error: {what} is unhealthy: {e.message}")
            ctx.exit(exit_code(e))
        serving = answer.status == health_pb2.HealthCheckResponse.SERVING
        word = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

        def pretty() -> None:
            if serving:
                click.echo(f"{what.capitalize()} is healthy.")
            else:
                reason = why(target)
                complain(f"Error: {what} is unhealthy: {what} returned status {word}")
                if reason:
                    complain(shown(reason))

        target.printer.message(answer, pretty)
        if not serving:
            ctx.exit(1)

    made = flags(healthcheck)
    made = flag("verbose", "Print what is done.", type=bool, default=False)(made)
    made = flag("shallow", "Perform a less stringent check.", type=bool, default=False)(made)
    return click.command(
        "healthcheck",
        cls=GoCommand,
        help=f"Tell whether the {what} is healthy; exit status 0 when it is.",
        examples=f"spire-hw-{what} healthcheck -verbose",
    )(made)


# -- settings --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """A flag that stands for a key of the configuration file and wins over it.

    Attributes:
        flag: its name.
        key: in the section of the host.
        help: one sentence.
        type: click's type, or bool.
        from_environment: whether the environment may set it. Not where the same variable tells
            commands whom to ask: it is exported for them, and is not to move what is run.
    """

    flag: str
    key: str
    help: str
    type: Any = str
    from_environment: bool = True


COMMON_SETTINGS: Final = (
    Setting("logFile", "log_file", "File to write logs to."),
    Setting("logFormat", "log_format", "text or json."),
    Setting("logLevel", "log_level", "debug, info, warn or error."),
    Setting("logSourceLocation", "log_source_location", "Add code locations.", bool),
    Setting("trustDomain", "trust_domain", "The trust domain, such as example.org."),
)


def settings_flags(settings: Sequence[Setting], default: Path) -> Callable[[F], F]:
    """Add `-config`, `-expandEnv` and the flags of settings.

    The command gets `config`, `expand_env` and the keys, None where not given (see `overrides`).
    """

    def add(command: F) -> F:
        for setting in sorted(settings, key=lambda s: s.flag, reverse=True):
            add_one = flag(
                setting.flag,
                setting.help,
                type=setting.type,
                dest=setting.key,
                from_environment=setting.from_environment,
            )
            command = add_one(command)
        text = "Expand environment variables in the file."
        command = flag("expandEnv", text, type=bool, default=False)(command)
        return flag("config", "The configuration file.", default=str(default))(command)

    return add


def overrides(given: Mapping[str, Any]) -> dict[str, Override]:
    """Return the settings that were given on the command line."""
    return {key: value for key, value in given.items() if value is not None}


class Settings(Protocol):
    """What commands know of a program's settings."""

    @property
    def notices(self) -> tuple[str, ...]:
        """Return what the operator should hear."""
        ...


S = TypeVar("S", bound=Settings)


def run_check(check: Coroutine[Any, Any, list[ConfigFault]]) -> list[ConfigFault]:
    """Return what a check of settings finds; its log lines stay away from the command's answer."""
    log.output().level = log.Level.ERROR
    return asyncio.run(check)


def validate_command(
    what: str,
    flags: Decorate,
    load: Callable[..., S],
    find_faults: Callable[[S], list[ConfigFault]],
) -> click.Command:
    """Return `validate`.

    Args:
        what: `server`, `signer` or `agent`.
        flags: from `settings_flags`.
        load: `spire_hw.config.host.load` for its settings.
        find_faults: finds what loading did not, without starting anything.
    """

    @click.pass_context
    def validate(
        ctx: click.Context,
        /,
        config: str,
        *,
        expand_env: bool,
        output: str,
        field: str,
        **given: Any,
    ) -> None:
        printer = Printer(as_json=output == "json", field=field)
        notices: Sequence[str] = ()
        try:
            settings = load(Path(config), expand_env=expand_env, overrides=overrides(given))
            notices, faults = settings.notices, find_faults(settings)
        except ConfigError as e:
            faults = e.faults
        values = {
            "valid": not faults,
            "faults": [{"line": f.line, "message": f.message} for f in faults],
            "notices": list(notices),
        }

        def pretty() -> None:
            for notice in notices:
                complain(f"Warning: {notice}")
            if not faults:
                click.echo(f"SPIRE {what} configuration file is valid.")
                return
            text = ConfigError(config, list(faults)).message
            complain(f"SPIRE {what} configuration file is invalid: {len(faults)} found\n{text}")

        printer.value(values, pretty)
        ctx.exit(1 if faults else 0)

    return click.command(
        "validate",
        cls=GoCommand,
        help="Check a configuration file and its plugins' configurations; nothing is started.",
        examples=f"spire-hw-{what} validate -config {what}/{what}.conf",
    )(flags(output_flags(validate)))
