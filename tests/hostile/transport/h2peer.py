"""An HTTP/2 peer by hand: sends whatever a test wants, tells what comes back."""

from __future__ import annotations

import asyncio
import struct
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spire_hw.rpc.h2.hpack import Decoder
from spire_hw.transport.half import PREFACE
from spire_hw_sim.echo import PREFIX

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

DATA, HEADERS, PRIORITY, RESET, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 1, 1, 4, 8, 0x20
CODES = (
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
)
PATIENCE_S = 20.0


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one frame."""
    length = struct.pack(">I", len(payload))[1:]
    return length + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def literal(name: str, value: str) -> bytes:
    """Return a field that no table holds; both are below 127 bytes."""
    return bytes((0, len(name))) + name.encode() + bytes((len(value),)) + value.encode()


def fields(*pairs: tuple[str, str]) -> bytes:
    """Return a header block."""
    return b"".join(literal(*pair) for pair in pairs)


def call(method: str, *more: tuple[str, str]) -> bytes:
    """Return the header block of a call."""
    return fields(
        (":method", "POST"),
        (":scheme", "http"),
        (":path", PREFIX + method),
        (":authority", "x"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    )


def message(body: bytes, *, compressed: bool = False, length: int | None = None) -> bytes:
    """Return a gRPC message; `length` says another one than it has."""
    return struct.pack(">BI", compressed, len(body) if length is None else length) + body


def value(text: str) -> bytes:
    """Return an encoded `StringValue` of fewer than 128 bytes."""
    return bytes((0x0A, len(text))) + text.encode()


def setting(key: int, number: int) -> bytes:
    """Return a SETTINGS frame with one setting."""
    return frame(SETTINGS, 0, 0, struct.pack(">HI", key, number))


def u32(number: int) -> bytes:
    """Return four bytes."""
    return struct.pack(">I", number)


async def until(done: Callable[[], bool]) -> None:
    """Wait for something that nobody announces."""
    for _ in range(2000):
        if done():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not come")


@dataclass(frozen=True)
class Frame:
    """A frame that came; `fields` are those of a header block."""

    kind: int
    flags: int
    stream: int
    payload: bytes
    fields: dict[str, str]

    @property
    def code(self) -> str:
        """Return why a RST_STREAM or GOAWAY was sent."""
        at = 4 if self.kind == GOAWAY else 0
        return CODES[int.from_bytes(self.payload[at : at + 4], "big")]


class H2Peer:
    """One end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._decoder = Decoder()

    def send(self, *data: bytes) -> None:
        """Send bytes."""
        self.writer.write(b"".join(data))

    async def frame(self) -> Frame | None:
        """Return the next frame, None at the end of the connection."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                head = await self.reader.readexactly(9)
                payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        kind, flags = head[3], head[4]
        found = {}
        if kind == HEADERS:
            found = dict(self._decoder.decode(payload).fields)
        return Frame(kind, flags, int.from_bytes(head[5:], "big"), payload, found)

    async def next(self, *kinds: int, stream: int | None = None) -> Frame:
        """Return the next frame of some kinds, others are dropped; the end is a failure."""
        while (got := await self.frame()) is not None:
            if got.kind in kinds and stream in {None, got.stream}:
                return got
        raise ConnectionResetError("the connection ended")

    async def rest(self) -> list[Frame]:
        """Return everything until the connection ends."""
        got = []
        while (one := await self.frame()) is not None:
            got.append(one)
        return got

    async def farewell(self) -> str:
        """Return the code of the GOAWAY that the connection ends with."""
        said = [one.code for one in await self.rest() if one.kind == GOAWAY]
        return said[-1] if said else "nothing"

    async def status(self, stream: int) -> str:
        """Return the `grpc-status` of a stream."""
        while True:
            got = await self.next(HEADERS, stream=stream)
            if "grpc-status" in got.fields:
                return got.fields["grpc-status"]

    async def ping(self) -> None:
        """Wait until all that was sent has been looked at."""
        self.send(frame(PING, 0, 0, b"echo me!"))
        while (await self.next(PING)).payload != b"echo me!":
            pass

    async def end(self) -> None:
        """Cut the connection."""
        self.writer.transport.abort()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            return


@asynccontextmanager
async def client(path: Path, *settings: tuple[int, int]) -> AsyncIterator[H2Peer]:
    """Connect to a server and say hello."""
    peer = H2Peer(*await asyncio.open_unix_connection(str(path)))
    packed = b"".join(struct.pack(">HI", *one) for one in settings)
    peer.send(PREFACE, frame(SETTINGS, 0, 0, packed))
    try:
        yield peer
    finally:
        await peer.end()


class H2Server:
    """A server by hand: one script plays each connection.

    Attributes:
        connections: how many came.
        open: how many are here.
    """

    def __init__(self, script: Callable[[H2Peer], Awaitable[None]], *, greets: bool) -> None:
        self.connections = 0
        self.open = 0
        self._greets = greets
        self.failure: BaseException | None = None
        self._script = script

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Play the script on a connection, then end it."""
        self.connections += 1
        self.open += 1
        peer = H2Peer(reader, writer)
        try:
            assert await reader.readexactly(len(PREFACE)) == PREFACE
            if self._greets:
                peer.send(frame(SETTINGS, 0, 0))
            await self._script(peer)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        except AssertionError as e:
            self.failure = e
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            self.open -= 1


@asynccontextmanager
async def serving(
    path: Path, script: Callable[[H2Peer], Awaitable[None]], *, greets: bool = True
) -> AsyncIterator[H2Server]:
    """Let a script answer on a unix socket, after our settings when it `greets`."""
    server = H2Server(script, greets=greets)
    listening = await asyncio.start_unix_server(server.serve, str(path))
    try:
        yield server
    finally:
        listening.close()
        await listening.wait_closed()
        await until(lambda: not server.open)
    assert server.failure is None
