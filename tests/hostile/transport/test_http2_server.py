"""Our HTTP/2 server against callers that break its rules, one by one, on real sockets."""

from __future__ import annotations

import asyncio
import gc
import random
import struct
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import psutil
import pytest
import pytest_asyncio
from google.protobuf.wrappers_pb2 import StringValue

from spire_hw.rpc.h2.limits import FREE_BYTES
from spire_hw.rpc.h2.server import H2Engine, ServerConnection
from spire_hw.rpc.h2.serverstream import ServerStream
from spire_hw.rpc.server import TCP_RPC_LIMITS, RpcLimits, RpcServer
from spire_hw.rpc.service import Call, Method
from spire_hw.transport.half import Half
from spire_hw.transport.unixfront import UnixFront
from spire_hw_sim.echo import PREFIX, EchoWorld, echo_world, say
from tests.hostile.transport.h2peer import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PATIENCE_S,
    PING,
    PUSH,
    RESET,
    SETTINGS,
    WINDOW,
    WITH_PRIORITY,
    H2Peer,
    call,
    client,
    fields,
    frame,
    message,
    setting,
    u32,
    until,
    value,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from spire_hw.rpc.service import Handler

MIB = 1 << 20
HELLO = message(value("hello"))
WINDOW_SIZE, TABLE_SIZE, MAX_FRAME = 4, 1, 5


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[EchoWorld]:
    async with echo_world(tmp_path, rpc_limits=TCP_RPC_LIMITS) as world:
        yield world


@pytest_asyncio.fixture
async def peer(world: EchoWorld) -> AsyncIterator[H2Peer]:
    async with client(world.path) as peer:
        yield peer


@pytest.fixture(autouse=True)
def loop_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test in which an exception reached the event loop."""
    seen: list[str] = []
    gc.collect()  # what an earlier test left is not this one's
    before = asyncio.BaseEventLoop.default_exception_handler

    def note(_loop: asyncio.BaseEventLoop, context: dict[str, object]) -> None:
        seen.append(str(context))

    asyncio.BaseEventLoop.default_exception_handler = note  # type: ignore[method-assign,assignment]
    yield
    asyncio.BaseEventLoop.default_exception_handler = before  # type: ignore[method-assign]
    assert not seen


def engine(world: EchoWorld) -> H2Engine:
    found = world.server.engine
    assert isinstance(found, H2Engine)
    return found


def opened(number: int, method: str, *more: tuple[str, str]) -> bytes:
    return frame(HEADERS, END_HEADERS, number, call(method, *more))


def data(number: int, payload: bytes, *, end: bool = True) -> bytes:
    return frame(DATA, END_STREAM if end else 0, number, payload)


def whole(number: int, method: str = "Say") -> bytes:
    return opened(number, method) + data(number, HELLO)


async def works(peer: H2Peer, number: int) -> None:
    peer.send(whole(number))
    assert await peer.status(number) == "0"


# The rules of frames: what ends a connection, and with which word.

OPEN = opened(1, "Chat")
BROKEN = {
    "data on no stream": (frame(DATA, 0, 0, b"x"), "PROTOCOL_ERROR"),
    "data on an idle stream": (data(7, HELLO), "PROTOCOL_ERROR"),
    "data on a server's stream": (data(2, HELLO), "PROTOCOL_ERROR"),
    "headers on no stream": (frame(HEADERS, END_HEADERS, 0, call("Say")), "PROTOCOL_ERROR"),
    "headers on a server's stream": (opened(2, "Say"), "PROTOCOL_ERROR"),
    "a reset of an idle stream": (frame(RESET, 0, 9, u32(8)), "PROTOCOL_ERROR"),
    "a reset of no stream": (frame(RESET, 0, 0, u32(8)), "PROTOCOL_ERROR"),
    "a short reset": (OPEN + frame(RESET, 0, 1, b"\0"), "FRAME_SIZE_ERROR"),
    "a window of an idle stream": (frame(WINDOW, 0, 9, u32(8)), "PROTOCOL_ERROR"),
    "a short window": (frame(WINDOW, 0, 0, b"\0\0"), "FRAME_SIZE_ERROR"),
    "a window that grows by nothing": (frame(WINDOW, 0, 0, u32(0)), "PROTOCOL_ERROR"),
    "a window beyond measure": (frame(WINDOW, 0, 0, u32(2**31 - 1)), "FLOW_CONTROL_ERROR"),
    "settings on a stream": (frame(SETTINGS, 0, 1), "PROTOCOL_ERROR"),
    "crooked settings": (frame(SETTINGS, 0, 0, b"12345"), "FRAME_SIZE_ERROR"),
    "a full acknowledgement": (frame(SETTINGS, ACK, 0, b"123456"), "FRAME_SIZE_ERROR"),
    "a first window beyond measure": (setting(WINDOW_SIZE, 2**31), "FLOW_CONTROL_ERROR"),
    "open windows beyond measure": (
        OPEN + frame(WINDOW, 0, 1, u32(2**31 - 1 - 65_535)) + setting(WINDOW_SIZE, 65_536),
        "FLOW_CONTROL_ERROR",
    ),
    "small frames": (setting(MAX_FRAME, 16_383), "PROTOCOL_ERROR"),
    "frames beyond measure": (setting(MAX_FRAME, 1 << 24), "PROTOCOL_ERROR"),
    "push neither on nor off": (setting(2, 2), "PROTOCOL_ERROR"),
    "a short ping": (frame(PING, 0, 0, b"1234567"), "FRAME_SIZE_ERROR"),
    "a ping on a stream": (frame(PING, 0, 1, b"12345678"), "PROTOCOL_ERROR"),
    "a push": (frame(PUSH, END_HEADERS, 1, u32(2)), "PROTOCOL_ERROR"),
    "a short goaway": (frame(GOAWAY, 0, 0, u32(0)), "PROTOCOL_ERROR"),
    "a goaway on a stream": (frame(GOAWAY, 0, 1, u32(0) + u32(0)), "PROTOCOL_ERROR"),
    "a continuation of nothing": (frame(CONTINUATION, END_HEADERS, 1), "PROTOCOL_ERROR"),
    "an interrupted block": (
        frame(HEADERS, 0, 1, call("Say")) + frame(PING, 0, 0, b"12345678"),
        "PROTOCOL_ERROR",
    ),
    "another stream's continuation": (
        frame(HEADERS, 0, 1, call("Say")) + frame(CONTINUATION, END_HEADERS, 3),
        "PROTOCOL_ERROR",
    ),
    "a frame too large": (frame(DATA, 0, 1, b"x" * 16_385), "FRAME_SIZE_ERROR"),
    "padding beyond the frame": (OPEN + frame(DATA, PADDED, 1, b"\x05abcd"), "PROTOCOL_ERROR"),
    "padding of nothing": (OPEN + frame(DATA, PADDED, 1), "PROTOCOL_ERROR"),
    "headers cut short": (
        frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, b"12"),
        "FRAME_SIZE_ERROR",
    ),
    "a block that is none": (frame(HEADERS, END_HEADERS, 1, b"\xff" * 9), "COMPRESSION_ERROR"),
    "an index of nothing": (frame(HEADERS, END_HEADERS, 1, b"\x80"), "COMPRESSION_ERROR"),
    "empty data": (OPEN + data(1, b"", end=False) * 101, "ENHANCE_YOUR_CALM"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize(("sent", "word"), BROKEN.values(), ids=list(BROKEN))
async def test_what_breaks_the_rules_ends_the_connection(
    world: EchoWorld, peer: H2Peer, sent: bytes, word: str
) -> None:
    peer.send(sent)
    assert await peer.farewell() == word
    assert not engine(world).calls
    async with world.over_unix() as channel:
        assert await say(channel) == "hello"


@pytest.mark.asyncio
async def test_the_first_frame_is_settings(world: EchoWorld) -> None:
    reader, writer = await asyncio.open_unix_connection(str(world.path))
    peer = H2Peer(reader, writer)
    peer.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", frame(PING, 0, 0, b"12345678"))
    assert await peer.farewell() == "PROTOCOL_ERROR"
    await peer.end()


@pytest.mark.asyncio
@pytest.mark.parametrize("call", [whole(1, "Count"), whole(1), opened(1, "Chat"), b""])
async def test_settings_come_first_and_wait_for_no_answer(world: EchoWorld, call: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(str(world.path))
    peer = H2Peer(reader, writer)
    peer.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", frame(SETTINGS, 0, 0), call)
    first = await peer.frame()
    assert first is not None
    assert (first.kind, first.flags) == (SETTINGS, 0)
    await peer.next(SETTINGS)
    await peer.end()


# What one stream does wrong costs that stream.

WRONG = {
    "data after the end": data(1, b"x"),
    "headers after the end": frame(HEADERS, END_HEADERS | END_STREAM, 1, fields(("x", "y"))),
    "a window that grows by nothing": frame(WINDOW, 0, 1, u32(0)),
    "a window beyond measure": frame(WINDOW, 0, 1, u32(2**31 - 1)),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("sent", WRONG.values(), ids=list(WRONG))
async def test_a_fault_on_a_stream_ends_it_and_its_handler(
    world: EchoWorld, peer: H2Peer, sent: bytes
) -> None:
    peer.send(whole(1, "Hold"))
    await world.echo.held.wait()
    peer.send(sent)
    await peer.next(RESET, stream=1)
    await asyncio.wait_for(world.echo.dropped.wait(), 5)
    await works(peer, 3)


@pytest.mark.asyncio
@pytest.mark.parametrize("sent", WRONG.values(), ids=list(WRONG))
async def test_a_caller_that_has_us_reset_its_calls_is_sent_away(
    world: EchoWorld, peer: H2Peer, sent: bytes
) -> None:
    for number in range(1, 4001, 2):
        fault = sent[:5] + u32(number) + sent[9:]
        peer.send(whole(number, "Hold"), fault)
    assert await peer.farewell() == "ENHANCE_YOUR_CALM"
    assert len(world.echo.calls) < 1000
    assert not engine(world).calls


@pytest.mark.asyncio
async def test_a_call_with_two_requests_never_runs(world: EchoWorld, peer: H2Peer) -> None:
    peer.send(opened(1, "Say"), data(1, HELLO * 2))
    assert await peer.status(1) == "3"
    await works(peer, 3)
    assert len(world.echo.calls) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("payload", "status"),
    [
        (b"", "3"),
        (HELLO[:-1], "3"),
        (message(b"\xff"), "3"),
        (message(value("x"), compressed=True), "12"),
        (b"\x07" + HELLO[1:], "12"),
        (message(b"", length=4 * MIB + 1), "8"),
        (message(b"", length=2**32 - 1), "8"),
    ],
)
async def test_what_is_no_message_is_refused(peer: H2Peer, payload: bytes, status: str) -> None:
    peer.send(opened(1, "Say"), data(1, payload))
    assert await peer.status(1) == status
    await works(peer, 3)


@pytest.mark.asyncio
async def test_a_request_of_the_largest_size_passes(peer: H2Peer) -> None:
    body = b"\x0a" + b"\xfb\xff\xff\x01" + b"x" * (4 * MIB - 5)
    assert len(body) == 4 * MIB
    peer.send(setting(WINDOW_SIZE, 2**31 - 1), frame(WINDOW, 0, 0, u32(2**30)), opened(1, "Say"))
    packed = message(body)
    room, at = 65_536, 0
    while at < len(packed):
        step = min(16_384, room, len(packed) - at)
        if step == 0:
            room += int.from_bytes((await peer.next(WINDOW, stream=1)).payload, "big")
            continue
        peer.send(data(1, packed[at : at + step], end=at + step == len(packed)))
        at, room = at + step, room - step
    got = b""
    while (one := await peer.next(DATA, HEADERS)).kind == DATA or "grpc-status" not in one.fields:
        got += one.payload if one.kind == DATA else b""
    assert got == packed


# Headers.

GOOD = ((":method", "POST"), (":scheme", "http"), (":path", PREFIX + "Say"))
GRPC = ("content-type", "application/grpc")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "block",
    [
        fields(*GOOD[1:], GRPC),
        fields(GOOD[0], *GOOD[2:], GRPC),
        fields(*GOOD[:2], GRPC),
        fields(*GOOD[:2], (":path", ""), GRPC),
        fields(*GOOD, GOOD[0], GRPC),
        fields(*GOOD, (":status", "200"), GRPC),
        fields(*GOOD, (":protocol", "x"), GRPC),
        fields(*GOOD[:2], GRPC, GOOD[2]),
        fields(*GOOD, GRPC, ("connection", "close")),
        fields(*GOOD, GRPC, ("transfer-encoding", "chunked")),
        fields(*GOOD, GRPC, ("X", "y")),
        fields(*GOOD, GRPC, ("x y", "y")),
        fields(*GOOD, GRPC, ("", "y")),
        fields(*GOOD, GRPC, ("x", "a\r\nb: c")),
        fields(*GOOD, GRPC, ("x", "a\0b")),
    ],
)
async def test_headers_that_are_no_request_reset_the_stream(
    world: EchoWorld, peer: H2Peer, block: bytes
) -> None:
    peer.send(frame(HEADERS, END_HEADERS, 1, block), data(1, HELLO))
    assert (await peer.next(RESET, stream=1)).code == "PROTOCOL_ERROR"
    assert not world.echo.calls
    await works(peer, 3)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("block", "answer"),
    [
        (fields((":method", "GET"), *GOOD[1:], GRPC), {":status": "405"}),
        (fields(*GOOD), {":status": "415"}),
        (fields(*GOOD, ("content-type", "text/html")), {":status": "415"}),
        (fields(*GOOD, ("content-type", "application/grpcweb")), {":status": "415"}),
        (fields(*GOOD, GRPC, ("grpc-encoding", "gzip")), {"grpc-status": "12"}),
        (fields(*GOOD[:2], (":path", "/a/b"), GRPC), {"grpc-status": "12"}),
        (fields(*GOOD[:2], (":path", "*"), GRPC), {"grpc-status": "12"}),
        (fields(*GOOD, GRPC, *[("k" * 60, "v" * 100)] * 50), {"grpc-status": "8"}),
        *(
            (fields(*GOOD, GRPC, ("grpc-timeout", text)), {"grpc-status": "3"})
            for text in ("", "1", "s", "-1S", "1.5S", "123456789S", "1s", " 1S", "1S ")
        ),
        *(
            (fields(*GOOD, GRPC, ("grpc-timeout", text)), {"grpc-status": "4"})
            for text in ("0S", "00000000n")
        ),
    ],
)
async def test_a_call_that_cannot_be_is_answered_at_once(
    world: EchoWorld, peer: H2Peer, block: bytes, answer: dict[str, str]
) -> None:
    peer.send(frame(HEADERS, END_HEADERS, 1, block))
    got = (await peer.next(HEADERS, stream=1)).fields
    assert {name: got.get(name) for name in answer} == answer
    assert (await peer.next(RESET, stream=1)).code == "NO_ERROR"
    assert not world.echo.calls
    peer.send(data(1, HELLO))  # was under way
    await works(peer, 3)


@pytest.mark.asyncio
@pytest.mark.parametrize("text", ["99999999H", "1H", "99999999S", "5000000u"])
async def test_long_deadlines_are_as_good_as_any(peer: H2Peer, text: str) -> None:
    peer.send(opened(1, "Say", ("grpc-timeout", text)), data(1, HELLO))
    assert await peer.status(1) == "0"


@pytest.mark.asyncio
async def test_a_deadline_ends_a_call_in_every_state(world: EchoWorld, peer: H2Peer) -> None:
    soon = ("grpc-timeout", "50m")
    peer.send(opened(1, "Say", soon))  # no request yet
    peer.send(opened(3, "Join", soon), data(3, HELLO, end=False))  # more requests to come
    peer.send(opened(5, "Hold", soon), data(5, HELLO))  # answering
    statuses = {}
    while len(statuses) < 3:
        got = await peer.next(HEADERS)
        if "grpc-status" in got.fields:
            statuses[got.stream] = got.fields["grpc-status"]
    assert statuses == {1: "4", 3: "4", 5: "4"}
    await asyncio.wait_for(world.echo.dropped.wait(), 5)
    assert not engine(world).calls


@pytest.mark.asyncio
async def test_padding_and_priority_are_taken_off_headers(peer: H2Peer) -> None:
    block = b"\x03" + b"\0\0\0\0\x10" + call("Say") + b"\0\0\0"
    peer.send(frame(HEADERS, END_HEADERS | PADDED | WITH_PRIORITY, 1, block))
    peer.send(frame(DATA, PADDED | END_STREAM, 1, b"\x05" + HELLO + b"\0" * 5))
    assert await peer.status(1) == "0"


@pytest.mark.asyncio
async def test_trailers_of_a_caller_end_its_requests(peer: H2Peer) -> None:
    end = frame(HEADERS, END_HEADERS | END_STREAM, 1, fields(("x", "y")))
    peer.send(opened(1, "Join"), data(1, HELLO, end=False), end)
    assert await peer.status(1) == "0"


@pytest.mark.asyncio
async def test_a_smaller_table_is_confirmed_in_the_next_block(world: EchoWorld) -> None:
    async with client(world.path, (TABLE_SIZE, 0)) as peer:
        peer.send(whole(1), whole(3))
        blocks = [(await peer.next(HEADERS)).payload for _ in range(4)]
    assert [block.startswith(b"\x20") for block in blocks] == [True, False, False, False]


# Messages and frames are cut as the peer likes.


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 1000])
async def test_requests_arrive_however_they_are_cut(peer: H2Peer, size: int) -> None:
    packed = HELLO + message(b"") + message(value("x" * 100)) + message(b"") * 3
    peer.send(opened(1, "Join"))
    for at in range(0, len(packed), size):
        peer.send(data(1, packed[at : at + size], end=False))
    peer.send(data(1, b""))
    assert (await peer.next(DATA)).payload[5:] == value("hello" + "x" * 100)


# Windows.


@pytest.mark.asyncio
async def test_answers_keep_to_windows_that_shrink_below_zero(world: EchoWorld) -> None:
    async with client(world.path, (WINDOW_SIZE, 0)) as peer:
        peer.send(whole(1))
        await peer.next(HEADERS, stream=1)
        peer.send(setting(WINDOW_SIZE, 5))
        assert len((await peer.next(DATA)).payload) == 5
        peer.send(setting(WINDOW_SIZE, 0))  # the stream's window is now -5
        peer.send(frame(WINDOW, 0, 1, u32(7)))
        assert len((await peer.next(DATA)).payload) == 2
        peer.send(setting(WINDOW_SIZE, 65_535))
        assert len((await peer.next(DATA)).payload) == len(HELLO) - 7
        assert await peer.status(1) == "0"


@pytest.mark.asyncio
async def test_the_connection_window_binds_all_streams(world: EchoWorld, peer: H2Peer) -> None:
    peer.send(setting(WINDOW_SIZE, 2**31 - 1), *(whole(n, "Flood") for n in (1, 3, 5)))
    got = 0
    while got < 65_535:
        got += len((await peer.next(DATA)).payload)
    peer.send(whole(7))
    await peer.ping()
    peer.send(frame(WINDOW, 0, 0, u32(1)))
    assert len((await peer.next(DATA)).payload) == 1


@pytest.mark.asyncio
async def test_tiny_windows_earn_nothing(world: EchoWorld, peer: H2Peer) -> None:
    peer.send(setting(WINDOW_SIZE, 0), whole(1, "Flood"))
    await peer.next(HEADERS, stream=1)
    for _ in range(100):
        peer.send(frame(WINDOW, 0, 1, u32(1)) * 100)
        await asyncio.sleep(0)
    await peer.rest()
    assert not len(engine(world))


# Memory.


@pytest.mark.asyncio
async def test_an_answer_without_end_waits_for_its_reader(world: EchoWorld, peer: H2Peer) -> None:
    before = psutil.Process().memory_info().rss
    peer.send(setting(WINDOW_SIZE, 2**31 - 1), frame(WINDOW, 0, 0, u32(2**31 - 1 - 65_535)))
    peer.send(*(whole(n, "Flood") for n in range(1, 21, 2)))
    async with world.over_unix() as channel:
        for _ in range(20):
            assert await say(channel) == "hello"
    assert world.echo.sent < 100
    assert psutil.Process().memory_info().rss - before < 20 * MIB


@pytest.mark.asyncio
async def test_a_fast_reader_does_not_keep_others_waiting(world: EchoWorld, peer: H2Peer) -> None:
    peer.send(setting(WINDOW_SIZE, 2**31 - 1), frame(WINDOW, 0, 0, u32(2**31 - 1 - 65_535)))
    peer.send(whole(1, "Flood"))

    async def read() -> None:
        while await peer.reader.read(MIB):
            pass

    async with asyncio.TaskGroup() as group, world.over_unix() as channel:
        reading = group.create_task(read())
        for _ in range(20):
            assert await say(channel) == "hello"
        reading.cancel()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "sent",
    [opened(1, "Missing"), frame(PING, 0, 0, b"12345678"), whole(1, "Fail")],
    ids=["refusals", "pings", "errors"],
)
async def test_a_caller_that_asks_and_does_not_read_is_cut(
    world: EchoWorld, peer: H2Peer, sent: bytes
) -> None:
    before = psutil.Process().memory_info().rss
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    number = 1
    while not peer.writer.is_closing():
        for _ in range(50):
            peer.send(sent.replace(u32(1), u32(number)) if sent[3] == HEADERS else sent)
            number += 2
        try:
            async with asyncio.timeout(PATIENCE_S):
                await peer.writer.drain()
        except ConnectionError:
            break
        await asyncio.sleep(0)
    assert psutil.Process().memory_info().rss - before < 30 * MIB
    await until(lambda: not len(engine(world)))


@pytest.mark.asyncio
async def test_unfinished_messages_are_counted_and_given_back(world: EchoWorld) -> None:
    async with client(world.path) as peer:
        chunk = message(b"x" * 60_000, length=4 * MIB)
        for number in range(1, 101, 2):
            peer.send(opened(number, "Say"))
            for at in range(0, len(chunk), 16_000):
                peer.send(data(number, chunk[at : at + 16_000], end=False))
        await peer.ping()
        pool = engine(world).known
        assert pool.used == 50 * len(chunk) - FREE_BYTES
        peer.send(frame(RESET, 0, 1, u32(8)))
        peer.send(data(3, b"", end=True))
        assert await peer.status(3) == "3"
        await peer.ping()
        assert pool.used == 48 * len(chunk) - FREE_BYTES
    await until(lambda: not len(engine(world)))
    assert pool.used == 0


@pytest.mark.asyncio
async def test_refused_messages_do_not_make_room_for_more(world: EchoWorld, peer: H2Peer) -> None:
    for number in range(1, 201, 2):
        peer.send(opened(number, "Join"), data(number, b"\0\0", end=False))
        peer.send(data(number, b"\xff\xff\xff" + b"x" * 16_000, end=False))
        assert await peer.status(number) == "8"
    account = next(iter(engine(world)._connections)).account
    assert account.held == 0


@pytest.mark.asyncio
async def test_one_connection_holds_so_much_and_no_more(tmp_path: Path) -> None:
    limits = RpcLimits(max_held_bytes=10 * MIB)
    async with echo_world(tmp_path, rpc_limits=limits) as world, client(world.path) as peer:
        number = 1
        refused = False
        while not refused and number < 500:
            peer.send(opened(number, "Say"))
            for part in range(4):
                head = struct.pack(">BI", 0, 4 * MIB) if part == 0 else b""
                peer.send(data(number, head + b"x" * 16_000, end=False))
            number += 2
            peer.send(frame(PING, 0, 0, b"12345678"))
            while (got := await peer.next(PING, HEADERS)).kind == HEADERS:
                refused = got.fields.get("grpc-status") == "8"
        assert refused
        assert 9 * MIB < engine(world).known.used < 11 * MIB
        async with world.over_unix() as channel:  # ordinary calls of others go on
            assert await say(channel, "x" * 50_000) == "x" * 50_000


@pytest.mark.asyncio
async def test_small_requests_that_nobody_reads_close_the_window(
    world: EchoWorld, peer: H2Peer
) -> None:
    peer.send(setting(WINDOW_SIZE, 0), opened(1, "Chat"))  # it waits to answer the first request
    peer.send(data(1, HELLO, end=False))
    for _ in range(4):
        peer.send(data(1, message(b"") * 3200, end=False))
        await peer.ping()
    await peer.ping()
    peer.send(data(1, message(b"") * 3200, end=False))
    assert await peer.farewell() == "FLOW_CONTROL_ERROR"


# Many connections and streams leave nothing.


@pytest.mark.asyncio
async def test_connections_and_streams_leave_nothing_behind(world: EchoWorld) -> None:
    def alive() -> int:
        kinds = (ServerConnection, ServerStream, Half)
        return sum(isinstance(one, kinds) for one in gc.get_objects())

    async def visit(method: str) -> None:
        async with client(world.path) as peer:
            peer.send(whole(1, method), opened(3, "Chat"), data(3, HELLO, end=False))
            await peer.ping()

    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            await asyncio.gather(visit("Say"), visit("Fail"), visit("Hold"), visit("Flood"))
        async with client(world.path) as peer:
            for number in range(1, 10_001, 2):
                await works(peer, number)
        await until(lambda: not alive())  # without the garbage collector: no cycles
    finally:
        gc.enable()
    assert not engine(world).calls
    assert not engine(world).tasks._tasks
    assert world.unix.connections == 0


# The end of connections and of the server.


@pytest.mark.asyncio
async def test_calls_under_way_past_the_last_cost_nobody_the_connection(
    world: EchoWorld, peer: H2Peer
) -> None:
    peer.send(whole(1, "Hold"))
    await world.echo.held.wait()
    async with asyncio.TaskGroup() as group:
        group.create_task(world.server.close(5))
        assert (await peer.next(GOAWAY)).payload[:4] == u32(1)
        peer.send(opened(3, "Say"), data(3, HELLO[:3], end=False), data(3, HELLO[3:]))
        peer.send(frame(WINDOW, 0, 3, u32(5)), frame(RESET, 0, 3, u32(8)))
        assert (await peer.next(RESET)).code == "REFUSED_STREAM"
        await peer.ping()
        assert not world.echo.dropped.is_set()
        peer.send(frame(RESET, 0, 1, u32(8)))
        await peer.rest()


@asynccontextmanager
async def serving(path: Path, handler: Handler) -> AsyncIterator[RpcServer]:
    methods = [Method(PREFIX + "Own", StringValue, StringValue, False, False, handler)]
    server = RpcServer(methods, limits=RpcLimits(max_streams=10))
    server.add_front(UnixFront(path, 0o700))
    await server.start()
    try:
        yield server
    finally:
        await server.close(0)


@pytest.mark.asyncio
async def test_handlers_that_hold_on_take_their_callers_places(tmp_path: Path) -> None:
    running = 0
    free = asyncio.Event()

    async def own(request: StringValue, _call: Call) -> StringValue:
        nonlocal running
        running += 1
        while not free.is_set():
            try:
                await free.wait()
            except asyncio.CancelledError:
                continue
        running -= 1
        return request

    path = tmp_path / "own.sock"
    async with serving(path, own), client(path) as peer:
        for number in range(1, 101, 2):
            peer.send(whole(number, "Own"))
            await peer.ping()
            peer.send(frame(RESET, 0, number, u32(8)))
        await peer.ping()
        assert running == 10
        free.set()
        await peer.ping()
        peer.send(whole(103, "Own"))
        assert await peer.status(103) == "0"


@pytest.mark.asyncio
async def test_handlers_that_hold_on_do_not_keep_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spire_hw.rpc.h2.server._CLOSE_S", 0.1)
    running, free, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def own(request: StringValue, _call: Call) -> StringValue:
        running.set()
        while not free.is_set():
            try:
                await free.wait()
            except asyncio.CancelledError:
                continue
        gone.set()
        return request

    path = tmp_path / "own.sock"
    async with serving(path, own) as server, client(path) as peer:
        peer.send(whole(1, "Own"))
        await running.wait()
        await server.close(0)
        assert "Calls do not end" in capsys.readouterr().out
        free.set()
        await asyncio.wait_for(gone.wait(), PATIENCE_S)


@pytest.mark.asyncio
async def test_a_handler_that_gives_up_is_answered(tmp_path: Path) -> None:
    async def own(request: StringValue, _call: Call) -> StringValue:
        raise asyncio.CancelledError

    path = tmp_path / "own.sock"
    async with serving(path, own), client(path) as peer:
        peer.send(whole(1, "Own"))
        assert await peer.status(1) == "14"


@pytest.mark.asyncio
async def test_grace_is_given_and_ends(world: EchoWorld, peer: H2Peer) -> None:
    peer.send(whole(1, "Hold"))
    await world.echo.held.wait()
    await world.server.close(0.2)
    assert world.echo.dropped.is_set()
    assert GOAWAY in {one.kind for one in await peer.rest()}


@pytest.mark.asyncio
async def test_a_caller_that_answers_no_ping_is_cut(tmp_path: Path) -> None:
    limits = RpcLimits(keepalive_s=0.1, keepalive_timeout_s=0.2)
    async with echo_world(tmp_path, rpc_limits=limits) as world, client(world.path) as peer:
        peer.send(whole(1, "Hold"))
        for _ in range(3):
            ping = await peer.next(PING)
            peer.send(frame(PING, ACK, 0, ping.payload))
        assert not world.echo.dropped.is_set()
        await peer.next(PING)
        peer.send(frame(PING, ACK, 0, b"not that"))
        assert PING not in {one.kind for one in await peer.rest()}
        await asyncio.wait_for(world.echo.dropped.wait(), PATIENCE_S)


@pytest.mark.asyncio
async def test_a_caller_without_calls_is_asked_to_leave(tmp_path: Path) -> None:
    limits = RpcLimits(max_connection_idle_s=0.2)
    async with echo_world(tmp_path, rpc_limits=limits) as world, client(world.path) as peer:
        peer.send(whole(1, "Hold"))
        await world.echo.held.wait()
        await asyncio.sleep(0.5)  # a call in progress is not idleness
        assert len(engine(world)) == 1
        peer.send(frame(RESET, 0, 1, u32(8)))
        last = [
            int.from_bytes(one.payload[:4], "big")
            for one in await peer.rest()
            if one.kind == GOAWAY
        ]
        assert last == [2**31 - 1, 1]


@pytest.mark.asyncio
async def test_calls_that_outlive_their_connection_are_cut(tmp_path: Path) -> None:
    limits = RpcLimits(max_connection_age_s=0.1, max_connection_age_grace_s=1.5)
    async with echo_world(tmp_path, rpc_limits=limits) as world, client(world.path) as peer:
        peer.send(whole(1, "Hold"))
        assert [one.kind for one in await peer.rest()].count(GOAWAY) == 2
        await asyncio.wait_for(world.echo.dropped.wait(), PATIENCE_S)


@pytest.mark.asyncio
async def test_an_answer_beyond_its_limit_is_an_error(tmp_path: Path) -> None:
    limits = RpcLimits(max_response_bytes=100)
    async with echo_world(tmp_path, rpc_limits=limits) as world, client(world.path) as peer:
        peer.send(opened(1, "Say"), data(1, message(value("x" * 99))))
        assert await peer.status(1) == "8"
        await works(peer, 3)


@pytest.mark.asyncio
async def test_callers_without_certificate_have_fewer_calls(world: EchoWorld) -> None:
    async with await world.over_tcp() as channel:
        await say(channel)  # from here it knows the limit
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            begun = []
            for _ in range(20):
                call = channel.server_stream(PREFIX + "Hold", b"", StringValue)
                await stack.enter_async_context(aclosing(call))
                begun.append(group.create_task(anext(call)))  # type: ignore[arg-type]
            _done, waiting = await asyncio.wait(begun, timeout=1)
            for one in waiting:
                one.cancel()
        assert len(waiting) == 20 - TCP_RPC_LIMITS.max_stranger_streams


# Anything at all.


def some_frame(chance: random.Random) -> bytes:
    kind = chance.choice((*range(10), 0, 0, 1, 1, 1, 8, chance.randrange(256)))
    stream = chance.choice((0, 1, 1, 3, 5, 7, chance.randrange(50), chance.randrange(2**32)))
    flags = chance.choice((0, 1, 4, 5, 5, chance.randrange(256)))
    payload = chance.choice(
        (
            b"",
            HELLO,
            message(b""),
            call(chance.choice(("Say", "Chat", "Join", "Count", "Hold", "Flood", "Fail"))),
            u32(chance.choice((0, 1, 70_000, 2**31 - 1, 2**32 - 1))),
            struct.pack(">HI", chance.randrange(7), chance.choice((0, 1, 65_535, 2**31))),
            chance.randbytes(8),
            chance.randbytes(chance.randrange(100)),
        )
    )
    return frame(kind, flags, stream, payload)


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(4))
async def test_any_frames_at_all_are_survived(world: EchoWorld, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    for _ in range(100):
        async with client(world.path) as peer:
            for _ in range(chance.randrange(1, 60)):
                peer.send(some_frame(chance))
                if chance.random() < 0.1:
                    await asyncio.sleep(0)
            if chance.random() < 0.2:
                peer.send(chance.randbytes(300))
            await asyncio.sleep(0)
    async with world.over_unix() as channel:
        assert await say(channel) == "hello"
    await until(lambda: not len(engine(world)))
    assert not engine(world).calls
    assert engine(world).known.used == 0
