"""One HTTP/2 connection: frames, windows, settings, pings and the end; the same for both sides.

It stands where a half of the transport hands on plain bytes, and holds the peer to what gRPC needs:
no push, no padding games, bounded header blocks, a budget for frames that only cost us work.

Source: RFC 9113.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final

from spire_hw.errors import InvalidInputError, LimitError
from spire_hw.rpc.h2 import frames
from spire_hw.rpc.h2.frames import Code
from spire_hw.rpc.h2.hpack import MAX_BLOCK_BYTES, TABLE_BYTES, Block, Decoder
from spire_hw.rpc.h2.limits import Account, Budget
from spire_hw.rpc.h2.stream import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.rpc.h2.limits import Pool, Windows
    from spire_hw.rpc.h2.stream import Stream
    from spire_hw.transport.half import Half

_MAX_BLOCK_FRAMES: Final = 16
# A header block up to this size is ordinary; decoding a longer one costs.
_PLAIN_BLOCK_BYTES: Final = 4096
# What is said in one turn of the loop before the other connections have theirs.
_TURN_BYTES: Final = 128 * 1024
_MAX_UNSENT_BYTES: Final = 512 * 1024
# How long an answer may take that our settings go out with, and what they are: SETTINGS,
# WINDOW_UPDATE, and word that the peer's SETTINGS were read.
_PATIENCE_S: Final = 0.025
_OPENING_FRAMES: Final = 3
_RESET_COST: Final = 2.0
_EARNED: Final = 10.0
_GOAWAY_BYTES: Final = 8
# Table size 0: owed to a peer whose table is smaller than ours is at first (RFC 7541 section 4.2).
_NO_TABLE: Final = b"\x20"


class Connection(ABC):
    """What both sides of a connection have in common; `send` takes what the peer sent."""

    is_patient: ClassVar[bool] = False  # whether calls are answered here rather than made

    def __init__(
        self,
        half: Half,
        windows: Windows,
        pool: Pool,
        own_settings: dict[int, int],
        *,
        preface: bytes = b"",
        skip: int = 0,
    ) -> None:
        """Take over a half.

        Args:
            half: the proved connection; it is led here by the caller.
            windows: what the peer may send ahead.
            pool: what it shares with others of its kind.
            own_settings: what we tell the peer.
            preface: bytes we send before our first frame.
            skip: how many the peer sends before its own.
        """
        self._half = half
        self.windows = windows
        self.streams: dict[int, Stream] = {}
        self.blocked: dict[Stream, None] = {}
        self.account = Account(windows.held, pool)
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
        self._skip = skip
        self._decoder = Decoder()
        self._block: bytearray | None = None
        self._block_head = (0, 0)
        self._block_frames = 0
        self._out: list[bytes] = []
        self._unsent = 0  # bytes in it
        self._flushing = False
        self._is_hurried = False
        self._is_young = True
        self._patience: asyncio.TimerHandle | None = None
        self._prefix = b""
        self._budget = Budget(self.heard_at)
        self._ping = b""
        self._on_pong: asyncio.Future[None] | None = None
        self.why = ""
        if preface:
            self.write(preface)
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

    @abstractmethod
    def on_settings(self) -> None:
        """Take note that the peer has said its settings, the first or new ones."""

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

    @property
    def is_full(self) -> bool:
        """Tell whether DATA has to wait: the peer does not read, or others are to have a turn."""
        return self.is_paused or self._is_hurried

    def write(self, data: bytes) -> None:
        """Send bytes soon, together with what else is written in this turn of the loop."""
        if self.is_closed:
            return
        self._out.append(data)
        self._unsent += len(data)
        self._schedule()

    def _schedule(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._turn)
        if self._unsent >= _TURN_BYTES:  # the transport is to say whether it keeps up
            self._is_hurried = True
            self.flush()

    def write_headers(self, number: int, block: bytes, *, end: bool) -> None:
        """Send a header block."""
        if self._prefix:
            block, self._prefix = self._prefix + block, b""
        self.write(frames.headers(number, block, end=end))

    def write_data(self, stream: Stream, data: bytes, *, end: bool, earns: bool = True) -> None:
        """Send one DATA frame that fits the windows; `earns` when it is worth a peer's answer.

        The last one leaves at once when no other call could add to it.
        """
        self.send_window -= len(data)
        stream.send_window -= len(data)
        if earns:
            self._budget.earn(_EARNED)  # data is answered with pings and window updates
        self.write(frames.frame(frames.DATA, frames.END_STREAM if end else 0, stream.id, data))
        if end and len(self.streams) == 1 and not self._is_young:
            self.flush()

    def write_answer(self, stream: Stream, first: bytes, packed: bytes, last: bytes) -> None:
        """Send header block, one DATA frame that fits the windows, and trailers.

        At once when no other call could add to it.
        """
        self.send_window -= len(packed)
        self._budget.earn(_EARNED)
        if self._prefix:
            first, self._prefix = self._prefix + first, b""
        number = stream.id
        self._out += (
            frames.headers(number, first, end=False),
            frames.frame(frames.DATA, 0, number, packed),
            frames.headers(number, last, end=True),
        )
        self._unsent += len(packed)
        if self._flushing or len(self.streams) > 1:
            self._schedule()
        else:
            self.flush()

    def flush(self) -> None:
        """Send what was written; a peer that asks and asks, and reads nothing, is cut."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if not self._out:
            return
        out, self._out, self._unsent = self._out, [], 0
        self._half.send(out[0] if len(out) == 1 else b"".join(out))
        if self.is_paused and self._half.unsent > _MAX_UNSENT_BYTES:
            asyncio.get_running_loop().call_soon(self.abort, "it does not read its answers")

    def _turn(self) -> None:
        """End a turn of the loop."""
        if self._is_young:  # our settings go out with the first call, or the first answer
            self._is_young = False
            asyncio.get_running_loop().call_soon(self._first_turn)
            return
        self._flushing = False
        self.flush()
        if self._is_hurried:
            self._is_hurried = False
            self._wake()

    def _first_turn(self) -> None:
        """End the turn after the first: an answer that is soon made takes our settings along."""
        if self.is_patient and self.streams and len(self._out) <= _OPENING_FRAMES:
            self._flushing = False
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(_PATIENCE_S, self._turn)
        else:
            self._turn()

    def settle(self, stream: Stream) -> None:
        """Let go of a stream that both ends have ended."""
        if stream.send_ended and stream.recv_ended:
            self.drop(stream)

    def drop(self, stream: Stream) -> None:
        """Let go of a stream."""
        if self.streams.pop(stream.id, None) is not None:
            stream.forget()
            self.on_dropped()

    def break_off(self, stream: Stream, code: Code) -> None:
        """End a stream over what the peer did to it; doing it again and again ends the connection."""
        self.spend(_RESET_COST)
        self.reset(stream, code)
        stream.on_reset(code)

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
        if self.is_closed:
            return False
        if self._on_pong is None:
            self._ping = os.urandom(frames.PING_BYTES)
            self._on_pong = asyncio.get_running_loop().create_future()
            self.write(frames.frame(frames.PING, 0, 0, self._ping))
        done, _ = await asyncio.wait([self._on_pong], timeout=timeout_s)
        return bool(done) and not self.is_closed

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
        self.spend()
        last = frames.u32(payload) & frames.ID_MASK
        self.on_goaway(last, frames.code_of(frames.u32(payload, 4)))

    def spend(self, cost: float = 1.0) -> None:
        """Count a frame that brings no call on."""
        if not self._budget.spend(cost, self.heard_at):
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
            payload = _unpadded(payload)
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
            payload = _unpadded(payload)
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
        if len(raw) > _PLAIN_BLOCK_BYTES:
            self.spend(len(raw) / 1024)
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
            if increment == 0:
                raise Fault(Code.PROTOCOL_ERROR, "a window grows by nothing")
            self.send_window += increment
            if self.send_window > frames.MAX_WINDOW:
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
            self.break_off(stream, Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR)
            return
        stream.wake()

    def _rst_stream(self, _flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 4:  # noqa: PLR2004 - one number
            raise Fault(Code.FRAME_SIZE_ERROR, "RST_STREAM is malformed")
        if self.is_idle_stream(number):
            raise Fault(Code.PROTOCOL_ERROR, "the end of a stream that was never opened")
        self.spend(_RESET_COST)
        stream = self.streams.get(number)
        if stream is None:
            return
        stream.send_ended = stream.recv_ended = True
        self.drop(stream)
        stream.wake()
        stream.on_reset(frames.code_of(frames.u32(payload)))

    def _pinged(self, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != frames.PING_BYTES:
            raise Fault(Code.FRAME_SIZE_ERROR, "PING is malformed")
        if number:
            raise Fault(Code.PROTOCOL_ERROR, "PING on a stream")
        self.spend()
        if not flags & frames.ACK:
            self.write(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif self._on_pong is not None and payload == self._ping:
            if not self._on_pong.done():
                self._on_pong.set_result(None)
            self._on_pong = None

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise Fault(Code.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % frames.SETTING_BYTES or (payload and flags & frames.ACK):
            raise Fault(Code.FRAME_SIZE_ERROR, "SETTINGS is malformed")
        self.spend(1.0 + len(payload) / frames.SETTING_BYTES / 10)
        if flags & frames.ACK:
            return
        for key, value in frames.take_settings(payload):
            self._setting(key, value)
        self.on_settings()
        self.write(frames.frame(frames.SETTINGS, frames.ACK, 0))

    def _setting(self, key: int, value: int) -> None:
        if key == frames.INITIAL_WINDOW_SIZE:
            self._resize(value)
        elif key == frames.MAX_FRAME_SIZE:
            if not frames.MAX_FRAME_BYTES <= value < 1 << 24:
                raise Fault(Code.PROTOCOL_ERROR, "a frame size is out of range")
            self.peer_max_frame = min(value, 4 * frames.MAX_FRAME_BYTES)
        elif key == frames.MAX_CONCURRENT_STREAMS:
            self.on_limit(value)
        elif key == frames.HEADER_TABLE_SIZE:
            if value < TABLE_BYTES:
                self._prefix = _NO_TABLE
        elif key == frames.ENABLE_PUSH and value > 1:
            raise Fault(Code.PROTOCOL_ERROR, "a setting is out of range")

    def _resize(self, window: int) -> None:
        """Take another first window; those of open streams may fall below zero by it."""
        if window > frames.MAX_WINDOW:
            raise Fault(Code.FLOW_CONTROL_ERROR, "a window is out of range")
        for stream in self.streams.values():
            stream.send_window += window - self.peer_window
            if stream.send_window > frames.MAX_WINDOW:
                raise Fault(Code.FLOW_CONTROL_ERROR, "a window is out of range")
        self.peer_window = window
        self._wake()

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


def _unpadded(payload: bytes) -> bytes:
    """Return what is in a payload besides its padding.

    Raises:
        Fault: there is more padding than payload.
    """
    if not payload or payload[0] >= len(payload):
        raise Fault(Code.PROTOCOL_ERROR, "a frame is padded wrongly")
    return payload[1 : len(payload) - payload[0]]
