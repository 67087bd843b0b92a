"""Keeps an external plugin up: started again when it ends, killed when it hangs.

Callers see one `Channel` over all runs. While no run is up their calls fail UNAVAILABLE and say
why; nothing is queued, for a caller knows best whether an answer is still wanted later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Generic, NoReturn, TypeVar

from google.protobuf.message import Message

from spire_hw.aio.backoff import Backoff
from spire_hw.aio.tasks import Tasks
from spire_hw.errors import ErrorKind, NotReadyError, SpireHwError, UnavailableError
from spire_hw.goplugin.host import Run, raise_explained

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from spire_hw.goplugin.launch import Launch
    from spire_hw.rpc.client import Bidi

M = TypeVar("M", bound=Message)
Metadata = Sequence[tuple[str, str]]

_FIRST_WAIT_S: Final = 1.0
_LONGEST_WAIT_S: Final = 60.0
# A run that was up this long was no false start.
_STABLE_S: Final = 60.0
_MISSES_TOLERATED: Final = 3
# Sockets of a process are closed a moment before its end is told.
_END_NOTICED_S: Final = 0.2
_NO_METADATA: Final[Metadata] = ()

# A plugin that answers its old configuration with one of these will do so again, and what it tries
# in vain, such as a PIN, may be counted by a device.
_FINAL: Final = {
    ErrorKind.INVALID_ARGUMENT,
    ErrorKind.FAILED_PRECONDITION,
    ErrorKind.PERMISSION_DENIED,
}

Explain = Callable[[SpireHwError], Awaitable[SpireHwError]]


class WatchedBidi(Generic[M]):
    """A call with streams both ways, as `spire_hw.rpc.client.Bidi`, whose errors are explained.

    Errors of whoever holds the conversation are none of the plugin's and go through untouched.
    """

    def __init__(self, stream: Bidi[M], explain: Explain) -> None:
        self._stream = stream
        self._explain = explain

    async def send(self, message: Message | bytes) -> None:
        """Send one message; see `Bidi.send`."""
        try:
            await self._stream.send(message)
        except SpireHwError as e:
            await self._fail(e)

    async def done_sending(self) -> None:
        """Say that no more messages come; see `Bidi.done_sending`."""
        try:
            await self._stream.done_sending()
        except SpireHwError as e:
            await self._fail(e)

    async def receive(self) -> M | None:
        """Return the next message, None at the end; see `Bidi.receive`."""
        try:
            return await self._stream.receive()
        except SpireHwError as e:
            await self._fail(e)

    async def _fail(self, error: SpireHwError) -> NoReturn:
        raise_explained(await self._explain(error), error)


class Supervisor:
    """One external plugin over all its runs; open it, configure it, close it.

    Args:
        launch: how it is started.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._limits = launch.limits
        self._clock = launch.clock
        self._log = launch.log
        self._run: Run | None = None
        self._ending: Run | None = None
        self._why_not = "not configured"
        self._text: str | None = None
        self._misses = 0
        self._opened = False
        self._given_up: asyncio.Event | None = None  # set when it is worth trying again
        self._tasks = Tasks(self._task_failed)
        self._changing = asyncio.Lock()

    async def open(self) -> None:
        """Start it for the first time.

        Raises:
            SpireHwError: it did not come up; it is not tried again.
        """
        self._run = await Run.start(self._launch)
        self._opened = True
        self._log.info("External plugin started", pid=self._run.pid)
        self._tasks.start("plugin supervision", self._supervise())
        self._tasks.start("plugin probes", self._probe_now_and_then())

    async def configure(self, text: str) -> None:
        """Configure it, now and after every restart.

        Raises:
            InvalidInputError: it does not accept the configuration; the one before stays.
            SpireHwError: it failed, or is not up.
        """
        async with self._changing:
            if self._given_up is None or self._given_up.is_set():
                await self._up().configure(text)
            else:
                self._run = await self._started(text)
                self._given_up.set()
            self._text = text

    async def validate(self, text: str) -> list[str]:
        """Return what it finds wrong with a configuration.

        Raises:
            SpireHwError: it failed, or is not up.
        """
        return await self._up().validate(text)

    async def check(self) -> None:
        """Make sure that it is up.

        Raises:
            SpireHwError: it is not; the message says why.
        """
        self._up()

    async def close(self) -> None:
        """End it and supervision."""
        self._why_not = "the host is stopping"
        await self._tasks.close()
        if self._ending is not None:
            await self._ending.kill()
        run, self._run = self._run, None
        if run is not None:
            await run.stop()
        self._launch.program.close()

    # -- calls: the face of `spire_hw.rpc.client.Channel` -------------------------------------

    async def unary(
        self,
        path: str,
        request: Message | bytes,
        response_type: type[M],
        timeout_s: float | None = None,
        metadata: Metadata = _NO_METADATA,
    ) -> M:
        """Call a method; see `Channel.unary`."""
        run = self._up()
        try:
            answer = await run.channel.unary(
                path, request, response_type, timeout_s or self._limits.call_s, metadata
            )
        except SpireHwError as e:
            await self._fail(run, e)
        self._misses = 0
        return answer

    async def server_stream(
        self,
        path: str,
        request: Message | bytes,
        response_type: type[M],
        timeout_s: float | None = None,
        metadata: Metadata = _NO_METADATA,
    ) -> AsyncGenerator[M, None]:
        """Call a method that answers more than once; see `Channel.server_stream`."""
        run = self._up()
        answers = run.channel.server_stream(path, request, response_type, timeout_s, metadata)
        try:
            async for answer in answers:
                yield answer
        except SpireHwError as e:
            await self._fail(run, e)
        finally:
            await answers.aclose()

    @asynccontextmanager
    async def bidi(
        self,
        path: str,
        response_type: type[M],
        timeout_s: float | None = None,
        metadata: Metadata = _NO_METADATA,
    ) -> AsyncIterator[WatchedBidi[M]]:
        """Open a call with streams both ways; see `Channel.bidi`."""
        run = self._up()
        async with run.channel.bidi(path, response_type, timeout_s, metadata) as stream:
            yield WatchedBidi(stream, lambda e: self._explained(run, e))

    def _up(self) -> Run:
        run = self._run
        if run is not None and not run.down.done():
            return run
        if not self._opened:
            raise NotReadyError("not configured")
        why = self._why_not if run is None else run.down.result()
        raise UnavailableError(f"the plugin is not running: {why}")

    async def _fail(self, run: Run, error: SpireHwError) -> NoReturn:
        raise_explained(await self._explained(run, error), error)

    async def _explained(self, run: Run, error: SpireHwError) -> SpireHwError:
        """Return what a failed call is to be told, and look after a plugin that does not answer."""
        match error.kind:
            case ErrorKind.UNAVAILABLE:
                await asyncio.wait({run.down}, timeout=_END_NOTICED_S)
                if run.down.done():
                    return UnavailableError(
                        f"the plugin went away during the call: {run.down.result()}"
                    )
                self._tasks.start("plugin probe", self._probe(run))
            case ErrorKind.DEADLINE_EXCEEDED:
                self._misses += 1
                if self._misses >= _MISSES_TOLERATED:
                    run.give_up(f"it did not answer {self._misses} calls in a row in time")
                else:
                    self._tasks.start("plugin probe", self._probe(run))
            case _:
                self._misses = 0
        return error

    # -- supervision --------------------------------------------------------------------------

    async def _supervise(self) -> None:
        backoff = Backoff(_FIRST_WAIT_S, _LONGEST_WAIT_S, factor=2.0)
        while True:
            run = self._run
            if run is not None:
                began = self._clock.monotonic()
                why = await asyncio.shield(run.down)
                self._why_not, self._run = why, None
                self._log.error("External plugin is down, it is started again", reason=why)
                self._ending = run
                await run.kill()
                self._ending = None
                if self._clock.monotonic() - began >= _STABLE_S:
                    backoff.reset()
            await self._clock.sleep(backoff.next_s())
            await self._start_again()
            if self._given_up is not None:
                await self._given_up.wait()
                self._given_up = None

    async def _start_again(self) -> None:
        try:
            async with self._changing:
                run = self._run = await self._started(self._text)
        except SpireHwError as e:
            self._why_not = e.message
            self._log.error("External plugin did not come up again", error=e.message)
        else:
            self._log.info("External plugin was started again", pid=run.pid)

    async def _started(self, text: str | None) -> Run:
        """Return a new run that has taken a configuration."""
        run = await Run.start(self._launch)
        try:
            if text is not None:
                await run.configure(text)
        except BaseException as e:
            await run.kill()
            if isinstance(e, SpireHwError) and e.kind in _FINAL and self._given_up is None:
                self._given_up = asyncio.Event()
                remedy = "it is not started again before it is given another configuration"
                raise SpireHwError(f"{e.message}; {remedy}", kind=e.kind) from e
            raise
        self._misses = 0
        return run

    async def _probe_now_and_then(self) -> None:
        while True:
            await self._clock.sleep(self._limits.probe_every_s)
            if self._run is not None:
                await self._probe(self._run)

    async def _probe(self, run: Run) -> None:
        try:
            await run.probe()
        except SpireHwError as e:
            run.give_up(f"it hangs: no sign of life ({e.message})")

    def _task_failed(self, name: str, error: BaseException) -> None:
        self._log.error("Supervision of the plugin failed", task=name, exc_info=error)
