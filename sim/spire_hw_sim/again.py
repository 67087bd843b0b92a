"""What a hostile peer does: once in a test, and ten thousand times where a soak asks for it.

A test hands over the act itself, so that what is repeated is what was tested. Each time it has to be
refused; whoever soaks compares the refusals, and looks at what is left behind.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from spire_hw.errors import SpireHwError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator


class Soak(Protocol):
    """Repeats an act that was refused once."""

    def repeat(self, act: Callable[[], object], error: SpireHwError) -> None:
        """Do it again; `error` is what it ended in the first time."""

    async def repeat_async(self, act: Callable[[], Awaitable[object]], error: SpireHwError) -> None:
        """Do it again; `error` is what it ended in the first time."""


@dataclass(slots=True)
class _Present:
    soak: Soak | None = None


_present = _Present()


@contextmanager
def soaking(soak: Soak) -> Iterator[None]:
    """Have every act of this process repeated; not to be nested."""
    _present.soak = soak
    try:
        yield
    finally:
        _present.soak = None


async def refused(act: Callable[[], Awaitable[object]], *, again: bool = True) -> SpireHwError:
    """Return the error an act ends in.

    Args:
        act: can be done again at any time, with the same outcome.
        again: it is short enough to be done ten thousand times.

    Raises:
        AssertionError: it was not refused.
    """
    try:
        made = await act()
    except SpireHwError as e:
        error = e
    else:
        raise AssertionError(f"a hostile act succeeded: {made}")
    if again and _present.soak is not None:
        await _present.soak.repeat_async(act, error)
    return error


def refused_now(act: Callable[[], object]) -> SpireHwError:
    """Return the error an act ends in that waits for nothing; see `refused`."""
    try:
        made = act()
    except SpireHwError as e:
        error = e
    else:
        raise AssertionError(f"a hostile act succeeded: {made}")
    if _present.soak is not None:
        _present.soak.repeat(act, error)
    return error
