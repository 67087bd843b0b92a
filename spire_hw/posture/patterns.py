"""Patterns over bytes in which `*` stands for any bytes and `?` for one; linear in the bytes matched.

A pattern that ends in `/` stands for everything below that folder. There is nothing else to
escape, and no way to write a pattern that takes long.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_SPECIAL: Final = re.compile(rb"[*?]")


@dataclass(frozen=True, slots=True)
class Patterns:
    """Several patterns, any of which may match.

    Attributes:
        texts: as they were written.
    """

    texts: tuple[bytes, ...] = ()
    _compiled: re.Pattern[bytes] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Make one expression of all of them."""
        parts = [_expression(text) for text in self.texts]
        made = re.compile(b"(?s:" + b"|".join(parts) + b")") if parts else None
        object.__setattr__(self, "_compiled", made)

    @classmethod
    def of(cls, texts: Iterable[str | bytes]) -> Patterns:
        """Return patterns in order, each once; text stands for its UTF-8 bytes."""
        given = [t.encode() if isinstance(t, str) else t for t in texts]
        return cls(tuple(dict.fromkeys(given)))

    def match(self, value: bytes) -> bool:
        """Tell whether one of the patterns stands for the whole value."""
        return self._compiled is not None and self._compiled.fullmatch(value) is not None

    def __bool__(self) -> bool:
        """Tell whether there are any."""
        return bool(self.texts)


def _expression(text: bytes) -> bytes:
    """Return a regular expression for one pattern.

    What stands between two stars is found at its first place and not moved again (atomic group):
    a later place would leave less for the rest, so nothing is missed.
    """
    if text.endswith(b"/"):
        text += b"*"
    chunks = [_literal(chunk) for chunk in text.split(b"*")]
    if len(chunks) == 1:
        return chunks[0]
    inner = b"".join(b"(?>.*?" + chunk + b")" for chunk in chunks[1:-1] if chunk)
    return chunks[0] + inner + b".*" + chunks[-1]


def _literal(chunk: bytes) -> bytes:
    return b".".join(re.escape(part) for part in chunk.split(b"?"))
