"""The life of a program: brought up in order, run until a signal or a failure, taken down."""

from __future__ import annotations

import asyncio
import signal
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self

from spire_hw import log as logs
from spire_hw import memory
from spire_hw.aio.tasks import Tasks
from spire_hw.errors import NotReadyError, SpireHwError
from spire_hw.hardening import harden

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any


class Program(ABC):
    """What a composition root is made on.

    Args:
        name: `server`, `signer` or `agent`.
        title: how lines of the log call it that begin with it; the name by default.

    Attributes:
        name: for messages.
        log: its log.
    """

    def __init__(self, name: str, title: str = "") -> None:
        self.name = name
        self.title = title or name
        self.log = logs.get_logger(name)
        self._stack = AsyncExitStack()
        self._failure: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        """Bring the program up, see `start`."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Take the program down."""
        await self.close()

    async def start(self) -> None:
        """Bring the program up; what was brought up before a failure is taken down again.

        Raises:
            SpireHwError: a part could not start; the message says which and why.
        """
        self._failure = asyncio.get_running_loop().create_future()
        self._stack.callback(self._failure.cancel)
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def close(self) -> None:
        """Take the program down; calls in progress have a while to finish."""
        await self._stack.aclose()

    async def failed(self) -> None:
        """Wait until a part of the running program breaks down, and raise its error."""
        if self._failure is None:
            raise NotReadyError(f"the {self.name} was not started")
        await asyncio.shield(self._failure)

    @abstractmethod
    async def _start(self) -> None:
        """Bring the parts up; each leaves on the stack how it is taken down."""

    def _broke_down(self, name: str, error: BaseException) -> None:
        text = f"a part of the {self.name} broke down"
        self.log.error(text, part=name, exc_info=error)
        self._end(SpireHwError(f"{name} broke down: {error}"))

    def _end(self, error: SpireHwError) -> None:
        """Have the program end with an error."""
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()  # whoever waited may have gone: not worth a warning


async def run_program(
    make: Callable[[], Program],
    on_signal: signal.Signals,
    handle: Callable[[Any], Coroutine[Any, Any, object]],
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Run a program until SIGTERM or SIGINT; a signal during the start ends it as well.

    Args:
        make: builds it, in a process that is hardened by then.
        on_signal: a signal it acts on while it runs.
        handle: what it does then, given the program.
        on_ready: called once the program answers.

    Raises:
        SpireHwError: it could not start, or a part of it broke down.
    """
    harden()
    memory.limit_arenas()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    program = make()
    tasks = Tasks(on_failure=lambda name, error: None)
    loop.add_signal_handler(on_signal, lambda: tasks.start(on_signal.name, handle(program)))
    try:
        stopping = tasks.spawn("stop signal", stop.wait())
        starting = tasks.spawn("start", program.start())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            early = f"{program.title} stops before it was up"
            program.log.info(early)
            return
        await starting
        memory.settle()
        if on_ready is not None:
            on_ready()
        failing = tasks.spawn("failure", program.failed())
        await asyncio.wait({failing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            await failing
        ending = f"{program.title} stops"
        program.log.info(ending)
    finally:
        await tasks.close()
        await program.close()
        for number in (signal.SIGTERM, signal.SIGINT, on_signal):
            loop.remove_signal_handler(number)
