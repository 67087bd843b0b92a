"""The serving end: streams become calls of bound methods."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import ErrorKind, LimitError, SpireHwError, UnavailableError
from spire_hw.rpc.h2 import frames, hpack, wire
from spire_hw.rpc.h2.connection import Connection
from spire_hw.rpc.h2.frames import Code
from spire_hw.rpc.h2.limits import Pool, Windows
from spire_hw.rpc.h2.request import HttpError, Request, parse
from spire_hw.rpc.h2.serverstream import ServerStream
from spire_hw.rpc.h2.stream import Fault
from spire_hw.rpc.status import to_wire
from spire_hw.transport.half import PREFACE
from spire_hw.transport.peer import TcpPeer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.log import Logger
    from spire_hw.rpc.endpoint import Endpoint, RpcLimits
    from spire_hw.rpc.h2.hpack import Block, Field
    from spire_hw.transport.half import Half
    from spire_hw.transport.peer import Peer

_WINDOWS: Final = Windows(stream=64 * 1024, connection=1024 * 1024, held=16 * 1024 * 1024)
_DRAIN_WAIT_S: Final = 1.0
_CLOSE_S: Final = 2.0
_AGE_SPREAD: Final = 0.1


class ServerConnection(Connection):
    """A caller's connection."""

    is_patient = True

    def __init__(self, half: Half, peer: Peer, engine: H2Engine) -> None:
        limits = engine.limits
        stranger = isinstance(peer, TcpPeer) and peer.spiffe_id is None
        self._max_streams = limits.max_stranger_streams if stranger else limits.max_streams
        own = {
            frames.MAX_CONCURRENT_STREAMS: self._max_streams,
            frames.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
        }
        pool = engine.strangers if stranger else engine.known
        super().__init__(half, _WINDOWS, pool, own, skip=len(PREFACE))
        self.peer = peer
        self.engine = engine
        self.limits = limits
        self.tasks = engine.tasks
        self._highest = 0  # number a client used, for a call that was refused as well
        self._lingering = 0
        self._last_block: Block | None = None
        self._last_request: Request | None = None
        self._draining = False
        self._opened_at = self._quiet_since = self.heard_at
        spread = 1 + _AGE_SPREAD * ((id(self) >> 6) % 21 - 10) / 10  # not all at once
        self._max_age_s = (
            None if limits.max_connection_age_s is None else limits.max_connection_age_s * spread
        )
        self._timer: asyncio.TimerHandle | None = None
        self._watch()

    # Calls.

    @override
    def on_headers(self, number: int, block: Block, *, end: bool) -> None:
        if number % 2 == 0:
            raise Fault(Code.PROTOCOL_ERROR, "a stream number of a client is odd")
        if number <= self._highest:  # trailers of a call that is over
            self.spend()
            return
        self._highest = number
        if self._draining:  # GOAWAY has told the last one we take
            self.spend(2.0)
            self.write(frames.rst_stream(number, Code.REFUSED_STREAM))
            return
        self.last_stream = number
        if len(self.streams) + self._lingering >= self._max_streams:
            self.spend(2.0)
            self.write(frames.rst_stream(number, Code.REFUSED_STREAM))
            return
        engine = self.engine
        try:
            stream = ServerStream(self, number, *self._accept(block))
        except HttpError as e:
            self._refuse(number, [(":status", e.status)], end=end)
            return
        except SpireHwError as e:
            status = to_wire(e)
            self._refuse(
                number,
                [
                    (":status", "200"),
                    ("content-type", wire.CONTENT_TYPE),
                    ("grpc-status", str(status.code)),
                    ("grpc-message", wire.encode_message(status.message)),
                ],
                end=end,
            )
            return
        except ValueError:  # after SpireHwError: some of those are ValueErrors too
            self.spend()
            self.write(frames.rst_stream(number, Code.PROTOCOL_ERROR))
            return
        self.streams[number] = stream
        engine.calls += 1
        if end:
            stream.on_data(b"", 0, end=True)

    def _accept(self, block: Block) -> tuple[Request, Endpoint]:
        limits = self.limits
        if block.size > limits.max_header_bytes:
            raise LimitError(f"the headers are larger than {limits.max_header_bytes} bytes")
        if block is self._last_block and self._last_request is not None:
            request = self._last_request
        else:
            if block.malformed:
                raise ValueError("not a request of HTTP/2")
            request = parse(block.fields)
            self._last_block, self._last_request = block, request
        endpoint = self.engine.endpoints.get(request.path)
        if endpoint is None:
            raise SpireHwError("there is no such method", kind=ErrorKind.UNIMPLEMENTED)
        if limits.max_calls is not None and self.engine.calls >= limits.max_calls:
            raise LimitError("too many calls at once; try again later")
        if request.timeout_s is not None and request.timeout_s <= 0:
            raise SpireHwError("deadline exceeded", kind=ErrorKind.DEADLINE_EXCEEDED)
        return request, endpoint

    def _refuse(self, number: int, fields: list[Field], *, end: bool) -> None:
        self.spend()
        self.write_headers(number, hpack.encode(fields), end=True)
        if not end:
            self.write(frames.rst_stream(number, Code.NO_ERROR))

    def linger(self, task: asyncio.Task[None]) -> None:
        """Count a handler whose call is over until it has ended: it takes a call's place."""
        self._lingering += 1
        task.add_done_callback(self._gone)

    def _gone(self, _task: asyncio.Task[None]) -> None:
        self._lingering -= 1

    @override
    def is_idle_stream(self, number: int) -> bool:
        return number > self._highest or number % 2 == 0

    @override
    def on_dropped(self) -> None:
        self.engine.calls -= 1
        if not self.streams:
            self._quiet_since = _now()
            if self._draining:
                self.close()

    @override
    def on_limit(self, max_streams: int) -> None:
        """We open no streams."""

    @override
    def on_settings(self) -> None:
        """Nothing waits for them."""

    @override
    def on_goaway(self, last: int, code: Code) -> None:
        """The client opens no more streams; its end of the connection follows."""

    @override
    def on_closed(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.engine.gone(self)

    # Its age.

    def drain(self, *, at_once: bool) -> None:
        """Ask the client to leave: calls in progress go on."""
        if self.is_closed or self._draining:
            return
        if not at_once:  # first a warning: calls may be under way
            self.write(frames.goaway(frames.MAX_WINDOW, Code.NO_ERROR))
            asyncio.get_running_loop().call_later(_DRAIN_WAIT_S, lambda: self.drain(at_once=True))
            return
        self._draining = True
        if self.streams:
            self.write(frames.goaway(self.last_stream, Code.NO_ERROR))
        else:
            self.close()

    def _watch(self) -> None:
        """Set the timer for whatever is due next."""
        limits = self.limits
        now = _now()
        due = []
        if self._max_age_s is not None:
            due.append(self._opened_at + self._max_age_s)
        if limits.max_connection_idle_s is not None:
            quiet = now if self.streams else self._quiet_since
            due.append(quiet + limits.max_connection_idle_s)
        if limits.keepalive_s is not None:
            due.append(self.heard_at + limits.keepalive_s)
        if due:
            wait = max(min(due) - now, 0.01)
            self._timer = asyncio.get_running_loop().call_later(wait, self._look)

    def _look(self) -> None:
        """See what is due."""
        limits = self.limits
        now = _now()
        if self._max_age_s is not None and now >= self._opened_at + self._max_age_s:
            self.drain(at_once=False)
            self._timer = asyncio.get_running_loop().call_later(
                limits.max_connection_age_grace_s, lambda: self.abort("too old")
            )
            return
        idle_s = limits.max_connection_idle_s
        if idle_s is not None and not self.streams and now >= self._quiet_since + idle_s:
            self.drain(at_once=False)
            self._timer = None
            return
        if limits.keepalive_s is not None and now >= self.heard_at + limits.keepalive_s:
            self.tasks.start("keepalive", self._check_alive(limits.keepalive_timeout_s))
            return
        self._watch()

    async def _check_alive(self, timeout_s: float) -> None:
        if await self.ping(timeout_s):
            self._watch()
        else:
            self.abort("the client does not answer")


class H2Engine:
    """Serves calls on the connections that fronts hand over.

    Attributes:
        endpoints: what is served, by path.
        limits: see `RpcLimits`.
        calls: in progress.
        known, strangers: what the messages of proved callers, and of others, hold.
        tasks: of calls and connections.
    """

    descriptors = 0

    def __init__(self, endpoints: dict[str, Endpoint], limits: RpcLimits, log: Logger) -> None:
        self.endpoints = endpoints
        self.limits = limits
        self.calls = 0
        self.known = Pool(limits.max_held_bytes)
        self.strangers = Pool(limits.max_stranger_held_bytes)
        self.tasks = Tasks(self._failed)
        self._log = log
        self._connections: dict[ServerConnection, None] = {}
        self._emptied: asyncio.Future[None] | None = None
        self._stopping = False

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[Peer]:
        return iter([connection.peer for connection in self._connections])

    async def start(self) -> None:
        """Be ready for connections."""

    async def attach(self, outer: Half, peer: Peer) -> None:
        """Serve a connection.

        Raises:
            UnavailableError: it went away, or no more are taken.
        """
        if outer.transport is None or outer.transport.is_closing():
            raise UnavailableError("the caller went away")
        if self._stopping:
            raise UnavailableError("the server is stopping")
        connection = ServerConnection(outer, peer, self)
        self._connections[connection] = None
        outer.lead(connection)

    def gone(self, connection: ServerConnection) -> None:
        """Forget a connection."""
        self._connections.pop(connection, None)
        if not self._connections and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    async def stop(self, grace_s: float) -> None:
        """Ask clients to leave, let calls finish for a while, then cut the rest."""
        self._stopping = True
        for connection in list(self._connections):
            connection.drain(at_once=True)
        if self._connections and grace_s > 0:
            self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._emptied], timeout=grace_s)
        for connection in list(self._connections):
            connection.close()
        left = await self.tasks.close(_CLOSE_S)
        if left:
            self._log.error("Calls do not end", tasks=", ".join(sorted(left)))

    def _failed(self, name: str, error: BaseException) -> None:
        self._log.error("Connection task failed", task=name, error=str(error), exc_info=error)


def build(endpoints: dict[str, Endpoint], limits: RpcLimits, log: Logger) -> H2Engine:
    """Return an engine."""
    return H2Engine(endpoints, limits, log)


def _now() -> float:
    return asyncio.get_running_loop().time()
