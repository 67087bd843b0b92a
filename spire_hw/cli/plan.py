"""What `init` is about to write: shown whole, or written without losing anything that is there."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw.cli.output import complain
from spire_hw.errors import AlreadyExistsError, InvalidInputError, NotReadyError
from spire_hw.files import create_file, replace_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spire_hw.cli.output import Printer

_USER: Final = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
# Characters that mean something in a configuration file or a unit.
_SPECIAL: Final = frozenset("\"\\$%{}'`\n")


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file.

    Attributes:
        path: where.
        content: its text.
        mode: its permissions.
        why: what it is for.
    """

    path: Path
    content: str
    mode: int
    why: str


@dataclass(slots=True)
class Plan:
    """What was decided.

    Attributes:
        files: what is written.
        choices: why things are as they are, for the operator to read.
        steps: commands that are left to the operator.
        doubts: what may keep it from working.
    """

    files: list[PlannedFile] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    def carry_out(self, printer: Printer, *, dry_run: bool, force: bool) -> None:
        """Write the files, or show them with a dry run; then say what is left to do.

        Raises:
            AlreadyExistsError: a file is there and force was not given; nothing was written.
            NotReadyError: a directory cannot be made.
        """
        taken = [str(f.path) for f in self.files if os.path.lexists(f.path)]
        if taken and not force and not dry_run:
            raise AlreadyExistsError(
                f"not overwritten: {', '.join(taken)}; look at them, then give -force to replace them"
            )
        if not dry_run:
            for file in self.files:
                _write(file, force=force)
        values = {
            "dry_run": dry_run,
            "files": [
                {"path": str(f.path), "mode": f"{f.mode:04o}", "content": f.content, "why": f.why}
                for f in self.files
            ],
            "overwrites": taken,
            "choices": self.choices,
            "doubts": self.doubts,
            "steps": self.steps,
        }
        printer.value(values, lambda: self._show(taken, dry_run=dry_run))

    def _show(self, taken: list[str], *, dry_run: bool) -> None:
        for file in self.files:
            if dry_run:
                note = ", would replace what is there" if str(file.path) in taken else ""
                click.echo(f"# {file.path} (mode {file.mode:04o}{note}): {file.why}")
                click.echo(file.content)
            else:
                click.echo(f"Wrote {file.path}: {file.why}")
        _list("Choices", self.choices)
        _list("Left to do", self.steps)
        for doubt in self.doubts:
            complain(f"Warning: {doubt}")


def _list(title: str, lines: list[str]) -> None:
    if lines:
        click.echo(f"\n{title}:")
        for line in lines:
            click.echo(f"  - {line}")


def _write(file: PlannedFile, *, force: bool) -> None:
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise NotReadyError(f"directory {file.path.parent} cannot be made: {e.strerror}") from e
    write = replace_file if force else create_file
    write(file.path, file.content.encode(), mode=file.mode)


class Answers:
    """Where answers come from: flags, and a terminal for what no flag answered.

    Attributes:
        may_ask: somebody is at the terminal.
    """

    def __init__(self, *, may_ask: bool) -> None:
        self.may_ask = may_ask

    def text(
        self,
        flag: str,
        given: str,
        question: str,
        *,
        default: str = "",
        check: Callable[[str], object] = lambda _: None,
    ) -> str:
        """Return one answer.

        Args:
            flag: the flag that answers it.
            given: what the flag said, "" when it was not given.
            question: what a person is asked.
            default: taken when nobody says otherwise; "" when somebody has to.
            check: raises InvalidInputError for an answer that will not do.

        Raises:
            UsageError: no answer, or one that will not do.
        """
        if given or not self.may_ask:
            answer = given or default
            if not answer:
                raise click.UsageError(f"-{flag} is required ({question})")
            self._check(flag, answer, check)
            return answer
        while True:
            answer = str(click.prompt(question, default=default or None, err=True))
            try:
                self._check(flag, answer, check)
            except click.UsageError as e:
                complain(e.format_message())
                continue
            return answer

    def choice(self, flag: str, given: str, question: str, options: list[tuple[str, str]]) -> str:
        """Return one of several values; the first option is the default where it may be taken.

        Args:
            flag: the flag that answers it.
            given: what the flag said, "" when it was not given.
            question: what a person is asked.
            options: values and what they mean.

        Raises:
            UsageError: several would do and nobody says which.
        """
        return given or options[self.pick(flag, question, options)][0]

    def pick(self, flag: str, question: str, options: list[tuple[str, str]]) -> int:
        """Return the place of one of several values, which need not differ.

        Args:
            flag: the flag that answers it, with one of the values.
            question: what a person is asked.
            options: values and what they mean.

        Raises:
            UsageError: several would do and nobody says which.
        """
        if len(options) == 1:
            return 0
        if not self.may_ask:
            listed = "; ".join(f"{value} ({words})" for value, words in options)
            raise click.UsageError(f"-{flag} is required ({question}): {listed}")
        for number, (value, words) in enumerate(options, 1):
            complain(f"  {number}  {value}  ({words})")
        picked: Any = click.prompt(
            question, type=click.IntRange(1, len(options)), default=1, err=True
        )
        return int(picked) - 1

    def _check(self, flag: str, answer: str, check: Callable[[str], object]) -> None:
        try:
            check_plain(answer)
            check(answer)
        except InvalidInputError as e:
            raise click.UsageError(f"-{flag}: {e.message}") from e


def check_plain(text: str) -> None:
    """Refuse what would mean something else in a configuration file.

    Raises:
        InvalidInputError: it holds quotes, dollar signs or characters that do not print.
    """
    if not text.isprintable() or _SPECIAL & set(text):
        raise InvalidInputError(
            "quotes, braces, $, %, backslashes and control characters cannot be used"
        )


def check_path(text: str) -> None:
    """Refuse what is not an absolute path that can be written down anywhere.

    Raises:
        InvalidInputError: it is not.
    """
    check_plain(text)
    if not text.startswith("/") or " " in text:
        raise InvalidInputError(f"{text}: an absolute path without spaces is expected")


def check_user(text: str) -> None:
    """Refuse what is no name of a user.

    Raises:
        InvalidInputError: it is not.
    """
    if not _USER.fullmatch(text):
        raise InvalidInputError(f'"{text}" is not the name of a user')


def program_path(name: str) -> str:
    """Return the absolute path of a program of ours, as a unit needs it."""
    return shutil.which(name) or f"/usr/local/bin/{name}"
