"""One numbered case of hostile attestation: what is sent, what it ends in, which tests do it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from spire_hw.errors import ErrorKind

IA: Final = (ErrorKind.INVALID_ARGUMENT,)
PD: Final = (ErrorKind.PERMISSION_DENIED,)
FP: Final = (ErrorKind.FAILED_PRECONDITION,)
RE: Final = (ErrorKind.RESOURCE_EXHAUSTED,)
DE: Final = (ErrorKind.DEADLINE_EXCEEDED,)
UN: Final = (ErrorKind.UNAVAILABLE,)
IN: Final = (ErrorKind.INTERNAL,)

_TESTS: Final = re.compile(r"(?P<file>[\w/]+):(?P<name>\w+)(?:\[(?P<rows>[^\]]+)\])?")


class Level(Enum):
    """How much of a system an act goes through."""

    PARSER = "parser"
    ATTESTOR = "attestor"
    SERVER = "server"
    AGENT = "agent"
    TPM = "agent+TPM"


# By the beginning of a test's path below tests/; the first that fits counts.
_LEVELS: Final = {
    "hostile/tpm/test_boot_log": Level.PARSER,
    "hostile/tpm/test_ima_list": Level.PARSER,
    "hostile/tpm/test_sweeps": Level.PARSER,
    "hostile/tpm": Level.ATTESTOR,
    "hostile/server": Level.SERVER,
    "hostile/agent": Level.AGENT,
    "unit/nodeattestor": Level.PARSER,
    "integration/tpm": Level.TPM,
}


def level_of(node_id: str) -> Level:
    """Return the level of a test, by its pytest name."""
    path = node_id.removeprefix("tests/")
    return next(level for start, level in _LEVELS.items() if path.startswith(start))


def _place(file: str) -> str:
    folder, _, name = file.rpartition("/")
    root = "" if folder.startswith(("unit/", "integration/")) else "hostile/"
    return f"tests/{root}{folder}/test_{name}.py"


@dataclass(frozen=True, slots=True)
class Case:
    """One case.

    Attributes:
        number: of the case; tests, reports and tables name it by that.
        what: is sent.
        kinds: one of which it ends in.
        says: a regular expression that the message fits; stage, words and reason.
        tests: do it, `folder/file:name`, the two without their `test_`, below tests/hostile unless
            another folder is named; `[a|b]` after it are the parameters, all without.
        beyond: why no act can be repeated, "" where one can.
    """

    number: int
    what: str
    kinds: tuple[ErrorKind, ...]
    says: str
    tests: tuple[str, ...]
    beyond: str = ""

    def has(self, node_id: str) -> bool:
        """Tell whether a test, by its pytest name, belongs to this case."""
        function, _, row = node_id.partition("[")
        for pattern in self.tests:
            found = _TESTS.fullmatch(pattern)
            if found is None:
                raise AssertionError(f"case {self.number}: {pattern}")
            if function != f"{_place(found['file'])}::test_{found['name']}":
                continue
            if found["rows"] is None or row.removesuffix("]") in found["rows"].split("|"):
                return True
        return False

    def files(self) -> set[str]:
        """Return the files its tests are in."""
        return {_place(pattern.partition(":")[0]) for pattern in self.tests}

    def fits(self, kind: str, message: str) -> bool:
        """Tell whether a refusal is the one that is expected."""
        return kind in {k.name for k in self.kinds} and re.search(self.says, message) is not None
