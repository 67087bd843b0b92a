from __future__ import annotations

import json
from datetime import timedelta

import click
import pytest

from spire_hw.cli.flags import DURATION, GoCommand, GoGroup, env_name, flag
from spire_hw.cli.run import ExitCode, batch_code, exit_code, run, wants_json
from spire_hw.errors import (
    ConfigError,
    ConfigFault,
    DeniedError,
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    SpireHwError,
    UnavailableError,
)
from spire_hw_agent.cli.commands import root as agent_root
from spire_hw_server.cli.commands import root as server_root
from spire_hw_sim.cli import root as sim_root

ERRORS: dict[str, SpireHwError] = {
    "away": UnavailableError("gone"),
    "late": SpireHwError("slow", kind=ErrorKind.DEADLINE_EXCEEDED),
    "denied": DeniedError("no"),
    "missing": NotFoundError("none"),
    "wrong": InvalidInputError("bad"),
    "config": ConfigError("f", [ConfigFault(1, "x")]),
    "other": SpireHwError("hm"),
}


@click.group(cls=GoGroup)
def root() -> None:
    """Root."""


@root.command("do", examples="prog do -name x")
@flag("name", "A name.", default="")
@flag("spiffeID", "An ID.", default="")
@flag("selector", "Many.", repeated=True)
@flag("downstream", "A switch.", type=bool, default=False)
@flag("banned", "Three states.", type=bool)
@flag("ttl", "A duration.", type=DURATION, default=timedelta(hours=1))
@flag("count", "A number.", type=int, default=0)
def do(**values: object) -> None:
    """Do."""
    click.echo(json.dumps(values, default=str, sort_keys=True))


@root.command("take")
@click.argument("things", nargs=-1)
@flag("name", "A name.", default="")
def take(things: tuple[str, ...], name: str) -> None:
    """Take."""
    click.echo(json.dumps([things, name]))


@root.command("fail")
@click.argument("how")
@flag("output", "How.", default="pretty")
def fail(how: str, output: str) -> None:
    """Fail."""
    raise ERRORS[how]


Capture = pytest.CaptureFixture[str]


def answer(capsys: Capture, *args: str) -> dict[str, object]:
    assert run(root, "prog", args) == 0
    held: dict[str, object] = json.loads(capsys.readouterr().out)
    return held


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["-name", "x"], "name", "x"),
        (["-name=x"], "name", "x"),
        (["--name", "x"], "name", "x"),
        (["--name=x=y"], "name", "x=y"),
        (["-name="], "name", ""),
        (["-name", "-x"], "name", "-x"),
        (["-selector", "a:b", "-selector=c"], "selector", ["a:b", "c"]),
        (["-downstream"], "downstream", True),
        (["-downstream=false"], "downstream", False),
        (["-downstream=T"], "downstream", True),
        ([], "banned", None),
        (["-banned=0"], "banned", False),
        (["-ttl", "90m"], "ttl", "1:30:00"),
        (["-count=-3"], "count", -3),
        (["-name", "a", "-name", "b"], "name", "b"),
    ],
)
def test_flags_are_read_as_go_reads_them(
    capsys: Capture, args: list[str], key: str, value: object
) -> None:
    assert answer(capsys, "do", *args)[key] == value


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-nam", "x"], "not defined: -nam; did you mean -name?"),
        (["-name"], "flag needs an argument: -name"),
        (["-downstream=maybe"], "invalid boolean value"),
        (["-ttl", "x"], "not a duration"),
        (["-count", "x"], "not a valid integer"),
        (["stray", "-name", "x"], "unexpected extra argument"),
        (["-downstream", "false"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_exits_2_and_says_why(capsys: Capture, args: list[str], words: str) -> None:
    assert run(root, "prog", ["do", *args]) == ExitCode.USAGE
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert said.err.startswith("Error: ")


def test_flags_may_follow_arguments_where_there_are_any(capsys: Capture) -> None:
    assert run(root, "prog", ["take", "a", "-name", "x", "b", "--", "-c"]) == 0
    assert json.loads(capsys.readouterr().out) == [["a", "b", "-c"], "x"]


@pytest.mark.parametrize(
    ("flag_name", "variable"),
    [
        ("socketPath", "SPIRE_HW_SOCKET_PATH"),
        ("spiffeID", "SPIRE_HW_SPIFFE_ID"),
        ("x509SVIDTTL", "SPIRE_HW_X509_SVID_TTL"),
        ("jwtSVIDIncludeJTI", "SPIRE_HW_JWT_SVID_INCLUDE_JTI"),
        ("disableX509SVIDPrefetch", "SPIRE_HW_DISABLE_X509_SVID_PREFETCH"),
    ],
)
def test_names_of_environment_variables(flag_name: str, variable: str) -> None:
    assert env_name(flag_name) == variable


def test_flags_come_from_the_environment_and_the_command_line_wins(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIRE_HW_SPIFFE_ID", "spiffe://a/b")
    monkeypatch.setenv("SPIRE_HW_DOWNSTREAM", "true")
    found = answer(capsys, "do")
    assert (found["spiffe_id"], found["downstream"]) == ("spiffe://a/b", True)
    assert answer(capsys, "do", "-spiffeID", "x")["spiffe_id"] == "x"


@pytest.mark.parametrize("program", [server_root, agent_root])
def test_a_program_does_not_move_its_socket_to_where_commands_are_told_to_ask(
    program: GoGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIRE_HW_SOCKET_PATH", "/elsewhere.sock")
    monkeypatch.setenv("SPIRE_HW_LOG_LEVEL", "debug")
    for name in ("run", "validate"):
        command = program.commands[name]
        with command.make_context(name, []) as context:
            assert context.params["socket_path"] is None
            assert context.params["log_level"] == "debug"
        with command.make_context(name, ["-socketPath", "/here.sock"]) as context:
            assert context.params["socket_path"] == "/here.sock"


@pytest.mark.parametrize("name", ["-h", "--help"])
def test_the_simulator_shows_its_help_and_exits_0(capsys: Capture, name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        sim_root.main([name])
    assert ended.value.code == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["-h", "-help", "--help"])
def test_help_shows_examples_and_exits_0(capsys: Capture, name: str) -> None:
    assert run(root, "prog", ["do", name]) == 0
    out = capsys.readouterr().out
    assert "Examples:\n  prog do -name x\n" in out
    assert "[default: 1h0m0s]" in out
    assert run(root, "prog", [name]) == 0


def test_a_group_alone_shows_its_help_and_fails(capsys: Capture) -> None:
    assert run(root, "prog", []) == 1
    assert "Commands:" in capsys.readouterr().err


def test_an_unknown_command_exits_127_with_the_nearest(capsys: Capture) -> None:
    assert run(root, "prog", ["taek"]) == 127
    assert 'unknown command "taek"; did you mean "take"?' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("away", 3),
        ("late", 3),
        ("denied", 4),
        ("missing", 5),
        ("wrong", 2),
        ("config", 1),
        ("other", 1),
    ],
)
def test_errors_become_exit_codes(capsys: Capture, how: str, code: int) -> None:
    assert exit_code(ERRORS[how]) == code
    assert run(root, "prog", ["fail", how]) == code
    assert capsys.readouterr().err == f"Error: {ERRORS[how].message}\n"
    assert run(root, "prog", ["fail", how, "-output", "json"]) == code
    held = json.loads(capsys.readouterr().err)
    assert held == {"error": {"code": ERRORS[how].kind.name, "message": ERRORS[how].message}}


@pytest.mark.parametrize(
    ("args", "environ", "expected"),
    [
        (["x", "-output", "json"], {}, True),
        (["x", "--output=json"], {}, True),
        (["x", "-output", "pretty"], {"SPIRE_HW_OUTPUT": "json"}, False),
        (["x"], {"SPIRE_HW_OUTPUT": "json"}, True),
        (["-output"], {}, False),
        (["output", "json"], {}, False),
    ],
)
def test_json_is_noticed_even_in_wrong_usage(
    args: list[str], environ: dict[str, str], expected: bool
) -> None:
    assert wants_json(args, environ) is expected


@pytest.mark.parametrize(("done", "failed", "code"), [(2, 0, 0), (0, 0, 0), (1, 1, 6), (0, 2, 1)])
def test_batches(done: int, failed: int, code: int) -> None:
    assert batch_code(done, failed) == code


def test_commands_are_go_commands() -> None:
    assert isinstance(do, GoCommand)
