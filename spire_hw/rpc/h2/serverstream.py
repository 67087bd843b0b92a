"""One call being served: its requests, its handler, its answers and how it ends."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from typing_extensions import override

from spire_hw.errors import ErrorKind, InvalidInputError, LimitError, SpireHwError, UnavailableError
from spire_hw.rpc.h2 import hpack, wire
from spire_hw.rpc.h2.frames import Code
from spire_hw.rpc.h2.stream import Carrier, Stream, StreamEndedError
from spire_hw.rpc.service import no_reply
from spire_hw.rpc.status import WireStatus, to_wire

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from spire_hw.aio.tasks import Tasks
    from spire_hw.rpc.endpoint import Endpoint, RpcLimits
    from spire_hw.rpc.h2.hpack import Block, Field
    from spire_hw.rpc.h2.request import Request
    from spire_hw.rpc.service import Response
    from spire_hw.transport.peer import Peer

_OK_BLOCK: Final = hpack.encode([(":status", "200"), ("content-type", wire.CONTENT_TYPE)])
_END_BLOCK: Final = hpack.encode([("grpc-status", "0")])


class ServerCarrier(Carrier, Protocol):
    """What it needs of its connection; see `server.ServerConnection`."""

    peer: Peer
    limits: RpcLimits
    tasks: Tasks

    def linger(self, task: asyncio.Task[None]) -> None:
        """Count a handler whose call is over."""
        ...


class ServerStream(Stream):
    """One call being served."""

    __slots__ = (
        "_endpoint",
        "_headers_sent",
        "_messages",
        "_more",
        "_request",
        "_task",
        "_timer",
    )
    connection: ServerCarrier

    def __init__(
        self, connection: ServerCarrier, number: int, request: Request, endpoint: Endpoint
    ) -> None:
        super().__init__(connection, number, connection.limits.max_request_bytes)
        self._endpoint = endpoint
        self._request = request
        self._messages: deque[bytes] = deque()
        self._more: asyncio.Future[None] | None = None
        self._headers_sent = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if request.timeout_s is not None:
            self._timer = asyncio.get_running_loop().call_later(request.timeout_s, self._expire)
        if endpoint.client_streaming:
            self._start()

    def _start(self) -> None:
        self._task = self.connection.tasks.spawn("call", self._run())

    @override
    def on_headers(self, block: Block, *, end: bool) -> None:
        if self.recv_ended or not end:
            self.connection.break_off(self, Code.PROTOCOL_ERROR)
            return
        self.on_data(b"", 0, end=True)

    @override
    def on_message(self, message: bytes) -> None:
        if self.send_ended:
            return
        if not self._endpoint.client_streaming and self._messages:
            self.refuse(InvalidInputError("more than one request"))
            return
        self._messages.append(message)
        self._tell()

    @override
    def on_end(self) -> None:
        if self._endpoint.client_streaming:
            self._tell()
        elif self._messages:
            self._start()
        elif not self.send_ended:
            self.refuse(InvalidInputError("the request is missing"))

    @override
    def on_reset(self, code: Code) -> None:
        self._cancel()

    @override
    def refuse(self, error: SpireHwError) -> None:
        self._cancel()
        self.finish(to_wire(error))

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.cancel()
            self.connection.linger(task)

    def _expire(self) -> None:
        self.refuse(SpireHwError("deadline exceeded", kind=ErrorKind.DEADLINE_EXCEEDED))

    def _tell(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    async def _run(self) -> None:
        endpoint = self._endpoint
        call = None
        try:
            left = (
                None
                if self._timer is None
                else self._timer.when() - asyncio.get_running_loop().time()
            )
            request: Any
            call = endpoint.call(self.connection.peer, self._request.metadata, left)
            if endpoint.client_streaming:
                request = Requests(self)
            else:
                request = endpoint.decode(self._messages.popleft())
            if not endpoint.server_streaming:
                await self._answer(endpoint.encode(await endpoint.handler(request, call)))
                return
            call.reply = self._reply
            async with aclosing(endpoint.handler(request, call)) as responses:
                async for response in responses:
                    await self._send(endpoint.encode(response))
            self.finish(None)
        except StreamEndedError:
            return
        except asyncio.CancelledError:
            # Not the caller's doing when the stream still stands: what the handler waited for went.
            self.finish(to_wire(UnavailableError("the call was given up; try again")))
            raise
        except Exception as e:  # noqa: BLE001 - the edge: everything becomes a status
            self.finish(endpoint.status(e, call))
        finally:
            if call is not None:
                call.reply = no_reply  # who keeps a call does not keep its connection

    async def next_request(self) -> Any:
        """Return the next request of a stream of them.

        Raises:
            StopAsyncIteration: there are no more.
            InvalidInputError: it does not decode.
        """
        while not self._messages:
            if self.recv_ended:
                raise StopAsyncIteration
            self._more = asyncio.get_running_loop().create_future()
            await self._more
        raw = self._messages.popleft()
        self.take_up(raw)
        return self._endpoint.decode(raw)

    async def _answer(self, message: bytes) -> None:
        """Send the one response and the end, in one piece where that fits."""
        connection = self.connection
        packed = wire.pack(message)
        size = len(packed)
        limit = connection.limits.max_response_bytes
        if (
            connection.is_full
            or 0 <= limit < len(message)
            or size > self.send_window
            or size > connection.send_window
            or size > connection.peer_max_frame
        ):
            await self._send(message)
            self.finish(None)
            return
        if self.send_ended:
            return
        self._headers_sent = self.send_ended = True
        if self._timer is not None:
            self._timer.cancel()
        connection.write_answer(self, _OK_BLOCK, packed, _END_BLOCK)
        self._let_go()

    async def _reply(self, response: Response) -> None:
        try:
            await self._send(self._endpoint.encode(response))
        except StreamEndedError as e:
            raise UnavailableError("the caller went away") from e

    async def _send(self, message: bytes) -> None:
        limit = self.connection.limits.max_response_bytes
        if 0 <= limit < len(message):
            raise LimitError(f"the answer is larger than {limit} bytes")
        if self.send_ended:
            raise StreamEndedError
        self._open()
        await self.send_message(wire.pack(message))

    def _open(self) -> None:
        if not self._headers_sent:
            self._headers_sent = True
            self.connection.write_headers(self.id, _OK_BLOCK, end=False)

    def finish(self, status: WireStatus | None) -> None:
        """Say how the call ended, None for well, and let go of it."""
        if self.send_ended:
            return
        if self._timer is not None:
            self._timer.cancel()
        connection = self.connection
        if status is None:
            self._open()
            block = _END_BLOCK
        else:
            fields: list[Field] = []
            if not self._headers_sent:
                fields = [(":status", "200"), ("content-type", wire.CONTENT_TYPE)]
            fields.append(("grpc-status", str(status.code)))
            fields.append(("grpc-message", wire.encode_message(status.message)))
            fields += [(key, wire.encode_binary(value)) for key, value in status.trailing]
            block = hpack.encode(fields)
        connection.write_headers(self.id, block, end=True)
        self.send_ended = True
        self._let_go()

    def _let_go(self) -> None:
        if self.recv_ended:
            self.connection.drop(self)
        else:
            self.connection.reset(self, Code.NO_ERROR)


class Requests:
    """The requests of one call, for its handler."""

    __slots__ = ("_stream",)

    def __init__(self, stream: ServerStream) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[Any]:
        return self._stream.next_request()
