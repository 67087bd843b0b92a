"""Our engine and an independent one talk to each other: grpcio's client to our server and back."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import status_pb2  # type: ignore[import-untyped]

from spire_hw._pb import types_pb2
from spire_hw.errors import DeniedError, DeniedReason, ErrorKind, SpireHwError
from spire_hw.rpc.client import Channel, connect_unix
from spire_hw_sim.echo import PREFIX, TIMEOUT_S, EchoWorld, echo_world, say

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

LARGE = "x" * (4 * 1024 * 1024 - 5)  # with its key and length exactly the largest request
SIZES = (0, 1, 16_379, 65_530, 65_536, 1_000_000)
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def text(value: str) -> StringValue:
    return StringValue(value=value)


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[EchoWorld]:
    async with echo_world(tmp_path) as world:
        yield world


class Foreign:
    """grpcio's client of our server."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    def method(self, shape: str, name: str) -> Any:
        make = getattr(self.channel, shape)
        return make(PREFIX + name, StringValue.SerializeToString, StringValue.FromString)

    async def say(self, value: str, **more: Any) -> str:
        more.setdefault("timeout", TIMEOUT_S)
        answer: StringValue = await self.method("unary_unary", "Say")(text(value), **more)
        return answer.value


@pytest_asyncio.fixture
async def foreign(world: EchoWorld) -> AsyncIterator[Foreign]:
    async with grpc.aio.insecure_channel(f"unix:{world.path}", options=OPTIONS) as channel:
        yield Foreign(channel)


@pytest.mark.asyncio
async def test_every_shape_of_call_to_our_server(foreign: Foreign) -> None:
    assert await foreign.say("hello") == "hello"
    count = foreign.method("unary_stream", "Count")(text(""), timeout=TIMEOUT_S)
    assert [one.value async for one in count] == ["0", "1", "2"]
    join = foreign.method("stream_unary", "Join")(map(text, "abc"), timeout=TIMEOUT_S)
    assert (await join).value == "abc"
    chat = foreign.method("stream_stream", "Chat")(timeout=TIMEOUT_S)
    for letter in "abc":
        await chat.write(text(letter))
        assert (await chat.read()).value == letter.upper()
    await chat.done_writing()
    assert await chat.read() == grpc.aio.EOF
    assert await chat.code() is grpc.StatusCode.OK


@pytest.mark.asyncio
async def test_messages_of_every_size_to_our_server(foreign: Foreign) -> None:
    for size in SIZES:
        assert await foreign.say("x" * size) == "x" * size
    assert await foreign.say(LARGE) == LARGE
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await foreign.say(LARGE + "x")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await asyncio.gather(*(foreign.say(LARGE[:500_000]) for _ in range(20)))


@pytest.mark.asyncio
async def test_many_calls_at_once_to_our_server(foreign: Foreign) -> None:
    got = await asyncio.gather(*(foreign.say(str(number)) for number in range(1000)))
    assert got == [str(number) for number in range(1000)]


@pytest.mark.asyncio
async def test_metadata_reaches_our_server(world: EchoWorld, foreign: Foreign) -> None:
    sent = (("a", "1"), ("a", "2"), ("long", "x" * 3000), ("b-bin", b"\0\xff" * 100))
    for _ in range(3):  # the second time from the dynamic table
        await foreign.say("hello", metadata=sent)
        call = world.echo.calls[-1]
        assert call.header("a") == ["1", "2"]
        assert call.header("long") == ["x" * 3000]
        assert call.header("b-bin") == []
        assert call.deadline_s is not None
        assert TIMEOUT_S - 5 < call.deadline_s < TIMEOUT_S + 1  # grpcio rounds up


@pytest.mark.asyncio
async def test_errors_of_our_server_carry_their_details(foreign: Foreign) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await foreign.method("unary_unary", "Fail")(text("AGENT_BANNED"), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert caught.value.details() == "denied"
    raw = dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]
    detail = types_pb2.PermissionDeniedDetails()
    assert status_pb2.Status.FromString(raw).details[0].Unpack(detail)
    assert detail.reason == types_pb2.PermissionDeniedDetails.AGENT_BANNED
    for name in ("NOT_FOUND", "UNAVAILABLE", "DEADLINE_EXCEEDED"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await foreign.method("unary_unary", "Fail")(text(name), timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode[name]
        assert caught.value.details() == f"secret of {name}"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await foreign.method("unary_unary", "Missing")(text(""), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.asyncio
async def test_deadline_and_cancellation_reach_our_server(
    world: EchoWorld, foreign: Foreign
) -> None:
    hold = foreign.method("unary_stream", "Hold")(text(""), timeout=0.3)
    assert (await hold.read()).value == "first"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await hold.read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(world.echo.dropped.wait(), TIMEOUT_S)
    world.echo.dropped.clear()
    hold = foreign.method("unary_stream", "Hold")(text(""))
    assert (await hold.read()).value == "first"
    hold.cancel()
    await asyncio.wait_for(world.echo.dropped.wait(), TIMEOUT_S)


@pytest.mark.asyncio
async def test_a_compressed_request_is_refused_by_our_server(foreign: Foreign) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await foreign.say("x" * 10_000, compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.asyncio
async def test_a_foreign_reader_that_rests_stops_our_server(
    world: EchoWorld, foreign: Foreign
) -> None:
    flood = foreign.method("unary_stream", "Flood")(text(""), timeout=TIMEOUT_S)
    for _ in range(5):
        await flood.read()
    await foreign.say("hello")
    before = world.echo.sent
    for _ in range(10):
        await foreign.say("hello")
    assert world.echo.sent - before < 50
    flood.cancel()


# The other way round.


class Service:
    """A service on grpcio; what it was told."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, Any]] = []
        self.left: list[float | None] = []
        self.dropped = asyncio.Event()

    async def say(self, request: StringValue, context: Any) -> StringValue:
        self.metadata.append(dict(context.invocation_metadata()))
        self.left.append(context.time_remaining())
        await context.send_initial_metadata((("x", "y"),))
        return request

    async def fail(self, request: StringValue, context: Any) -> StringValue:
        status = status_pb2.Status(code=7, message="dénied")
        status.details.add().Pack(
            types_pb2.PermissionDeniedDetails(reason=types_pb2.PermissionDeniedDetails.AGENT_BANNED)
        )
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        await context.abort(grpc.StatusCode[request.value], "dénied 100 %")
        return request

    async def count(self, _request: StringValue, _context: Any) -> AsyncIterator[StringValue]:
        for number in range(3):
            yield text(str(number))

    async def hold(self, _request: StringValue, _context: Any) -> AsyncIterator[StringValue]:
        yield text("first")
        try:
            await asyncio.Event().wait()
        finally:
            self.dropped.set()

    async def join(self, requests: AsyncIterator[StringValue], _context: Any) -> StringValue:
        return text("".join([request.value async for request in requests]))

    async def chat(
        self, requests: AsyncIterator[StringValue], _context: Any
    ) -> AsyncIterator[StringValue]:
        async for request in requests:
            yield text(request.value.upper())

    def handlers(self) -> grpc.GenericRpcHandler:
        shapes = {
            "Say": (grpc.unary_unary_rpc_method_handler, self.say),
            "Fail": (grpc.unary_unary_rpc_method_handler, self.fail),
            "Count": (grpc.unary_stream_rpc_method_handler, self.count),
            "Hold": (grpc.unary_stream_rpc_method_handler, self.hold),
            "Join": (grpc.stream_unary_rpc_method_handler, self.join),
            "Chat": (grpc.stream_stream_rpc_method_handler, self.chat),
        }
        return grpc.method_handlers_generic_handler(
            PREFIX.strip("/"),
            {
                name: make(handler, StringValue.FromString, StringValue.SerializeToString)
                for name, (make, handler) in shapes.items()
            },
        )


@asynccontextmanager
async def grpcio_server(path: Path, **more: Any) -> AsyncIterator[Service]:
    service = Service()
    options = [*OPTIONS, *more.pop("options", ())]
    server = grpc.aio.server(options=options, **more)
    server.add_generic_rpc_handlers((service.handlers(),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        yield service
    finally:
        await server.stop(0)


@pytest_asyncio.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with grpcio_server(tmp_path / "foreign.sock") as service:
        yield service


@pytest_asyncio.fixture
async def ours(service: Service, tmp_path: Path) -> AsyncIterator[Channel]:
    async with connect_unix(tmp_path / "foreign.sock") as channel:
        yield channel


@pytest.mark.asyncio
async def test_every_shape_of_call_of_our_client(ours: Channel) -> None:
    assert await say(ours) == "hello"
    count = ours.server_stream(PREFIX + "Count", text(""), StringValue, TIMEOUT_S)
    assert [one.value async for one in count] == ["0", "1", "2"]
    async with ours.bidi(PREFIX + "Join", StringValue, TIMEOUT_S) as call:
        for letter in "abc":
            await call.send(text(letter))
        await call.done_sending()
        answer = await call.receive()
        assert answer is not None
        assert answer.value == "abc"
        assert await call.receive() is None
    async with ours.bidi(PREFIX + "Chat", StringValue, TIMEOUT_S) as call:
        for letter in "abc":
            await call.send(text(letter))
            answer = await call.receive()
            assert answer is not None
            assert answer.value == letter.upper()
        await call.done_sending()
        assert await call.receive() is None


@pytest.mark.asyncio
async def test_messages_of_every_size_of_our_client(ours: Channel) -> None:
    for size in SIZES:
        assert await say(ours, "x" * size) == "x" * size
    assert await say(ours, LARGE * 3) == LARGE * 3
    assert await asyncio.gather(*(say(ours, LARGE[:500_000]) for _ in range(20)))


@pytest.mark.asyncio
async def test_many_calls_at_once_of_our_client(tmp_path: Path) -> None:
    path = tmp_path / "few.sock"
    few = [("grpc.max_concurrent_streams", 7)]
    async with grpcio_server(path, options=few), connect_unix(path) as channel:
        got = await asyncio.gather(*(say(channel, str(number)) for number in range(500)))
        assert got == [str(number) for number in range(500)]


@pytest.mark.asyncio
async def test_metadata_and_deadline_of_our_client(service: Service, ours: Channel) -> None:
    await say(ours, metadata=(("a", "1"), ("long", "x" * 3000)))
    assert service.metadata[-1]["a"] == "1"
    assert service.metadata[-1]["long"] == "x" * 3000
    assert service.metadata[-1]["user-agent"].startswith("spire-hw/")
    left = service.left[-1]
    assert left is not None
    assert TIMEOUT_S - 5 < left <= TIMEOUT_S


@pytest.mark.asyncio
async def test_errors_and_their_details_reach_our_client(ours: Channel) -> None:
    for kind in (ErrorKind.NOT_FOUND, ErrorKind.UNAVAILABLE, ErrorKind.INTERNAL):
        with pytest.raises(SpireHwError, match="dénied 100 %") as caught:
            await ours.unary(PREFIX + "Fail", text(kind.name), StringValue, TIMEOUT_S)
        assert caught.value.kind is kind
    with pytest.raises(DeniedError) as denied:
        await ours.unary(PREFIX + "Fail", text("PERMISSION_DENIED"), StringValue, TIMEOUT_S)
    assert denied.value.reason is DeniedReason.AGENT_BANNED
    with pytest.raises(SpireHwError) as caught:
        await ours.unary(PREFIX + "Missing", text(""), StringValue, TIMEOUT_S)
    assert caught.value.kind is ErrorKind.UNIMPLEMENTED


@pytest.mark.asyncio
async def test_deadline_and_cancellation_of_our_client(service: Service, ours: Channel) -> None:
    hold = ours.server_stream(PREFIX + "Hold", text(""), StringValue, 0.3)
    assert (await anext(hold)).value == "first"
    with pytest.raises(SpireHwError) as caught:
        await anext(hold)
    assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
    await asyncio.wait_for(service.dropped.wait(), TIMEOUT_S)
    service.dropped.clear()
    hold = ours.server_stream(PREFIX + "Hold", text(""), StringValue)
    assert (await anext(hold)).value == "first"
    await hold.aclose()
    await asyncio.wait_for(service.dropped.wait(), TIMEOUT_S)
    assert await say(ours) == "hello"


@pytest.mark.asyncio
async def test_a_compressed_answer_is_refused_by_our_client(tmp_path: Path) -> None:
    path = tmp_path / "gzip.sock"
    async with (
        grpcio_server(path, compression=grpc.Compression.Gzip),
        connect_unix(path) as channel,
    ):
        with pytest.raises(SpireHwError) as caught:
            await say(channel, "x" * 10_000)
        assert caught.value.kind is ErrorKind.UNIMPLEMENTED


@pytest.mark.asyncio
async def test_a_foreign_server_that_restarts_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "again.sock"
    async with connect_unix(path) as channel:
        for _ in range(3):
            async with grpcio_server(path):
                assert await say(channel) == "hello"
            with pytest.raises(SpireHwError) as caught:
                await say(channel)
            assert caught.value.kind is ErrorKind.UNAVAILABLE
