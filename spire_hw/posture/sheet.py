"""The lines of a verdict while it is made, and how foreign names are shown in them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from spire_hw.posture.reasons import action_of
from spire_hw.posture.verdict import Action, Check

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_MAX_SHOWN: Final = 256
_UNSAFE: Final = re.compile(rb"[^ !#-\[\]-~]")


class Sheet:
    """Collects checks; the policy's drift rules decide what a failing one does.

    Args:
        drift: actions that differ from the defaults, by reason code.
    """

    def __init__(self, drift: Mapping[str, Action]) -> None:
        self._drift = drift
        self.checks: list[Check] = []

    def passed(self, rule: str, message: str) -> None:
        """Note a rule that holds."""
        self.checks.append(Check(rule, True, message))

    def failed(self, rule: str, code: str, message: str) -> None:
        """Note a rule that does not hold; it does when its reason is accepted."""
        action = action_of(code, self._drift)
        if action is Action.ACCEPT:
            self.passed(rule, f"{message}; {code} is accepted")
        else:
            self.checks.append(Check(rule, False, message, code, action))

    def rule(self, rule: str, code: str, *, holds: bool, good: str, bad: str) -> bool:
        """Note a rule either way; tell whether it holds."""
        if holds:
            self.passed(rule, good)
        else:
            self.failed(rule, code, bad)
        return holds


def shown(name: bytes) -> str:
    """Return a name from elsewhere for a message: quoted, escaped byte by byte, cut."""
    text = _UNSAFE.sub(lambda found: b"\\x%02x" % found[0][0], name[:_MAX_SHOWN]).decode("ascii")
    if len(text) > _MAX_SHOWN or len(name) > _MAX_SHOWN:
        return f'"{text[:_MAX_SHOWN]}"...'
    return f'"{text}"'


def listed(numbers: Iterable[int]) -> str:
    """Return `4`, `0 and 4`, `0, 4 and 7`."""
    *first, last = [str(number) for number in sorted(numbers)]
    return f"{', '.join(first)} and {last}" if first else last
