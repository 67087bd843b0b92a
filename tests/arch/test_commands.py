"""Every command explains itself, and every command line anybody is shown exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from spire_hw.cli.flags import GoCommand, normalise
from spire_hw.cli.run import run
from spire_hw_agent.cli.commands import root as agent_root
from spire_hw_plugins.cli.commands import root as plugin_root
from spire_hw_server.cli.commands import root as server_root
from spire_hw_signer.cli.commands import root as signer_root

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "spire-hw-server": server_root,
    "spire-hw-agent": agent_root,
    "spire-hw-plugin": plugin_root,
    "spire-hw-signer": signer_root,
}
HELP_IS_ENOUGH = {"spire-hw-agent healthcheck", "spire-hw-server jwt", "spire-hw-server x509"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CALL = re.compile(r"(?:^|[\s`$(=])(spire-hw-(?:server|agent|plugin|signer) [^\n|>&;`)#]*)")


def commands() -> Iterator[tuple[str, click.Command]]:
    def below(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield path, command
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                yield from below(f"{path} {name}", inner)

    for program, root in PROGRAMS.items():
        yield from below(program, root)


EVERY = dict(commands())
LEAVES = {p: c for p, c in EVERY.items() if not isinstance(c, click.Group)}


@pytest.mark.parametrize("path", EVERY)
def test_help_works(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = path.split()
    for flag in ("-help", "--help", "-h"):
        assert run(PROGRAMS[program], program, [*words, flag]) == 0
        shown = capsys.readouterr().out
        assert f"Usage: {path} " in shown
        assert "-help" in shown


@pytest.mark.parametrize("path", LEAVES)
def test_a_command_says_what_it_does_and_every_flag_too(path: str) -> None:
    command = LEAVES[path]
    assert (command.help or "").strip()
    for param in command.params:
        if isinstance(param, click.Option) and not param.hidden:
            assert (param.help or "").strip(), param.name


@pytest.mark.parametrize("path", LEAVES)
def test_a_command_has_an_example(path: str) -> None:
    command = LEAVES[path]
    assert isinstance(command, GoCommand)
    assert path in HELP_IS_ENOUGH or command.examples


def find(line: str) -> tuple[click.Command, list[str]]:
    program, *words = shlex.split(line, comments=True)
    command: click.Command = PROGRAMS[program]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f'"{name}" is no command in: {line}'
        command = command.commands[name]
    return command, words


def check(line: str) -> None:
    command, words = find(line)
    if words in (["-help"], ["-version"]):
        return
    normalise(command, click.Context(command, info_name="x"), words)


def shown_lines() -> Iterator[tuple[str, str]]:
    for path, command in LEAVES.items():
        if isinstance(command, GoCommand):
            text = command.examples.replace("\\\n", " ")
            for line in text.splitlines():
                yield path, line.strip()
    for file in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")]:
        for kind, text in _FENCE.findall(file.read_text()):
            if kind in {"console", "sh", "shell", "", "text"}:
                for call in _CALL.findall(text.replace("\\\n", " ")):
                    yield str(file.relative_to(ROOT)), call.strip()
    for file in [*ROOT.glob("scripts/vagrant-*.sh"), *ROOT.glob("packaging/**/*.service")]:
        for call in _CALL.findall(file.read_text().replace("\\\n", " ")):
            unquoted = re.split("[\"']", call.replace('"$SOCKET"', "SOCKET"))[0]
            yield str(file.relative_to(ROOT)), unquoted.strip()


SHOWN = sorted(set(shown_lines()))


@pytest.mark.parametrize("line", SHOWN, ids=[f"{where}:{i}" for i, (where, _) in enumerate(SHOWN)])
def test_a_command_line_that_is_shown_exists(line: tuple[str, str]) -> None:
    text = line[1]
    program, *words = shlex.split(text, comments=True)
    if program in PROGRAMS and words and words[0] not in {"…", "..."}:
        check(text)


def test_examples_are_looked_at() -> None:
    where = {place for place, _ in SHOWN}
    assert {"README.md", "docs/operations.md", "server/README.md", "agent/README.md"} <= where


@pytest.mark.parametrize("target", re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text()))
def test_make_targets_of_the_readme_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
