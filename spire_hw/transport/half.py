"""One connection that was proved, between its socket and what takes its bytes.

TLS or not is the business of the kinds of `Half`; who takes the bytes, an RPC engine or the other
half of a relay, that of its `Sink`.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import TYPE_CHECKING, Final, Protocol, cast

from typing_extensions import override

from spire_hw.errors import InvalidInputError, LimitError, SpireHwError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.transport.headers import HeaderWatch

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_READ_BYTES: Final = 64 * 1024
_LINGER_S: Final = 10.0


class _Scratch(threading.local):
    """One read buffer per thread: a loop fills and empties it in one go."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_READ_BYTES))


_scratch = _Scratch()


class _Gate:
    """Holds what a new connection sends until its beginning has been looked at."""

    __slots__ = ("data", "opened", "wanted")

    def __init__(self, wanted: bytes) -> None:
        self.wanted = wanted
        self.data = bytearray()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def push(self, data: bytes) -> bool:
        """Take bytes; True when no more should be read for now."""
        self.data += data
        if not self.opened.done():
            head = self.data[: len(self.wanted)]
            if head != self.wanted[: len(head)]:
                self._fail(InvalidInputError("the caller does not speak HTTP/2"))
            elif len(head) == len(self.wanted):
                self.opened.set_result(None)
        # To stop reading and begin again costs more than to hold what comes in a turn of the loop.
        return len(self.data) >= _READ_BYTES

    def lost(self) -> None:
        """Say that the connection went away."""
        if not self.opened.done():
            self._fail(UnavailableError("the connection ended before any call"))

    def _fail(self, error: SpireHwError) -> None:
        self.opened.set_exception(error)
        self.opened.exception()  # whoever waited may have gone: not worth a warning


class Sink(Protocol):
    """Where a half hands on what it receives: the other half of a relay, or an engine."""

    def send(self, data: bytes) -> None:
        """Take plain bytes that the half received."""
        ...

    def end(self) -> None:
        """Take note that the half is gone."""
        ...

    def pause(self) -> None:
        """Send no more: the half's peer does not read."""
        ...

    def resume(self) -> None:
        """Send on."""
        ...


class Half(asyncio.BufferedProtocol):
    """One proved connection: what it receives goes to its sink, what that says is sent.

    HTTP/2 never half-closes, so the end of one half is the end of both. Each half holds no more
    than its transport's write buffer; past its mark the other half stops reading.

    Attributes:
        watch: bounds the header blocks the peer sends; a connection that goes beyond is cut.
    """

    __slots__ = ("_gate", "_linger", "_view", "on_end", "other", "transport", "watch")

    def __init__(
        self, on_end: Callable[[], None] | None = None, *, begins: bytes | None = None
    ) -> None:
        """Make an end.

        Args:
            on_end: called once, when the connection is gone.
            begins: what the peer must send first; it is held back with a little of what follows
                until `join` or `lead`. None when the half is joined before it is connected.
        """
        self.transport: asyncio.Transport | None = None
        self.other: Sink | None = None
        self.on_end = on_end
        self._gate = None if begins is None else _Gate(begins)
        self.watch: HeaderWatch | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._view = _scratch.view

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    @override
    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    @override
    def buffer_updated(self, nbytes: int) -> None:
        self.received(bytes(self._view[:nbytes]))

    @override
    def eof_received(self) -> bool:
        self.end()
        return False

    @override
    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.pause()

    @override
    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.resume()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None  # nothing is left to close: no timer keeps this from being freed
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._gate is not None:
            self._gate.lost()
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()
        other, self.other = self.other, None
        if other is not None:
            other.end()

    @property
    def has_begun(self) -> bool:
        """Tell whether the connection has begun the way it must; then `begun` waits for nothing."""
        gate = self._gate
        return gate is None or (gate.opened.done() and gate.opened.exception() is None)

    async def begun(self) -> None:
        """Wait until the connection has shown how it begins.

        Raises:
            InvalidInputError: it begins otherwise.
            UnavailableError: it ended first.
        """
        if self._gate is not None:
            await self._gate.opened

    def lead(self, sink: Sink) -> None:
        """Hand everything to a sink from now on, early bytes first."""
        self.other = sink
        self._pass_on_early()
        self.resume()

    def _pass_on_early(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None and gate.data:
            self.received(bytes(gate.data))

    def received(self, data: bytes) -> None:
        """Take plain bytes from the peer."""
        if self.other is not None:
            if self.watch is not None:
                try:
                    self.watch.check(data)
                except (LimitError, InvalidInputError):
                    self.abort()
                    return
            self.other.send(data)
        elif self._gate is not None and self._gate.push(data):
            self.pause()

    @property
    def unsent(self) -> int:
        """Return how many bytes wait for the peer to read."""
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def send(self, data: bytes) -> None:
        """Send plain bytes to the peer."""
        if self.transport is not None:
            self.transport.write(data)

    def pause(self) -> None:
        """Stop reading."""
        if self.transport is not None:
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def end(self) -> None:
        """Close once what was written has gone out, or after a while if it does not."""
        if self.transport is None or self.transport.is_closing():
            return
        self.transport.close()
        if self.unsent:
            self._linger = asyncio.get_running_loop().call_later(_LINGER_S, self.abort)

    def abort(self) -> None:
        """Close at once."""
        if self.transport is not None:
            self.transport.abort()


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel send at once, and notice a peer that is gone within a minute.

    What a listening socket was told holds for the connections it accepts.

    Source: tcp(7).
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
