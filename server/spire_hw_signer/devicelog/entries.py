"""What a device's log is made of, whatever the device.

This module is pure.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from spire_hw.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_DIGEST_BYTES: Final = 64
# With its digest before it an entry fits into a text of the audit log.
MAX_TEXT: Final = 380
_DIGEST: Final = re.compile(rf"(?:[0-9a-f]{{2}}){{1,{MAX_DIGEST_BYTES}}}", re.ASCII)
_MAX_DIGITS: Final = 19


class DeviceLogError(UnavailableError):
    """The device's log cannot be taken.

    Attributes:
        reason: stable word, such as `chain`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a device's log: the entry that was taken last.

    Attributes:
        number: of the entry.
        digest: of the entry.
    """

    number: int
    digest: bytes

    @override
    def __str__(self) -> str:
        """Return it as records have it."""
        return f"{self.number}:{self.digest.hex()}"

    @classmethod
    def parse(cls, text: str) -> Mark | None:
        """Return what `str` made, None for another text."""
        number, _, digest = text.partition(":")
        is_number = number.isascii() and number.isdigit() and len(number) <= _MAX_DIGITS
        if not is_number or _DIGEST.fullmatch(digest) is None:
            return None
        return cls(int(number), bytes.fromhex(digest))


@dataclass(frozen=True, slots=True)
class Entry(ABC):
    """One entry.

    Attributes:
        number: the device's; counts up.
        digest: tells it from any other of the same number; 1 to `MAX_DIGEST_BYTES`.
        text: what it says, printable, at most `MAX_TEXT` characters.
    """

    number: int
    digest: bytes
    text: str

    @property
    def mark(self) -> Mark:
        """Return its place."""
        return Mark(self.number, self.digest)

    @abstractmethod
    def steps_from(self, number: int) -> int:
        """Return how many entries after another it comes: 1 for the next, below 1 for an earlier one."""

    @abstractmethod
    def is_linked(self, digest: bytes) -> bool:
        """Tell whether it may follow an entry with this digest."""


@dataclass(frozen=True, slots=True)
class Dump:
    """What a device's log held when it was read.

    Attributes:
        entries: in the device's order.
        unlogged: events that the device had no room for, by their kinds.
    """

    entries: tuple[Entry, ...] = ()
    unlogged: Mapping[str, int] = field(default_factory=dict)
