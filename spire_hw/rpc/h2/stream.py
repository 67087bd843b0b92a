"""One stream of an HTTP/2 connection: messages out of DATA frames and into them, its two windows.

Source: RFC 9113 sections 5 and 6.9.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Protocol

from spire_hw.errors import ErrorKind, InvalidInputError, LimitError, SpireHwError
from spire_hw.rpc.h2 import frames
from spire_hw.rpc.h2.frames import Code
from spire_hw.rpc.h2.wire import Assembler

if TYPE_CHECKING:
    from spire_hw.rpc.h2.hpack import Block
    from spire_hw.rpc.h2.limits import Account, Windows

# What a message costs that is empty.
MESSAGE_OVERHEAD: Final = 64
_MAX_EMPTY_DATA: Final = 100
# An answer in frames smaller than this was asked for in tiny windows.
_WHOLE_FRAME: Final = 1024


class Fault(Exception):  # noqa: N818 - a peer's fault, not an error of ours
    """The peer broke the protocol; the connection ends."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class StreamEndedError(Exception):
    """The stream is over; what is to be said about it was said elsewhere."""


class Carrier(Protocol):
    """What a stream needs of its connection; see `connection.Connection`."""

    windows: Windows
    account: Account
    streams: dict[int, Stream]
    blocked: dict[Stream, None]
    send_window: int
    peer_window: int
    peer_max_frame: int
    is_closed: bool

    @property
    def is_full(self) -> bool:
        """Tell whether DATA has to wait."""
        ...

    def write(self, data: bytes) -> None:
        """Send frames."""
        ...

    def write_headers(self, number: int, block: bytes, *, end: bool) -> None:
        """Send a header block."""
        ...

    def write_data(self, stream: Stream, data: bytes, *, end: bool, earns: bool = True) -> None:
        """Send one DATA frame."""
        ...

    def write_answer(self, stream: Stream, first: bytes, packed: bytes, last: bytes) -> None:
        """Send a whole answer."""
        ...

    def spend(self, cost: float = 1.0) -> None:
        """Count what brings no call on."""
        ...

    def break_off(self, stream: Stream, code: Code) -> None:
        """End a stream over what the peer did."""
        ...

    def reset(self, stream: Stream, code: Code) -> None:
        """End a stream at once."""
        ...

    def settle(self, stream: Stream) -> None:
        """Let go of a stream that both ends have ended."""
        ...

    def drop(self, stream: Stream) -> None:
        """Let go of a stream."""
        ...


class Stream(ABC):
    """One call on a connection."""

    __slots__ = (
        "_assembler",
        "_credit",
        "_empty",
        "_held",
        "_waiter",
        "connection",
        "id",
        "recv_ended",
        "recv_window",
        "send_ended",
        "send_window",
        "unread",
    )

    def __init__(self, connection: Carrier, number: int, max_message_bytes: int) -> None:
        self.connection = connection
        self.id = number
        self.recv_ended = False
        self.send_ended = False
        self.recv_window = connection.windows.stream
        self.send_window = connection.peer_window
        self.unread = 0  # bytes of messages nobody has taken yet, and what keeping them costs
        self._assembler = Assembler(max_message_bytes)
        self._held = 0  # what of that and of the message in the making the connection accounts for
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
            self.connection.break_off(self, Code.STREAM_CLOSED)
            return
        self.recv_window -= size
        if self.recv_window < 0:
            raise Fault(Code.FLOW_CONTROL_ERROR, "more data than the stream's window")
        if not data and not end:
            self._empty += 1
            if self._empty > _MAX_EMPTY_DATA:
                raise Fault(Code.ENHANCE_YOUR_CALM, "too many empty frames")
        self._credit += size
        if data and not self._assemble(data):
            return
        if end:
            self.recv_ended = True
            if self._assembler.pending:
                self.refuse(InvalidInputError("the stream ends in the middle of a message"))
                return
            self.on_end()
            self.connection.settle(self)
        else:
            self.give_credit()

    def _assemble(self, data: bytes) -> bool:
        """Hand on the messages that are complete now; tell whether the stream goes on."""
        connection = self.connection
        try:
            for message in self._assembler.take(data):
                self.unread += len(message) + MESSAGE_OVERHEAD
                self.on_message(message)
        except SpireHwError as e:
            self.refuse(e)
        if connection.streams.get(self.id) is not self:
            return False
        if not self.account():
            self.refuse(LimitError("too much unfinished data at once; try again later"))
            return False
        return True

    def take_up(self, message: bytes) -> None:
        """Take note that a message was read: the peer may send more."""
        self.unread -= len(message) + MESSAGE_OVERHEAD
        self.account()
        self.give_credit()

    def account(self) -> bool:
        """Tell the connection what the stream holds now; returns whether that may be."""
        if self.connection.streams.get(self.id) is not self:
            return True  # it has given back everything
        held = self.unread + self._assembler.pending
        more, self._held = held - self._held, held
        return more == 0 or self.connection.account.add(more)

    def give_credit(self) -> None:
        """Let the peer send more, when the reader keeps up."""
        whole = self.connection.windows.stream
        if self._credit * 2 >= whole and self.unread < whole and not self.recv_ended:
            self.connection.write(frames.window_update(self.id, self._credit))
            self.recv_window += self._credit
            self._credit = 0

    def forget(self) -> None:
        """Give back what the stream holds; called once, when it leaves its connection."""
        if self._held:
            self.connection.account.add(-self._held)
            self._held = 0

    async def send_message(self, packed: bytes, *, end: bool = False) -> None:
        """Send DATA frames, as the windows allow.

        A stream whose sender is cancelled in the middle of a message is reset: what would follow
        could not be told from the rest of that message.

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
            if connection.is_full or (step <= 0 and at < size):
                await self._room(begun=at > 0)
                continue
            last = at + step == size
            if last and end:
                self.send_ended = True
            connection.write_data(
                self, packed[at : at + step], end=last and end, earns=last or step >= _WHOLE_FRAME
            )
            at += step
            if last:
                if end:
                    connection.settle(self)
                return

    async def _room(self, *, begun: bool) -> None:
        """Wait until something may be sent."""
        self._waiter = asyncio.get_running_loop().create_future()
        self.connection.blocked[self] = None
        try:
            await self._waiter
        except asyncio.CancelledError:
            if begun and not self.send_ended:
                self.refuse(SpireHwError("given up", kind=ErrorKind.CANCELLED))
            raise
        finally:
            self._waiter = None
            self.connection.blocked.pop(self, None)

    def wake(self) -> None:
        """Look again at what may be sent."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
