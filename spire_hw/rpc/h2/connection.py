"""One HTTP/2 connection: frames, windows, settings, pings and the end; the same for both sides.

It stands where a half of the transport hands on plain bytes, and holds the peer to what gRPC needs:
no push, no padding games, bounded header blocks, a budget for frames that only cost us work.

Source: RFC 9113.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from spire_hw.errors import InvalidInputError, LimitError, SpireHwError
from spire_hw.rpc.h2 import frames
from spire_hw.rpc.h2.frames import Code
from spire_hw.rpc.h2.hpack import MAX_BLOCK_BYTES, Block, Decoder
from spire_hw.rpc.h2.wire import Assembler

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.transport.relay import Half

_MAX_BLOCK_FRAMES: Final = 16
_MAX_EMPTY_DATA: Final = 100
_BURST: Final = 1_000.0
_REFILL_PER_S: Final = 100.0
_MAX_UNSENT_BYTES: Final = 4 * 1024 * 1024
_RESET_COST: Final = 2.0
_EARNED: Final = 10.0
_GOAWAY_BYTES: Final = 8


class Fault(Exception):  # noqa: N818 - a peer's fault, not an error of ours
    """The peer broke the protocol; the connection ends."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class StreamEndedError(Exception):
    """The stream is over; what is to be said about it was said elsewhere."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How much a peer may send ahead of its reader.

    Attributes:
        stream: bytes per stream.
        connection: bytes on all streams together.
        held: bytes of incomplete messages on all streams together.
    """

    stream: int
    connection: int
    held: int


class Stream(ABC):
    """One call on a connection."""

    __slots__ = (
        "_assembler",
        "_credit",
        "_empty",
        "_waiter",
        "connection",
        "id",
        "recv_ended",
        "recv_window",
        "send_ended",
        "send_window",
        "unread",
    )

    def __init__(self, connection: Connection, number: int, max_message_bytes: int) -> None:
        self.connection = connection
        self.id = number
        self.recv_ended = False
        self.send_ended = False
        self.recv_window = connection.windows.stream
        self.send_window = connection.peer_window
        self.unread = 0  # bytes of messages nobody has taken yet
        self._assembler = Assembler(max_message_bytes)
        self._credit = 0  # bytes taken and not yet told the peer
        self._empty = 0
        self._waiter: asyncio.Future[None] | None = None

    @abstractmethod
    def on_headers(self, block: Block, *, end: bool) -> None:
        """Take a header block."""

    @abstractmethod
    def on_message(self, message: bytes) -> None:
        """Take a message."""

    @abstractmethod
    def on_end(self) -> None:
        """Take the end of what the peer sends."""

    @abstractmethod
    def on_reset(self, code: Code) -> None:
        """Take the peer's RST_STREAM, or the end of the connection; the stream is gone already."""

    @abstractmethod
    def refuse(self, error: SpireHwError) -> None:
        """End the stream over what the peer sent."""

    def on_data(self, data: bytes, size: int, *, end: bool) -> None:
        """Take the payload of a DATA frame, which counts as `size` bytes."""
        if self.recv_ended:
            self.connection.reset(self, Code.STREAM_CLOSED)
            return
        self.recv_window -= size
        if self.recv_window < 0:
            raise Fault(Code.FLOW_CONTROL_ERROR, "more data than the stream's window")
        if not data and not end:
            self._empty += 1
            if self._empty > _MAX_EMPTY_DATA:
                raise Fault(Code.ENHANCE_YOUR_CALM, "too many empty frames")
        before = self._assembler.pending
        try:
            messages = self._assembler.take(data) if data else ()
        except SpireHwError as e:
            self.connection.held -= before
            self.refuse(e)
            return
        self.connection.held += self._assembler.pending - before
        if self.connection.held > self.connection.windows.held:
            self.refuse(LimitError("too much unfinished data on this connection"))
            return
        self._credit += size
        for message in messages:
            self.on_message(message)
        if end:
            self.recv_ended = True
            if self._assembler.pending:
                self.refuse(InvalidInputError("the stream ends in the middle of a message"))
                return
            self.on_end()
            self.connection.settle(self)
        else:
            self.give_credit()

    def give_credit(self) -> None:
        """Let the peer send more, when the reader keeps up."""
        whole = self.connection.windows.stream
        if self._credit * 2 >= whole and self.unread < whole and not self.recv_ended:
            self.connection.write(frames.window_update(self.id, self._credit))
            self.recv_window += self._credit
            self._credit = 0

    def forget(self) -> None:
        """Give back what the stream holds; called once, when it leaves its connection."""
        self.connection.held -= self._assembler.pending

    async def send_message(self, packed: bytes, *, end: bool = False) -> None:
        """Send DATA frames, as the windows allow.

        Raises:
            StreamEndedError: the stream was reset or its connection lost.
        """
        connection = self.connection
        at, size = 0, len(packed)
        while True:
            if self.send_ended:
                raise StreamEndedError
            step = min(
                size - at, self.send_window, connection.send_window, connection.peer_max_frame
            )
            if connection.is_paused or (step <= 0 and at < size):
                await self._room()
                continue
            last = at + step == size
            if last and end:
                self.send_ended = True
            connection.write_data(self, packed[at : at + step], end=last and end)
            at += step
            if last:
                if end:
                    connection.settle(self)
                return

    async def _room(self) -> None:
        """Wait until something may be sent."""
        self._waiter = asyncio.get_running_loop().create_future()
        self.connection.blocked[self] = None
        try:
            await self._waiter
        finally:
            self._waiter = None
            self.connection.blocked.pop(self, None)

    def wake(self) -> None:
        """Look again at what may be sent."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Connection(ABC):
    """What both sides of a connection have in common; `send` takes what the peer sent."""

    def __init__(
        self, half: Half, windows: Windows, own_settings: dict[int, int], preface: bytes
    ) -> None:
        """Take over a half.

        Args:
            half: the proved connection; it is led here by the caller.
            windows: what the peer may send ahead.
            own_settings: what we tell the peer.
            preface: bytes the peer sends before its first frame.
        """
        self._half = half
        self.windows = windows
        self.streams: dict[int, Stream] = {}
        self.blocked: dict[Stream, None] = {}
        self.held = 0
        self.last_stream = 0  # the highest number the peer opened
        self.send_window = frames.DEFAULT_WINDOW
        self.peer_window = frames.DEFAULT_WINDOW
        self.peer_max_frame = frames.MAX_FRAME_BYTES
        self.is_paused = False
        self.is_closed = False
        self.is_draining = False
        self.heard_at = asyncio.get_running_loop().time()
        self._recv_window = windows.connection
        self._credit = 0
        self._settled = False
        self._rest = b""
        self._skip = len(preface)
        self._decoder = Decoder()
        self._block: bytearray | None = None
        self._block_head = (0, 0)
        self._block_frames = 0
        self._out: list[bytes] = []
        self._flushing = False
        self._budget = _BURST
        self._budget_at = self.heard_at
        self._ping = b""
        self._on_pong: asyncio.Future[None] | None = None
        self.why = ""
        self.write(frames.settings({frames.INITIAL_WINDOW_SIZE: windows.stream, **own_settings}))
        if windows.connection > frames.DEFAULT_WINDOW:
            self.write(frames.window_update(0, windows.connection - frames.DEFAULT_WINDOW))

    # What a side has to say.

    @abstractmethod
    def on_headers(self, number: int, block: Block, *, end: bool) -> None:
        """Take a header block of a stream that is not open."""

    @abstractmethod
    def is_idle_stream(self, number: int) -> bool:
        """Tell whether a stream was never opened."""

    @abstractmethod
    def on_goaway(self, last: int, code: Code) -> None:
        """Take the peer's wish to end."""

    @abstractmethod
    def on_dropped(self) -> None:
        """Take note that a stream is gone."""

    @abstractmethod
    def on_closed(self) -> None:
        """Take note of the end; called once, all streams are told already."""

    @abstractmethod
    def on_limit(self, max_streams: int) -> None:
        """Take the peer's limit of concurrent streams."""

    # The transport's half calls these.

    def send(self, data: bytes) -> None:
        """Take plain bytes from the peer."""
        if self.is_closed:
            return
        if self._skip:  # the preface was looked at by the front
            cut = min(self._skip, len(data))
            self._skip -= cut
            data = data[cut:]
        self.heard_at = asyncio.get_running_loop().time()
        try:
            self._take(self._rest + data if self._rest else data)
        except Fault as e:
            self.fail(e.code, e.message)

    def end(self) -> None:
        """Take the end of the connection."""
        self._close("it was lost")

    def pause(self) -> None:
        """Stop sending: the peer does not read."""
        self.is_paused = True

    def resume(self) -> None:
        """Send on."""
        self.is_paused = False
        self._wake()

    # What streams and sides use.

    def write(self, data: bytes) -> None:
        """Send bytes soon, together with what else is written in this turn of the loop."""
        if self.is_closed:
            return
        self._out.append(data)
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Send what was written."""
        self._flushing = False
        if self._out:
            out, self._out = self._out, []
            self._half.send(out[0] if len(out) == 1 else b"".join(out))

    def write_data(self, stream: Stream, data: bytes, *, end: bool) -> None:
        """Send one DATA frame that fits the windows."""
        self.send_window -= len(data)
        stream.send_window -= len(data)
        self._budget = min(_BURST, self._budget + _EARNED)  # data is answered with pings, updates
        self.write(frames.frame(frames.DATA, frames.END_STREAM if end else 0, stream.id, data))

    def settle(self, stream: Stream) -> None:
        """Let go of a stream that both ends have ended."""
        if stream.send_ended and stream.recv_ended:
            self.drop(stream)

    def drop(self, stream: Stream) -> None:
        """Let go of a stream."""
        if self.streams.pop(stream.id, None) is not None:
            stream.forget()
            self.on_dropped()

    def reset(self, stream: Stream, code: Code) -> None:
        """End a stream at once and say so."""
        if self.streams.get(stream.id) is stream:
            self.write(frames.rst_stream(stream.id, code))
        stream.send_ended = stream.recv_ended = True
        stream.wake()
        self.drop(stream)

    def fail(self, code: Code, why: str) -> None:
        """End the connection over what the peer did."""
        if self.is_closed:
            return
        self.write(frames.goaway(self.last_stream, code, why))
        self._close(why)

    def close(self, why: str = "closed") -> None:
        """End the connection well."""
        if not self.is_closed:
            self.write(frames.goaway(self.last_stream, Code.NO_ERROR))
            self._close(why)

    def abort(self, why: str) -> None:
        """End the connection without another word."""
        self._close(why)
        self._half.abort()

    async def ping(self, timeout_s: float) -> bool:
        """Tell whether the peer answers a ping in time."""
        if self._on_pong is None:
            self._ping = os.urandom(frames.PING_BYTES)
            self._on_pong = asyncio.get_running_loop().create_future()
            self.write(frames.frame(frames.PING, 0, 0, self._ping))
        done, _ = await asyncio.wait([self._on_pong], timeout=timeout_s)
        return bool(done)

    # Frames.

    def _take(self, data: bytes) -> None:
        at, size = 0, len(data)
        while size - at >= frames.HEAD_BYTES:
            head, flags, number = frames.HEAD.unpack_from(data, at)
            length, kind = head >> 8, head & 0xFF
            if length > frames.MAX_FRAME_BYTES:
                raise Fault(Code.FRAME_SIZE_ERROR, "a frame is too large")
            body = at + frames.HEAD_BYTES
            end = body + length
            if end > size:
                break
            self._frame(kind, flags, number & frames.ID_MASK, data[body:end])
            if self.is_closed:
                return
            at = end
        self._rest = data[at:]

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if not self._settled:
            if kind != frames.SETTINGS or flags & frames.ACK:
                raise Fault(Code.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            self._settled = True
        if self._block is not None and kind != frames.CONTINUATION:
            raise Fault(Code.PROTOCOL_ERROR, "a header block is interrupted")
        if kind < len(self._takers):
            self._takers[kind](self, flags, number, payload)
        else:
            self.spend()  # an extension nobody asked for

    def _priority(self, _flags: int, _number: int, _payload: bytes) -> None:
        self.spend()

    def _push_promise(self, _flags: int, _number: int, _payload: bytes) -> None:
        raise Fault(Code.PROTOCOL_ERROR, "pushed streams are not accepted")

    def _goaway(self, _flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) < _GOAWAY_BYTES:
            raise Fault(Code.PROTOCOL_ERROR, "GOAWAY is malformed")
        last = frames.u32(payload) & frames.ID_MASK
        self.on_goaway(last, frames.code_of(frames.u32(payload, 4)))

    def spend(self, cost: float = 1.0) -> None:
        """Count a frame that brings no call on."""
        self._budget -= cost
        if self._budget < 0:
            now = self.heard_at
            self._budget = min(_BURST, self._budget + (now - self._budget_at) * _REFILL_PER_S)
            self._budget_at = now
            if self._budget < 0:
                raise Fault(Code.ENHANCE_YOUR_CALM, "too many frames that carry nothing")

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        self._recv_window -= size
        if self._recv_window < 0:
            raise Fault(Code.FLOW_CONTROL_ERROR, "more data than the connection's window")
        self._credit += size
        if self._credit * 2 >= self.windows.connection:
            self.write(frames.window_update(0, self._credit))
            self._recv_window += self._credit
            self._credit = 0
        if flags & frames.PADDED:
            if not payload or payload[0] >= size:
                raise Fault(Code.PROTOCOL_ERROR, "a frame is padded wrongly")
            payload = payload[1 : size - payload[0]]
        stream = self.streams.get(number)
        if stream is not None:
            stream.on_data(payload, size, end=bool(flags & frames.END_STREAM))
            return
        if self.is_idle_stream(number):
            raise Fault(Code.PROTOCOL_ERROR, "data on a stream that was never opened")
        self.spend(0.1)  # of a stream that we have ended: what was under way

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        if number == 0:
            raise Fault(Code.PROTOCOL_ERROR, "headers without a stream")
        if flags & frames.PADDED:
            raise Fault(Code.PROTOCOL_ERROR, "padded headers are not accepted")
        if flags & frames.WITH_PRIORITY:
            if len(payload) < 5:  # noqa: PLR2004 - stream and weight
                raise Fault(Code.FRAME_SIZE_ERROR, "headers are cut short")
            payload = payload[5:]
        if flags & frames.END_HEADERS:
            self._block_done(number, payload, flags)
        else:
            self._block = bytearray(payload)
            self._block_head = (number, flags)
            self._block_frames = 1

    def _continuation(self, flags: int, number: int, payload: bytes) -> None:
        if self._block is None or number != self._block_head[0]:
            raise Fault(Code.PROTOCOL_ERROR, "a continuation of nothing")
        self._block += payload
        self._block_frames += 1
        if len(self._block) > MAX_BLOCK_BYTES or self._block_frames > _MAX_BLOCK_FRAMES:
            raise Fault(Code.ENHANCE_YOUR_CALM, "a header block is too large")
        if flags & frames.END_HEADERS:
            block, self._block = bytes(self._block), None
            self._block_done(number, block, self._block_head[1])

    def _block_done(self, number: int, raw: bytes, flags: int) -> None:
        try:
            block = self._decoder.decode(raw)
        except LimitError as e:
            raise Fault(Code.ENHANCE_YOUR_CALM, e.message) from e
        except InvalidInputError as e:
            raise Fault(Code.COMPRESSION_ERROR, e.message) from e
        end = bool(flags & frames.END_STREAM)
        stream = self.streams.get(number)
        if stream is None:
            self.on_headers(number, block, end=end)
        else:
            stream.on_headers(block, end=end)

    def _window_update(self, _flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 4:  # noqa: PLR2004 - one number
            raise Fault(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE is malformed")
        increment = frames.u32(payload) & frames.ID_MASK
        self.spend(0.2)
        if number == 0:
            self.send_window += increment
            if increment == 0 or self.send_window > frames.MAX_WINDOW:
                raise Fault(Code.FLOW_CONTROL_ERROR, "a window is out of range")
            self._wake()
            return
        stream = self.streams.get(number)
        if stream is None:
            if self.is_idle_stream(number):
                raise Fault(Code.PROTOCOL_ERROR, "a window of a stream that was never opened")
            return
        stream.send_window += increment
        if increment == 0 or stream.send_window > frames.MAX_WINDOW:
            self.reset(stream, Code.FLOW_CONTROL_ERROR)
            stream.on_reset(Code.FLOW_CONTROL_ERROR)
            return
        stream.wake()

    def _rst_stream(self, _flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 4 or self.is_idle_stream(number):  # noqa: PLR2004 - one number
            raise Fault(Code.PROTOCOL_ERROR, "RST_STREAM is malformed")
        self.spend(_RESET_COST)
        stream = self.streams.get(number)
        if stream is None:
            return
        stream.send_ended = stream.recv_ended = True
        self.drop(stream)
        stream.wake()
        stream.on_reset(frames.code_of(frames.u32(payload)))

    def _pinged(self, flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) != frames.PING_BYTES:
            raise Fault(Code.PROTOCOL_ERROR, "PING is malformed")
        if not flags & frames.ACK:
            self.spend()
            self._answer(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif self._on_pong is not None and payload == self._ping:
            if not self._on_pong.done():
                self._on_pong.set_result(None)
            self._on_pong = None

    def _answer(self, data: bytes) -> None:
        """Write what the peer asked for; one that asks and does not read is cut."""
        if self.is_paused and sum(map(len, self._out)) > _MAX_UNSENT_BYTES:
            raise Fault(Code.ENHANCE_YOUR_CALM, "answers are not read")
        self.write(data)

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) % frames.SETTING_BYTES:
            raise Fault(Code.PROTOCOL_ERROR, "SETTINGS is malformed")
        if flags & frames.ACK:
            return
        self.spend(1.0 + len(payload) / frames.SETTING_BYTES / 10)
        for key, value in frames.take_settings(payload):
            self._setting(key, value)
        self._answer(frames.frame(frames.SETTINGS, frames.ACK, 0))

    def _setting(self, key: int, value: int) -> None:
        if key == frames.INITIAL_WINDOW_SIZE:
            for stream in self.streams.values():
                stream.send_window += value - self.peer_window
                if stream.send_window > frames.MAX_WINDOW:
                    raise Fault(Code.FLOW_CONTROL_ERROR, "a window is out of range")
            if value > frames.MAX_WINDOW:
                raise Fault(Code.FLOW_CONTROL_ERROR, "a window is out of range")
            self.peer_window = value
            self._wake()
        elif key == frames.MAX_FRAME_SIZE:
            if not frames.MAX_FRAME_BYTES <= value < 1 << 24:
                raise Fault(Code.PROTOCOL_ERROR, "a frame size is out of range")
            self.peer_max_frame = min(value, 4 * frames.MAX_FRAME_BYTES)
        elif key == frames.MAX_CONCURRENT_STREAMS:
            self.on_limit(value)
        elif key == frames.ENABLE_PUSH and value > 1:
            raise Fault(Code.PROTOCOL_ERROR, "a setting is out of range")

    _takers: ClassVar[tuple[Callable[[Connection, int, int, bytes], None], ...]] = (  # by kind
        _data,
        _headers,
        _priority,
        _rst_stream,
        _settings,
        _push_promise,
        _pinged,
        _goaway,
        _window_update,
        _continuation,
    )

    # The end.

    def _wake(self) -> None:
        if not self.is_paused:
            for stream in list(self.blocked):
                stream.wake()

    def _close(self, why: str) -> None:
        if self.is_closed:
            return
        self.flush()
        self.is_closed = True
        self.why = why
        self._rest = b""
        streams = list(self.streams.values())
        for stream in streams:
            stream.send_ended = stream.recv_ended = True
            self.drop(stream)
            stream.wake()
            stream.on_reset(Code.CANCEL)
        if self._on_pong is not None:
            self._on_pong.cancel()
            self._on_pong = None
        self._half.end()
        self.on_closed()
