"""Our HTTP/2 client against servers that break its rules, and connections that end at any point."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from google.protobuf.wrappers_pb2 import StringValue

from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.rpc.client import Channel, connect_unix
from spire_hw.rpc.h2.client import H2Channel
from spire_hw.transport.dialer import Dialer
from spire_hw_sim.echo import PREFIX, TIMEOUT_S, EchoWorld, echo_world, say
from tests.hostile.transport.h2peer import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    RESET,
    SETTINGS,
    WINDOW,
    H2Peer,
    fields,
    frame,
    message,
    serving,
    setting,
    u32,
    until,
    value,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

HELLO = message(value("hello"))
FIRST = fields((":status", "200"), ("content-type", "application/grpc"))
WELL = fields(("grpc-status", "0"))
MAX_STREAMS, WINDOW_SIZE = 3, 4


def headers(number: int, block: bytes, *, end: bool = False) -> bytes:
    return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), number, block)


def data(number: int, payload: bytes) -> bytes:
    return frame(DATA, 0, number, payload)


def answer(number: int) -> bytes:
    return headers(number, FIRST) + data(number, HELLO) + headers(number, WELL, end=True)


async def asked(peer: H2Peer) -> int:
    """Wait for the next call's request and return its number."""
    while True:
        got = await peer.next(DATA)
        if got.flags & END_STREAM:
            return got.stream


async def answering(peer: H2Peer) -> None:
    """Answer every call well."""
    while True:
        peer.send(answer(await asked(peer)))


def once(*said: bytes) -> object:
    """Return a script that says something to the first call and then waits for the end."""

    async def script(peer: H2Peer) -> None:
        await asked(peer)
        peer.send(*said)
        await peer.rest()

    return script


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[EchoWorld]:
    async with echo_world(tmp_path) as world:
        yield world


HEADER_LIMIT = b"".join(fields((f"k{n}", "v")) for n in range(200))
ANSWERS: dict[str, tuple[list[bytes], ErrorKind]] = {
    "no status": ([headers(1, FIRST), headers(1, fields(("x", "y")), end=True)], ErrorKind.UNKNOWN),
    "no trailers": (
        [headers(1, FIRST), frame(DATA, END_STREAM, 1, HELLO)],
        ErrorKind.UNKNOWN,
    ),
    "a status that is no number": (
        [headers(1, FIRST), headers(1, fields(("grpc-status", "-1")), end=True)],
        ErrorKind.UNKNOWN,
    ),
    "a status nobody knows": (
        [headers(1, FIRST), headers(1, fields(("grpc-status", "9" * 90)), end=True)],
        ErrorKind.UNKNOWN,
    ),
    "well, without an answer": (
        [headers(1, FIRST), headers(1, WELL, end=True)],
        ErrorKind.INTERNAL,
    ),
    "two answers": (
        [headers(1, FIRST), data(1, HELLO * 2), headers(1, WELL, end=True)],
        ErrorKind.INTERNAL,
    ),
    "an answer cut short": (
        [headers(1, FIRST), data(1, HELLO[:-1]), headers(1, WELL, end=True)],
        ErrorKind.INTERNAL,
    ),
    "an answer that does not decode": (
        [headers(1, FIRST), data(1, message(b"\xff")), headers(1, WELL, end=True)],
        ErrorKind.INTERNAL,
    ),
    "a compressed answer": (
        [headers(1, FIRST), data(1, message(b"x", compressed=True))],
        ErrorKind.UNIMPLEMENTED,
    ),
    "an answer beyond measure": (
        [headers(1, FIRST), data(1, message(b"", length=2**31))],
        ErrorKind.RESOURCE_EXHAUSTED,
    ),
    "not gRPC": (
        [headers(1, fields((":status", "200"), ("content-type", "text/html")), end=True)],
        ErrorKind.UNKNOWN,
    ),
    "forbidden": ([headers(1, fields((":status", "403")), end=True)], ErrorKind.PERMISSION_DENIED),
    "away": ([headers(1, fields((":status", "503")), end=True)], ErrorKind.UNAVAILABLE),
    "no HTTP status": ([headers(1, fields(("grpc-status", "0")), end=True)], ErrorKind.UNKNOWN),
    "malformed": ([headers(1, FIRST + fields(("X", "y")))], ErrorKind.INTERNAL),
    "headers three times": (
        [headers(1, FIRST), data(1, HELLO), headers(1, FIRST), headers(1, WELL, end=True)],
        ErrorKind.INTERNAL,
    ),
    "reset": ([frame(RESET, 0, 1, u32(2))], ErrorKind.INTERNAL),
    "reset for a reason of its own": ([frame(RESET, 0, 1, u32(77))], ErrorKind.INTERNAL),
    "data before headers": ([data(1, HELLO)], ErrorKind.UNAVAILABLE),
    "an answer to no call": ([answer(3)], ErrorKind.UNAVAILABLE),
    "an answer on its own stream": ([answer(2)], ErrorKind.UNAVAILABLE),
    "headers beyond measure": ([headers(1, HEADER_LIMIT)], ErrorKind.UNAVAILABLE),
    "endless headers": (
        [frame(HEADERS, 0, 1, FIRST), frame(9, 0, 1, b"") * 20],
        ErrorKind.UNAVAILABLE,
    ),
    "endless first headers": (
        [headers(1, fields((":status", "103"))) * 3000],
        ErrorKind.UNAVAILABLE,
    ),
    "settings without end": ([setting(WINDOW_SIZE, 1) * 3000], ErrorKind.UNAVAILABLE),
    "acknowledgements without end": ([frame(SETTINGS, 1, 0) * 3000], ErrorKind.UNAVAILABLE),
    "pings without end": ([frame(PING, 0, 0, b"12345678") * 3000], ErrorKind.UNAVAILABLE),
    "pongs without end": ([frame(PING, 1, 0, b"12345678") * 3000], ErrorKind.UNAVAILABLE),
    "farewells without end": (
        [frame(GOAWAY, 0, 0, u32(1) + u32(0)) * 3000],
        ErrorKind.UNAVAILABLE,
    ),
    "resets without end": ([frame(RESET, 0, 1, u32(8)) * 3000], ErrorKind.CANCELLED),
    "empty data": ([headers(1, FIRST), data(1, b"") * 200], ErrorKind.UNAVAILABLE),
    "a push": ([frame(5, END_HEADERS, 1, u32(2) + FIRST)], ErrorKind.UNAVAILABLE),
}


@pytest.mark.asyncio
@pytest.mark.parametrize(("said", "kind"), ANSWERS.values(), ids=list(ANSWERS))
async def test_no_answer_is_believed_that_is_none(
    tmp_path: Path, said: list[bytes], kind: ErrorKind
) -> None:
    path = tmp_path / "s"
    async with serving(path, once(*said)), connect_unix(path) as channel:  # type: ignore[arg-type]
        with pytest.raises(SpireHwError) as caught:
            await say(channel)
        assert caught.value.kind is kind
        assert caught.value.message


@pytest.mark.asyncio
async def test_what_follows_the_end_of_an_answer_is_dropped(tmp_path: Path) -> None:
    async def script(peer: H2Peer) -> None:
        number = await asked(peer)
        peer.send(answer(number), headers(number, WELL, end=True), data(number, HELLO))
        await answering(peer)

    path = tmp_path / "s"
    async with serving(path, script) as server, connect_unix(path) as channel:
        assert await say(channel) == "hello"
        assert await say(channel) == "hello"
        assert server.connections == 1


@pytest.mark.asyncio
async def test_a_call_that_was_not_processed_is_made_again_once(tmp_path: Path) -> None:
    async def refuse_first(peer: H2Peer) -> None:
        peer.send(frame(RESET, 0, await asked(peer), u32(7)))
        await answering(peer)

    async def refuse_all(peer: H2Peer) -> None:
        while True:
            peer.send(frame(RESET, 0, await asked(peer), u32(7)))

    path = tmp_path / "one"
    async with serving(path, refuse_first), connect_unix(path) as channel:
        assert await say(channel) == "hello"
    path = tmp_path / "all"
    async with serving(path, refuse_all), connect_unix(path) as channel:
        with pytest.raises(UnavailableError, match="REFUSED_STREAM"):
            await say(channel)


@pytest.mark.asyncio
async def test_a_call_that_may_have_been_processed_is_not_made_again(tmp_path: Path) -> None:
    calls = 0

    async def begin_and_leave(peer: H2Peer) -> None:
        nonlocal calls
        while True:
            number = await asked(peer)
            calls += 1
            if calls == 3:
                return
            peer.send(headers(number, FIRST), frame(RESET, 0, number, u32(7)))

    path = tmp_path / "s"
    async with serving(path, begin_and_leave), connect_unix(path) as channel:
        for _ in range(3):
            with pytest.raises(UnavailableError):
                await say(channel)
    assert calls == 3


@pytest.mark.asyncio
async def test_calls_past_the_last_processed_one_move_to_a_new_connection(tmp_path: Path) -> None:
    async def script(peer: H2Peer) -> None:
        if server.connections > 1:
            await answering(peer)
        numbers = [await asked(peer) for _ in range(3)]
        peer.send(frame(GOAWAY, 0, 0, u32(numbers[0]) + u32(0)))
        peer.send(answer(numbers[0]))
        await peer.rest()

    path = tmp_path / "s"
    async with serving(path, script) as server, connect_unix(path) as channel:
        assert await asyncio.gather(*(say(channel) for _ in range(3))) == ["hello"] * 3
        assert server.connections == 2


@pytest.mark.asyncio
async def test_a_farewell_names_its_cause(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def leave(peer: H2Peer) -> None:
        await asked(peer)
        peer.send(frame(GOAWAY, 0, 0, u32(1) + u32(11)))

    async with serving(path, leave), connect_unix(path) as channel:
        with pytest.raises(UnavailableError, match="ENHANCE_YOUR_CALM"):
            await say(channel)


@pytest.mark.asyncio
@pytest.mark.parametrize("phase", range(5))
async def test_a_connection_lost_in_any_phase_is_made_anew(tmp_path: Path, phase: int) -> None:
    async def script(peer: H2Peer) -> None:
        if server.connections > 1:
            await answering(peer)
        if phase == 0:
            return
        number = await asked(peer)
        said = [b"", headers(number, FIRST), data(number, HELLO), frame(HEADERS, 0, number, b"")]
        peer.send(*said[:phase])

    path = tmp_path / "s"
    async with serving(path, script) as server, connect_unix(path) as channel:
        with pytest.raises(UnavailableError):
            await say(channel)
        assert await say(channel) == "hello"


@pytest.mark.asyncio
async def test_a_server_that_hangs_up_at_once_fails_calls_without_deadline(tmp_path: Path) -> None:
    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    path = tmp_path / "s"
    async with await asyncio.start_unix_server(hang_up, str(path)), connect_unix(path) as channel:
        for _ in range(50):
            async with asyncio.timeout(TIMEOUT_S):
                with pytest.raises(UnavailableError):
                    await say(channel, timeout_s=None)


# Places for calls.


@pytest.mark.asyncio
async def test_calls_wait_for_a_place_and_all_get_one(tmp_path: Path) -> None:
    most = 0

    async def script(peer: H2Peer) -> None:
        nonlocal most
        peer.send(setting(MAX_STREAMS, 0))
        peer.send(answer(await asked(peer)))  # was under way
        await asyncio.sleep(0.05)
        peer.send(setting(MAX_STREAMS, 2))
        while True:
            waiting = [await asked(peer)]
            while len(waiting) < 2:
                waiting.append(await asked(peer))
            most = max(most, len(waiting))
            peer.send(*map(answer, waiting))

    path = tmp_path / "s"
    async with serving(path, script), connect_unix(path) as channel:
        await say(channel)
        await asyncio.gather(*(say(channel) for _ in range(20)))
    assert most == 2


async def held(channel: Channel, count: int) -> list[asyncio.Task[str]]:
    """Begin calls that wait for a place."""
    tasks = [asyncio.create_task(say(channel)) for _ in range(count)]  # noqa: TID251
    await asyncio.sleep(0)
    return tasks


@pytest.mark.asyncio
async def test_no_more_than_one_call_is_made_before_the_server_has_said_how_many(
    tmp_path: Path,
) -> None:
    seen = 0

    async def script(peer: H2Peer) -> None:
        nonlocal seen
        first = await asked(peer)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await asked(peer)
                seen += 1
        peer.send(frame(SETTINGS, 0, 0), answer(first))
        numbers = [await asked(peer) for _ in range(20)]
        peer.send(*map(answer, numbers))
        await peer.rest()

    path = tmp_path / "s"
    async with serving(path, script, greets=False), connect_unix(path) as channel:
        got = await asyncio.gather(*(say(channel) for _ in range(21)))
        assert got == ["hello"] * 21
    assert seen == 0


@pytest.mark.asyncio
async def test_a_place_whose_taker_is_cancelled_goes_to_the_next(tmp_path: Path) -> None:
    async def script(peer: H2Peer) -> None:
        peer.send(setting(MAX_STREAMS, 1))
        peer.send(answer(await asked(peer)))
        first = await asked(peer)
        peer.send(answer(await asked(peer)), answer(first))
        await peer.rest()

    path = tmp_path / "s"
    async with serving(path, script), connect_unix(path) as channel:
        assert isinstance(channel, H2Channel)
        await say(channel)
        first, second, third = await held(channel, 3)
        connection = channel._connection
        assert connection is not None
        await until(lambda: len(connection._slots) == 2)
        connection.on_limit(2)  # the second is told
        second.cancel()  # and cancelled before it runs
        assert await asyncio.gather(first, third) == ["hello"] * 2
        assert second.cancelled()
        assert not connection._slots


@pytest.mark.asyncio
async def test_calls_that_give_up_waiting_leave_nothing(tmp_path: Path) -> None:
    async def script(peer: H2Peer) -> None:
        peer.send(setting(MAX_STREAMS, 1))
        peer.send(answer(await asked(peer)))
        await peer.rest()

    path = tmp_path / "s"
    async with serving(path, script), connect_unix(path) as channel:
        assert isinstance(channel, H2Channel)
        await say(channel)
        tasks = await held(channel, 20)
        connection = channel._connection
        assert connection is not None
        await until(lambda: len(connection._slots) == 19)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not connection._slots
        assert not connection.streams
        connection.on_limit(0)
        with pytest.raises(SpireHwError) as caught:
            await say(channel, timeout_s=0.05)
        assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED


@pytest.mark.asyncio
async def test_closing_a_channel_ends_those_who_wait_for_a_place(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def script(peer: H2Peer) -> None:
        peer.send(setting(MAX_STREAMS, 1))
        peer.send(answer(await asked(peer)))
        await peer.rest()

    async with serving(path, script), connect_unix(path) as channel:
        await say(channel)
        tasks = await held(channel, 5)
        await asyncio.sleep(0.05)
        await channel.close()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in got] == [UnavailableError] * 5
        with pytest.raises(UnavailableError, match="is closed"):
            await say(channel)


# Windows.


@pytest.mark.asyncio
async def test_a_request_without_a_window_waits_until_its_deadline(tmp_path: Path) -> None:
    async def script(peer: H2Peer) -> None:
        peer.send(setting(WINDOW_SIZE, 0))
        await peer.rest()

    path = tmp_path / "s"
    async with serving(path, script), connect_unix(path) as channel:
        with pytest.raises(SpireHwError) as caught:
            await say(channel, "x" * 100_000, timeout_s=0.2)
        assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
        assert isinstance(channel, H2Channel)
        assert channel._connection is not None
        assert not channel._connection.blocked


@pytest.mark.asyncio
async def test_a_message_given_up_half_way_ends_its_call(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def script(peer: H2Peer) -> None:
        await peer.next(RESET)
        peer.send(frame(WINDOW, 0, 0, u32(100_000)))
        ended.set()
        await answering(peer)

    path = tmp_path / "s"
    async with serving(path, script), connect_unix(path) as channel:
        async with channel.bidi(PREFIX + "Chat", StringValue, TIMEOUT_S) as call:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await call.send(StringValue(value="x" * 100_000))
            await asyncio.wait_for(ended.wait(), TIMEOUT_S)
            with pytest.raises(SpireHwError) as caught:
                await call.send(StringValue(value="x"))
            assert caught.value.kind is ErrorKind.CANCELLED
        assert await say(channel) == "hello"


@pytest.mark.asyncio
async def test_answers_nobody_reads_stop_coming(tmp_path: Path) -> None:
    sent = 0

    async def script(peer: H2Peer) -> None:
        nonlocal sent
        number = await asked(peer)
        peer.send(headers(number, FIRST))
        room = 256 * 1024
        piece = message(b"") * 3000
        reading = asyncio.get_running_loop().create_task(peer.next(WINDOW, stream=number))
        while not reading.done() and room >= len(piece):
            peer.send(data(number, piece))
            room -= len(piece)
            sent += 3000
            await asyncio.sleep(0.01)
        while True:
            more = await reading
            peer.send(data(number, message(value("last"))), headers(number, WELL, end=True))
            assert int.from_bytes(more.payload, "big") > 0
            await peer.rest()
            return

    path = tmp_path / "s"
    async with serving(path, script), connect_unix(path) as channel:
        stream = channel.server_stream(PREFIX + "Count", b"", StringValue, TIMEOUT_S)
        assert (await anext(stream)).value == ""
        await until(lambda: sent >= 3000 * 17)
        got = [one.value async for one in stream]
        assert got[-1] == "last"
        assert len(got) == sent


# Servers that are not there.


@pytest.mark.asyncio
async def test_a_silent_server_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spire_hw.rpc.h2.client._ALIVE_S", 0.2)

    async def script(peer: H2Peer) -> None:
        if server.connections > 1:
            await answering(peer)
        await peer.rest()

    path = tmp_path / "s"
    async with serving(path, script) as server, connect_unix(path) as channel:
        waiting = asyncio.create_task(say(channel, timeout_s=None))  # noqa: TID251
        with pytest.raises(SpireHwError) as caught:
            await say(channel, timeout_s=0.1)
        assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
        with pytest.raises(UnavailableError, match="does not answer"):
            await waiting
        assert await say(channel) == "hello"


@pytest.mark.asyncio
async def test_one_dial_serves_all_who_wait_whoever_gives_up(world: EchoWorld) -> None:
    async with await world.over_tcp() as channel:
        impatient = asyncio.create_task(say(channel))  # noqa: TID251
        patient = [asyncio.create_task(say(channel)) for _ in range(5)]  # noqa: TID251
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        impatient.cancel()
        assert await asyncio.gather(*patient) == ["hello"] * 5
        assert impatient.cancelled()
        assert world.tcp.connections == 1


@pytest.mark.asyncio
async def test_all_who_wait_are_told_why_there_is_no_connection(world: EchoWorld) -> None:
    async with await world.over_tcp() as channel:
        await world.server.close(0)
        got = await asyncio.gather(*(say(channel) for _ in range(5)), return_exceptions=True)
        for one in got:
            assert isinstance(one, UnavailableError)
            assert "cannot connect to 127.0.0.1" in one.message
            assert isinstance(one.__cause__, SpireHwError)


@pytest.mark.asyncio
async def test_closing_a_channel_ends_a_dial(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with echo_world(tmp_path) as world:
        listening = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        dialer = Dialer("127.0.0.1", port, server_id=world.server_id, bundle=None)
        channel = H2Channel("there", "there", 1 << 20, dialer)
        waiting = asyncio.create_task(say(channel, timeout_s=None))  # noqa: TID251
        with pytest.raises(SpireHwError) as caught:
            await say(channel, timeout_s=0.1)
        assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
        await channel.close()
        with pytest.raises(UnavailableError, match="is closed"):
            await waiting
        listening.close()
        await listening.wait_closed()


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(3))
async def test_any_frames_at_all_end_in_an_error_of_ours(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret

    async def script(peer: H2Peer) -> None:
        number = await asked(peer)
        for _ in range(chance.randrange(30)):
            payload = chance.choice((HELLO, FIRST, WELL, b"", u32(1), chance.randbytes(8)))
            flags = chance.choice((0, 1, 4, 5, chance.randrange(256)))
            stream = chance.choice((number, number, 0, 1, 2))
            peer.send(frame(chance.choice((0, 1, 1, *range(11))), flags, stream, payload))

    path = tmp_path / "s"
    async with serving(path, script), connect_unix(path) as channel:
        ends = await asyncio.gather(
            *(say(channel, timeout_s=None) for _ in range(150)), return_exceptions=True
        )
    assert not [one for one in ends if not isinstance(one, (str, SpireHwError))]
