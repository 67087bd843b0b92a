"""The calling side: a channel that keeps one connection, calls as its streams."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from spire_hw import __version__
from spire_hw.aio.tasks import Tasks
from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.log import get_logger
from spire_hw.rpc.client import Channel
from spire_hw.rpc.h2 import frames, hpack, wire
from spire_hw.rpc.h2.clientstream import ClientStream
from spire_hw.rpc.h2.connection import Connection
from spire_hw.rpc.h2.frames import Code
from spire_hw.rpc.h2.limits import Pool, Windows
from spire_hw.rpc.h2.stream import Fault
from spire_hw.transport.half import PREFACE, Half

if TYPE_CHECKING:
    from spire_hw.rpc.client import Metadata, RawCall
    from spire_hw.rpc.h2.hpack import Block
    from spire_hw.transport.dialer import Dialer

_WINDOWS: Final = Windows(stream=256 * 1024, connection=2 * 1024 * 1024, held=128 * 1024 * 1024)
_MAX_STREAMS: Final = 100  # of a server that sets no limit
_ALIVE_S: Final = 5.0
_CLOSE_S: Final = 5.0
_LAST_ID: Final = 2**30
_PATHS_KNOWN: Final = 64


class _NotProcessedError(Exception):
    """The server has not looked at the call: it may be made again."""


class ClientConnection(Connection):
    """A connection of a channel."""

    def __init__(self, half: Half, channel: H2Channel) -> None:
        own = {frames.ENABLE_PUSH: 0}
        super().__init__(half, _WINDOWS, Pool(_WINDOWS.held), own, preface=PREFACE)
        self._channel = channel
        self._next = 1
        # Servers with a lower limit take more calls than that before they said so for an attack.
        self._limit = 1
        self._is_limit_known = False
        self._slots: deque[asyncio.Future[None]] = deque()
        self._is_suspected = False
        self.farewell = ""

    @property
    def is_usable(self) -> bool:
        """Tell whether new calls may be made."""
        return not self.is_closed and not self.is_draining and self._next < _LAST_ID

    @property
    def is_free(self) -> bool:
        """Tell whether a call may be made at once."""
        return len(self.streams) < self._limit and self.is_usable

    async def slot(self) -> None:
        """Wait until the server takes one more call.

        Raises:
            _NotProcessedError: it takes none any more.
        """
        while len(self.streams) >= self._limit and self.is_usable:
            waiting = asyncio.get_running_loop().create_future()
            self._slots.append(waiting)
            try:
                await waiting
            except asyncio.CancelledError:
                if waiting.done() and not waiting.cancelled():
                    self._let_in()  # the place was ours: it is another's now
                else:
                    self._slots.remove(waiting)
                raise
        if not self.is_usable:
            raise _NotProcessedError

    def open(self, block: bytes, limit: int, timeout_s: float | None) -> ClientStream:
        """Begin a call; there is a slot."""
        stream = ClientStream(self, self._next, limit, timeout_s)
        self._next += 2
        self.streams[stream.id] = stream
        self.write_headers(stream.id, block, end=False)
        return stream

    def lost(self) -> SpireHwError:
        """Return what calls are told whose connection is gone."""
        return self._channel.lost(self.farewell or self.why)

    def suspect(self) -> None:
        """A call has run out of time: see whether anybody is there at all."""
        if not self._is_suspected and not self.is_closed:
            self._is_suspected = True
            self._channel.tasks.start("check connection", self._check())

    async def _check(self) -> None:
        if not await self.ping(_ALIVE_S):
            self.abort("the server does not answer")
        self._is_suspected = False

    @override
    def on_headers(self, number: int, block: Block, *, end: bool) -> None:
        if self.is_idle_stream(number):
            raise Fault(Code.PROTOCOL_ERROR, "an answer to no call")
        self.spend(0.1)  # of a call that we have ended: what was under way

    @override
    def is_idle_stream(self, number: int) -> bool:
        return number >= self._next or number % 2 == 0

    @override
    def on_limit(self, max_streams: int) -> None:
        self._limit = max_streams
        self._is_limit_known = True
        self._let_in()

    @override
    def on_settings(self) -> None:
        if not self._is_limit_known:
            self.on_limit(_MAX_STREAMS)

    @override
    def on_dropped(self) -> None:
        self._let_in()
        if self.is_draining and not self.streams:
            self.close()

    def _let_in(self) -> None:
        """Wake as many as have room, all when there is none to come; each looks for itself."""
        room = self._limit - len(self.streams) if self.is_usable else len(self._slots)
        while room > 0 and self._slots:
            waiting = self._slots.popleft()
            if not waiting.done():
                waiting.set_result(None)
                room -= 1

    @override
    def on_goaway(self, last: int, code: Code) -> None:
        self.is_draining = True
        if code is not Code.NO_ERROR:
            self.farewell = f"the server ended it ({code.name})"
        for number, stream in list(self.streams.items()):
            if number > last and isinstance(stream, ClientStream):
                stream.not_processed()
        self._let_in()
        if not self.streams:
            self.close()

    @override
    def on_closed(self) -> None:
        self._let_in()
        self._channel.gone(self)


class H2Channel(Channel):
    """Calls over one connection at a time, made when it is needed."""

    def __init__(
        self, where: str, authority: str, max_response_bytes: int, dialer: Dialer | None = None
    ) -> None:
        super().__init__(where, dialer)
        self._authority = authority
        self._max_response_bytes = max_response_bytes
        self._connection: ClientConnection | None = None
        self._open: dict[ClientConnection, None] = {}
        self._connecting: asyncio.Future[ClientConnection] | None = None
        self._closed = False
        self._blocks: dict[str, bytes] = {}
        self.tasks = Tasks(self._failed)

    @override
    async def close(self) -> None:
        self._closed = True
        for connection in list(self._open):
            connection.close("closed by us")
        await self.tasks.close(_CLOSE_S)
        if self.dialer is not None:
            await self.dialer.close()

    @override
    async def open(self, path: str, timeout_s: float | None, metadata: Metadata) -> RawCall:
        connection = self._connection
        if connection is None or not connection.is_free:
            begun = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(timeout_s):
                    connection = await self._ready()
            except TimeoutError as e:
                raise SpireHwError(
                    f"no connection to {self.where} in time", kind=ErrorKind.DEADLINE_EXCEEDED
                ) from e
            if timeout_s is not None:
                timeout_s = max(0.0, timeout_s - (asyncio.get_running_loop().time() - begun))
        block = self._block(path, timeout_s, metadata)
        return connection.open(block, self._max_response_bytes, timeout_s)

    async def _ready(self) -> ClientConnection:
        """Return a connection that takes one more call."""
        while not self._closed:
            connection = self._connection
            if connection is None or not connection.is_usable:
                connection = await self._connected()
            try:
                await connection.slot()
            except _NotProcessedError:
                continue
            return connection
        raise self._is_over()

    async def _connected(self) -> ClientConnection:
        """Wait for a new connection: one for all who wait, and none of them can break it off."""
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_future()
            self.tasks.start("connect", self._connect(self._connecting))
        return await asyncio.shield(self._connecting)

    async def _connect(self, told: asyncio.Future[ClientConnection]) -> None:
        """Make a connection and tell those who wait, or tell them why there is none."""
        try:
            half = await self._dial()
            if self._closed:
                half.abort()
                raise self._is_over()
            if half.transport is None or half.transport.is_closing():
                raise UnavailableError(f"{self.where} ended the connection at once")
            connection = ClientConnection(half, self)
            self._connection = connection
            self._open[connection] = None
            told.set_result(connection)
            half.lead(connection)
        except SpireHwError as e:
            told.set_exception(e)
        finally:
            self._connecting = None
            if not told.done():
                told.set_exception(self._is_over())
            told.exception()  # whoever waited may have gone: not worth a warning

    def _is_over(self) -> SpireHwError:
        return UnavailableError(f"the connection to {self.where} is closed")

    async def _dial(self) -> Half:
        if self.dialer is not None:
            try:
                return await self.dialer.open()
            except SpireHwError as e:
                raise UnavailableError(f"cannot reach {self.where}: {e.message}") from e
        half = Half(begins=b"")
        try:
            loop = asyncio.get_running_loop()
            await loop.create_unix_connection(lambda: half, self.where)
        except OSError as e:
            raise UnavailableError(f"cannot connect to {self.where}: {e.strerror or e}") from e
        return half

    def _block(self, path: str, timeout_s: float | None, metadata: Metadata) -> bytes:
        block = self._blocks.get(path)
        if block is None:
            if len(self._blocks) >= _PATHS_KNOWN:
                self._blocks.clear()
            block = self._blocks[path] = hpack.encode(
                (
                    (":method", "POST"),
                    (":scheme", "http" if self.dialer is None else "https"),
                    (":path", path),
                    (":authority", self._authority),
                    ("te", "trailers"),
                    ("content-type", wire.CONTENT_TYPE),
                    ("user-agent", f"spire-hw/{__version__}"),
                )
            )
        if metadata:
            block += hpack.encode(metadata)
        if timeout_s is not None:
            block += _timeout_field(wire.encode_timeout(timeout_s))
        return block

    def gone(self, connection: ClientConnection) -> None:
        """Forget a connection."""
        self._open.pop(connection, None)
        if self._connection is connection:
            self._connection = None

    def lost(self, why: str) -> SpireHwError:
        """Return what calls are told whose connection is gone."""
        if self._closed:
            return UnavailableError(f"the connection to {self.where} was closed")
        cause = None if self.dialer is None else self.dialer.last_error
        if cause is not None:
            return UnavailableError(f"cannot reach {self.where}: {cause.message}")
        return UnavailableError(f"the connection to {self.where} ended: {why}")

    def _failed(self, name: str, error: BaseException) -> None:
        get_logger("rpc").error("Connection task failed", task=name, exc_info=error)


@lru_cache(maxsize=64)
def _timeout_field(text: str) -> bytes:
    """Return the field of a deadline; most calls of a program have one of a few."""
    return hpack.encode([("grpc-timeout", text)])


def unix_channel(path: str, max_response_bytes: int) -> Channel:
    """Return a channel to a unix socket."""
    return H2Channel(path, "localhost", max_response_bytes)


async def dialed_channel(dialer: Dialer, max_response_bytes: int) -> Channel:
    """Return a channel through a dialer."""
    where = f"{dialer.address}:{dialer.port}"
    return H2Channel(where, where, max_response_bytes, dialer)
