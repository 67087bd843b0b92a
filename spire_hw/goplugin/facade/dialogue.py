"""A streaming handler told as a conversation: what speaks and listens runs beside what sends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import ErrorKind, SpireHwError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine

M = TypeVar("M")
T = TypeVar("T")


async def converse(
    talk: Callable[[Callable[[M], None]], Coroutine[Any, Any, None]],
) -> AsyncGenerator[M, None]:
    """Run `talk` and yield what it says, until it returns.

    Args:
        talk: gets a function that says something to the other side.

    Raises:
        SpireHwError: what `talk` raised, after what it had said was sent.
    """
    said: asyncio.Queue[M | None] = asyncio.Queue()

    async def run() -> None:
        try:
            await talk(said.put_nowait)
        finally:
            said.put_nowait(None)

    tasks = Tasks(_raised_below)
    talking = tasks.spawn("plugin dialogue", run())
    try:
        while (message := await said.get()) is not None:
            yield message
        await talking
    finally:
        await tasks.close()


def _raised_below(name: str, error: BaseException) -> None:
    """Nothing to do: whoever awaits the task gets the error."""


async def heard(requests: AsyncIterator[T], what: str) -> T:
    """Return the other side's next message.

    Raises:
        SpireHwError: INVALID_ARGUMENT, it said nothing more.
    """
    request = await anext(requests, None)
    if request is None:
        raise SpireHwError(f"stream ended before {what}", kind=ErrorKind.INVALID_ARGUMENT)
    return request
