"""One call being made: what is sent, what is answered and how it ends."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from typing_extensions import override

from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.rpc.h2 import wire
from spire_hw.rpc.h2.frames import Code
from spire_hw.rpc.h2.stream import Carrier, Fault, Stream, StreamEndedError
from spire_hw.rpc.status import DETAILS_KEY, from_code

if TYPE_CHECKING:
    from spire_hw.rpc.h2.hpack import Block

_OK: Final = "200"
# What a reset says, where it says more than that something broke.
_RESETS: Final = {
    Code.REFUSED_STREAM: ErrorKind.UNAVAILABLE,
    Code.CANCEL: ErrorKind.CANCELLED,
    Code.ENHANCE_YOUR_CALM: ErrorKind.RESOURCE_EXHAUSTED,
    Code.INADEQUATE_SECURITY: ErrorKind.PERMISSION_DENIED,
}
# What an answer that is not gRPC's says; the gRPC specification's table.
_HTTP: Final = {
    "400": ErrorKind.INTERNAL,
    "401": ErrorKind.UNAUTHENTICATED,
    "403": ErrorKind.PERMISSION_DENIED,
    "404": ErrorKind.UNIMPLEMENTED,
    "429": ErrorKind.UNAVAILABLE,
    "502": ErrorKind.UNAVAILABLE,
    "503": ErrorKind.UNAVAILABLE,
    "504": ErrorKind.UNAVAILABLE,
}


class ClientCarrier(Carrier, Protocol):
    """What it needs of its connection; see `client.ClientConnection`."""

    def lost(self) -> SpireHwError:
        """Return what calls are told whose connection is gone."""
        ...

    def suspect(self) -> None:
        """See whether anybody is there at all."""
        ...


class ClientStream(Stream):
    """One call; the engine's `RawCall`."""

    __slots__ = ("_answered", "_failure", "_messages", "_more", "_over", "_timer", "is_unprocessed")
    connection: ClientCarrier

    def __init__(
        self, connection: ClientCarrier, number: int, limit: int, timeout_s: float | None
    ) -> None:
        super().__init__(connection, number, limit)
        self._messages: deque[bytes] = deque()
        self._more: asyncio.Future[None] | None = None
        self._failure: SpireHwError | None = None
        self._answered = False
        self._over = False
        self.is_unprocessed = False
        self._timer: asyncio.TimerHandle | None = None
        if timeout_s is not None:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire)

    # What the connection tells.

    @override
    def on_headers(self, block: Block, *, end: bool) -> None:
        fields = dict(reversed(block.fields))
        if block.malformed:
            self._end(SpireHwError("malformed headers", kind=ErrorKind.INTERNAL))
            return
        if not self._answered:
            status = fields.get(":status", "")
            if status.startswith("1") and not end:
                self.connection.spend()
                return
            self._answered = True
            if status != _OK or not wire.is_content_type(fields.get("content-type", "")):
                self._end(_not_grpc(status, fields))
                return
        elif not end:
            self._end(SpireHwError("headers in the middle of an answer", kind=ErrorKind.INTERNAL))
            return
        if end:
            self.recv_ended = True
            self._finish(fields)

    def _finish(self, fields: dict[str, str]) -> None:
        code = fields.get("grpc-status", "")
        if code == "0" and not self._assembler.pending:
            self._end(None)
        elif not code.isascii() or not code.isdecimal():
            self._end(SpireHwError("the answer has no status", kind=ErrorKind.UNKNOWN))
        elif code == "0":
            self._end(SpireHwError("the answer is cut short", kind=ErrorKind.INTERNAL))
        else:
            details = wire.parse_binary(fields.get(DETAILS_KEY, ""))
            message = wire.parse_message(fields.get("grpc-message", ""))
            self._end(from_code(int(code[:4]), message, details))

    @override
    def on_message(self, message: bytes) -> None:
        if not self._answered:
            raise Fault(Code.PROTOCOL_ERROR, "data before headers")
        self._messages.append(message)
        self._tell()

    @override
    def on_end(self) -> None:
        self._end(SpireHwError("the answer has no status", kind=ErrorKind.UNKNOWN))

    @override
    def on_reset(self, code: Code) -> None:
        if self.connection.is_closed:
            self._end(self.connection.lost())
            return
        self.is_unprocessed = code is Code.REFUSED_STREAM and not self._answered
        kind = _RESETS.get(code, ErrorKind.INTERNAL)
        self._end(from_code(kind.value, f"the server ended the call ({code.name})"))

    @override
    def refuse(self, error: SpireHwError) -> None:
        self._end(error)

    def not_processed(self) -> None:
        """The server goes away and has not looked at this call."""
        self.is_unprocessed = not self._answered
        self._end(UnavailableError("the server is going away"))

    def _expire(self) -> None:
        self.connection.suspect()
        self._end(SpireHwError("deadline exceeded", kind=ErrorKind.DEADLINE_EXCEEDED))

    def _end(self, failure: SpireHwError | None) -> None:
        """Note how the call ended."""
        if self._over:
            return
        self._over = True
        self._failure = failure
        if self._timer is not None:
            self._timer.cancel()
        if not (self.recv_ended and self.send_ended):
            # Without an error too: the server has said all, what we still have is of no use.
            self.connection.reset(self, Code.CANCEL if failure else Code.NO_ERROR)
        else:
            self.connection.drop(self)
        self._tell()

    def _tell(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    # What the caller does.

    async def send(self, message: bytes, *, end: bool = False) -> None:
        """Send a message; see `RawCall`."""
        try:
            await self.send_message(wire.pack(message), end=end)
        except StreamEndedError:
            if self._failure is not None:
                raise self._failure from None

    async def done_sending(self) -> None:
        """Say that no more messages come."""
        if not self._over and not self.send_ended:
            await self.send_message(b"", end=True)
        elif self._failure is not None:
            raise self._failure

    async def receive(self) -> bytes | None:
        """Return the next message; see `RawCall`."""
        while not self._messages:
            if self._over:
                if self._failure is not None:
                    raise self._failure
                return None
            self._more = asyncio.get_running_loop().create_future()
            try:
                await self._more
            finally:
                self._more = None
        message = self._messages.popleft()
        self.take_up(message)
        return message

    def cancel(self) -> None:
        """Let go of the call."""
        self._end(SpireHwError("cancelled", kind=ErrorKind.CANCELLED))


def _not_grpc(status: str, fields: dict[str, str]) -> SpireHwError:
    """Return the error of an answer that is not gRPC's."""
    kind = ErrorKind.UNKNOWN if status == _OK else _HTTP.get(status, ErrorKind.UNKNOWN)
    shown = fields.get("content-type", "no content type")[:64]
    return from_code(kind.value, f"the server does not answer as gRPC does: {status[:8]} {shown!a}")
