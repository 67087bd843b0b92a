"""HTTP/2 against its spirit: floods of frames and headers that unpack to a thousand times their size."""

from __future__ import annotations

import asyncio
import random
import ssl
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import psutil
import pytest
import pytest_asyncio

from spire_hw.errors import InvalidInputError, LimitError, SpireHwError
from spire_hw.rpc.server import TCP_RPC_LIMITS
from spire_hw.transport.half import PREFACE
from spire_hw.transport.headers import MAX_BLOCK_BYTES, MAX_FIELDS, HeaderWatch
from spire_hw.transport.tls import build_context
from spire_hw_sim.echo import PREFIX, TIMEOUT_S, EchoWorld, echo_world, say

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

DATA, HEADERS, PRIORITY, RESET, SETTINGS, PUSH, PING, WINDOW, CONTINUATION = (
    0, 1, 2, 3, 4, 5, 6, 8, 9,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("rpc_engine")
END_STREAM, END_HEADERS, PADDED, WITH_PRIORITY = 1, 4, 8, 0x20
MIB = 1 << 20


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    length = struct.pack(">I", len(payload))[1:]
    return length + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def literal(name: bytes, value: bytes, start: int = 0) -> bytes:
    return bytes((start, len(name))) + name + bytes((len(value),)) + value


CALL = (
    b"\x83\x86"
    + literal(b":path", (PREFIX + "Say").encode())
    + literal(b":authority", b"x")
    + literal(b"te", b"trailers")
    + literal(b"content-type", b"application/grpc")
)
BIG_FIELD = literal(b"a" * 50, b"b" * 120, start=0x40)  # remembered: from now on one byte, 0xbe


def endless_continuation() -> Iterator[bytes]:
    yield frame(HEADERS, 0, 1, CALL)
    while True:
        yield frame(CONTINUATION, 0, 1, literal(b"a" * 50, b"b" * 100) * 50)


def endless_empty_continuation() -> Iterator[bytes]:
    yield frame(HEADERS, 0, 1, CALL)
    while True:
        yield frame(CONTINUATION, 0, 1) * 100


def references() -> Iterator[bytes]:
    for stream in range(1, 100_000, 2):
        yield frame(HEADERS, END_HEADERS, stream, CALL + BIG_FIELD + b"\xbe" * 15_000)


def half_a_frame_of_references() -> Iterator[bytes]:
    whole = frame(HEADERS, END_HEADERS, 1, CALL + BIG_FIELD + b"\xbe" * 15_000)
    for at in range(0, len(whole) - 1, 100):
        yield whole[at : at + 100]


def many_small_fields() -> Iterator[bytes]:
    for stream in range(1, 100_000, 2):
        yield frame(HEADERS, END_HEADERS, stream, CALL + literal(b"k", b"v") * 2000)


def rapid_reset() -> Iterator[bytes]:
    for stream in range(1, 40_000, 2):
        yield frame(HEADERS, END_HEADERS, stream, CALL) + frame(RESET, 0, stream, b"\0\0\0\x08")


def frames(kind: int, payload: bytes, stream: int = 0) -> Callable[[], Iterator[bytes]]:
    def made() -> Iterator[bytes]:
        for _ in range(200):
            yield frame(kind, 0, stream, payload) * 100

    return made


CUT = (
    endless_continuation,
    endless_empty_continuation,
    references,
    many_small_fields,
)
BORNE = (
    rapid_reset,
    half_a_frame_of_references,
    frames(PING, b"x" * 8),
    frames(SETTINGS, struct.pack(">HI", 4, 65_535)),
    frames(WINDOW, b"\0\0\0\x01"),
    frames(PRIORITY, b"\0\0\0\0\x01", stream=1),
    frames(0xBB, b"x" * 100),
)


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[EchoWorld]:
    async with echo_world(tmp_path, rpc_limits=TCP_RPC_LIMITS) as world:
        yield world


@asynccontextmanager
async def connection(world: EchoWorld, *, tls: bool) -> AsyncIterator[asyncio.StreamWriter]:
    """Connect as a stranger; whatever the server says is read and dropped."""
    if tls:
        context = build_context(
            server_side=False, verify=ssl.CERT_NONE, roots=[], identity=None
        ).context
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", world.tcp.port, ssl=context, server_hostname=""
        )
    else:
        reader, writer = await asyncio.open_unix_connection(str(world.path))
    writer.write(PREFACE + frame(SETTINGS, 0, 0))

    async def read() -> None:
        with suppress(ConnectionError, ssl.SSLError):
            while await reader.read(65_536):
                pass

    async with asyncio.TaskGroup() as group:
        reading = group.create_task(read())
        try:
            yield writer
        finally:
            reading.cancel()
            writer.transport.abort()


async def push(writer: asyncio.StreamWriter, chunks: Iterator[bytes], limit: int) -> bool:
    """Send at most so many bytes; tell whether the server ended it before."""
    sent = 0
    try:
        for chunk in chunks:
            writer.write(chunk)
            sent += len(chunk)
            async with asyncio.timeout(2):
                await writer.drain()
            await asyncio.sleep(0)
            if writer.is_closing() or sent > limit:
                break
        for _ in range(500):
            if writer.is_closing():
                return True
            await asyncio.sleep(0.01)
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return False


@pytest.mark.asyncio
@pytest.mark.parametrize("tls", [False, True], ids=["unix", "tls"])
@pytest.mark.parametrize("flood", CUT, ids=lambda f: f.__name__)
async def test_headers_beyond_measure_end_the_connection(
    world: EchoWorld, flood: Callable[[], Iterator[bytes]], tls: bool
) -> None:
    before = psutil.Process().memory_info().rss
    async with connection(world, tls=tls) as writer:
        assert await push(writer, flood(), 4 * MIB)
    assert psutil.Process().memory_info().rss - before < 30 * MIB
    assert not world.echo.calls
    async with world.over_unix() as channel:
        assert await say(channel) == "hello"


@pytest.mark.asyncio
@pytest.mark.parametrize("flood", BORNE)
async def test_floods_of_frames_cost_others_nothing(
    world: EchoWorld, flood: Callable[[], Iterator[bytes]]
) -> None:
    before = psutil.Process().memory_info().rss
    async with connection(world, tls=True) as writer, asyncio.TaskGroup() as group:
        pushing = group.create_task(_quietly(push(writer, flood(), 2 * MIB)))
        async with world.over_unix() as channel:
            assert await say(channel, timeout_s=TIMEOUT_S) == "hello"
        pushing.cancel()
    assert psutil.Process().memory_info().rss - before < 40 * MIB
    assert await world.who() == "anonymous"


async def _quietly(pushing: object) -> None:
    with suppress(ConnectionError):
        await pushing  # type: ignore[misc]


def pieces(data: bytes, chance: random.Random) -> Iterator[bytes]:
    while data:
        cut = chance.choice((1, 2, 8, 9, 10, 500))
        yield data[:cut]
        data = data[cut:]


def test_ordinary_traffic_passes_however_it_is_cut() -> None:
    chance = random.Random(7)  # noqa: S311 - repeatable, not secret
    long_value = b"\x00\x03x-a\x7f\x81\x07" + b"v" * 256 + literal(b"y", b"")
    traffic = PREFACE + frame(SETTINGS, 0, 0)
    for stream in range(1, 41, 2):
        block = CALL + BIG_FIELD + b"\xbe" * 20 + long_value + b"\x3f\xe1\x1f" + b"\xff\x05"
        cut = chance.randrange(len(block))
        traffic += frame(HEADERS, WITH_PRIORITY, stream, b"\0\0\0\0\x10" + block[:cut])
        traffic += frame(CONTINUATION, END_HEADERS, stream, block[cut:])
        traffic += frame(DATA, END_STREAM, stream, chance.randbytes(chance.randrange(3000)))
    for _ in range(30):
        watch = HeaderWatch(len(PREFACE))
        for piece in pieces(traffic, chance):
            watch.check(piece)


def test_fields_are_counted_exactly_however_they_are_cut() -> None:
    chance = random.Random(8)  # noqa: S311
    kinds = (b"\xbe", literal(b"n", b"v"), literal(b"n", b"v", 0x40), literal(b"n", b"v", 0x10),
             b"\x44\x01v", b"\x0f\x10\x02vv", b"\x20")  # fmt: skip
    for _ in range(40):
        fields = [chance.choice(kinds) for _ in range(MAX_FIELDS + 1)]
        for count, bad in ((MAX_FIELDS, False), (MAX_FIELDS + 1, True)):
            block = frame(HEADERS, END_HEADERS, 1, b"".join(fields[:count]))
            watch = HeaderWatch()
            refused = False
            for piece in pieces(block + block[:9], chance):
                try:
                    watch.check(piece)
                except LimitError:
                    refused = True
                    break
            assert refused is bad


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (frame(HEADERS, 0, 1, b"\0" * (MAX_BLOCK_BYTES + 1)), LimitError),
        (frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1) * 4000, LimitError),
        (frame(CONTINUATION, 0, 1) * 4000, LimitError),
        (frame(HEADERS, PADDED | END_HEADERS, 1, b"\x01" + CALL + b"\0"), InvalidInputError),
        (frame(PUSH, END_HEADERS, 1, b"\0\0\0\x02" + CALL), InvalidInputError),
        (frame(HEADERS, END_HEADERS, 1, b"\xff" + b"\x80" * 9), InvalidInputError),
    ],
)
def test_what_no_peer_sends_is_refused(data: bytes, refusal: type[SpireHwError]) -> None:
    with pytest.raises(refusal):
        HeaderWatch().check(data)


def test_any_bytes_give_an_answer() -> None:
    chance = random.Random(9)  # noqa: S311
    for _ in range(2000):
        watch = HeaderWatch()
        with suppress(SpireHwError):
            for piece in pieces(chance.randbytes(200), chance):
                watch.check(piece)
            watch.check(frame(HEADERS, 4, 1, chance.randbytes(100)))
