from __future__ import annotations

import asyncio
import gc
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
import pytest_asyncio
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]
from typing_extensions import override

from spire_hw.errors import (
    DeniedError,
    DeniedReason,
    ErrorKind,
    InvalidInputError,
    LimitError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.log import LateLogger
from spire_hw.rpc.client import connect_unix
from spire_hw.rpc.health import health_methods
from spire_hw.rpc.interceptors import Guard, RequestId, RequiredHeader
from spire_hw.rpc.server import RpcLimits, RpcServer
from spire_hw.transport.unixfront import UnixFront
from spire_hw_sim.echo import PREFIX, TIMEOUT_S, EchoWorld, echo_world, say

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from spire_hw.rpc.client import Channel
    from spire_hw.rpc.service import Call, Response, StreamNext, UnaryNext

pytestmark = pytest.mark.usefixtures("rpc_engine")


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[EchoWorld]:
    async with echo_world(tmp_path) as world:
        yield world


@pytest_asyncio.fixture
async def channel(world: EchoWorld) -> AsyncIterator[Channel]:
    async with world.over_unix() as channel:
        yield channel


async def call(channel: Channel, name: str, text: str = "") -> str:
    request = StringValue(value=text)
    answer = await channel.unary(PREFIX + name, request, StringValue, TIMEOUT_S)
    return answer.value


async def stream(channel: Channel, name: str, text: str = "") -> list[str]:
    request = StringValue(value=text)
    answers = channel.server_stream(PREFIX + name, request, StringValue, TIMEOUT_S)
    return [answer.value async for answer in answers]


@pytest.mark.asyncio
async def test_a_handler_may_answer_in_the_middle_of_its_work(
    world: EchoWorld, channel: Channel
) -> None:
    async with channel.bidi(PREFIX + "Ask", StringValue, TIMEOUT_S) as asked:
        await asked.send(StringValue(value="a"))
        question = await asked.receive()
        assert question is not None
        assert question.value == "a?"
        await asked.send(StringValue(value="b"))
        answer = await asked.receive()
        assert answer is not None
        assert answer.value == "ab"
        await asked.done_sending()
        assert await asked.receive() is None
    await call(channel, "Say", "x")
    with pytest.raises(SpireHwError, match="no further response"):
        await world.echo.calls[-1].reply(StringValue(value="more"))


@pytest.mark.asyncio
async def test_every_shape_of_call(channel: Channel) -> None:
    assert await call(channel, "Say", "x") == "x"
    assert await call(channel, "Raw", "x") == "x"
    assert await stream(channel, "Count") == ["0", "1", "2"]
    async with channel.bidi(PREFIX + "Chat", StringValue, TIMEOUT_S) as chat:
        for text in ("a", "b"):
            await chat.send(StringValue(value=text))
            answer = await chat.receive()
            assert answer is not None
            assert answer.value == text.upper()
        await chat.done_sending()
        assert await chat.receive() is None
    async with channel.bidi(PREFIX + "Join", StringValue, TIMEOUT_S) as join:
        for text in ("a", "b"):
            await join.send(StringValue(value=text))
        await join.done_sending()
        answer = await join.receive()
        assert answer is not None
        assert answer.value == "ab"


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", list(ErrorKind))
async def test_every_kind_of_error_arrives_as_itself(channel: Channel, kind: ErrorKind) -> None:
    with pytest.raises(SpireHwError) as e:
        await call(channel, "Fail", kind.name)
    assert e.value.kind is kind
    hidden = kind in {ErrorKind.INTERNAL, ErrorKind.UNKNOWN}
    assert ("secret" in e.value.message) is not hidden


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", list(DeniedReason))
async def test_the_reason_of_a_refusal_arrives(channel: Channel, reason: DeniedReason) -> None:
    with pytest.raises(DeniedError) as e:
        await call(channel, "Fail", reason.name)
    assert e.value.reason is reason


@pytest.mark.asyncio
async def test_a_stream_may_end_in_a_refusal(channel: Channel) -> None:
    answers = channel.server_stream(
        PREFIX + "Count", StringValue(value="x"), StringValue, TIMEOUT_S
    )
    assert [(await anext(answers)).value for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(DeniedError) as e:
        await anext(answers)
    assert e.value.reason is DeniedReason.AGENT_BANNED


@pytest.mark.asyncio
async def test_a_conversation_may_end_in_a_refusal(channel: Channel) -> None:
    async with channel.bidi(PREFIX + "Chat", StringValue, TIMEOUT_S) as chat:
        await chat.send(StringValue(value="deny"))
        with pytest.raises(DeniedError) as e:
            await chat.receive()
        assert e.value.reason is DeniedReason.AGENT_MUST_REATTEST
        with pytest.raises(DeniedError):
            await chat.send(StringValue(value="more"))


@pytest.mark.asyncio
async def test_a_bug_shows_nothing_to_the_caller(channel: Channel) -> None:
    with pytest.raises(SpireHwError) as e:
        await call(channel, "Fail", "a bug")
    assert (e.value.kind, e.value.message) == (ErrorKind.INTERNAL, "internal error")


@pytest.mark.asyncio
async def test_operators_see_internal_errors_but_no_bugs(tmp_path: Path) -> None:
    async with echo_world(tmp_path, show_internal=True) as world, world.over_unix() as channel:
        with pytest.raises(SpireHwError, match="secret of INTERNAL"):
            await call(channel, "Fail", "INTERNAL")
        with pytest.raises(SpireHwError, match=r"^internal error$"):
            await call(channel, "Fail", "a bug")


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/sim.Echo/Nothing", "/no.Service/Say", "/x"])
async def test_a_missing_method_is_unimplemented(channel: Channel, path: str) -> None:
    with pytest.raises(SpireHwError) as e:
        await channel.unary(path, StringValue(), StringValue, TIMEOUT_S)
    assert e.value.kind is ErrorKind.UNIMPLEMENTED


async def send_unary(channel: Channel, path: str, raw: bytes) -> None:
    await channel.unary(path, raw, StringValue, TIMEOUT_S)


async def send_stream(channel: Channel, path: str, raw: bytes) -> None:
    await anext(channel.server_stream(path, raw, StringValue, TIMEOUT_S))


async def send_bidi(channel: Channel, path: str, raw: bytes) -> None:
    async with channel.bidi(path, StringValue, TIMEOUT_S) as both:
        await both.send(raw)
        await both.receive()


SENDERS = {"Say": send_unary, "Count": send_stream, "Join": send_bidi, "Chat": send_bidi}


@pytest.mark.asyncio
@pytest.mark.parametrize("shape", list(SENDERS))
async def test_an_undecodable_request_is_an_invalid_argument(channel: Channel, shape: str) -> None:
    with pytest.raises(InvalidInputError, match="does not decode"):
        await SENDERS[shape](channel, PREFIX + shape, b"\xff\xff\xff")


@pytest.mark.asyncio
@pytest.mark.slow
async def test_undecodable_requests_cost_no_memory(channel: Channel) -> None:
    bad = b"\xff\xff\xff"

    async def one() -> None:
        with pytest.raises(InvalidInputError):
            await channel.unary(PREFIX + "Say", bad, StringValue, TIMEOUT_S)

    process = psutil.Process()
    sizes = []
    for _ in range(3):
        for _ in range(20):
            await asyncio.gather(*(one() for _ in range(50)))
        gc.collect()
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[0] < 8 * 1024 * 1024


@pytest.mark.asyncio
async def test_an_oversized_request_is_refused_and_the_connection_lives(channel: Channel) -> None:
    with pytest.raises(LimitError):
        await say(channel, "x" * (4 * 1024 * 1024 + 1))
    assert len(await say(channel, "x" * (4 * 1024 * 1024 - 100))) > 4_000_000


@pytest.mark.asyncio
async def test_oversized_headers_are_refused(channel: Channel) -> None:
    with pytest.raises(SpireHwError):
        await say(channel, metadata=(("x-large", "v" * 100_000),))
    async with asyncio.timeout(TIMEOUT_S):  # the connection may be lost over it
        while True:
            with suppress(UnavailableError):
                assert await say(channel) == "hello"
                break


@pytest.mark.asyncio
async def test_a_compressed_request_is_not_unpacked(world: EchoWorld) -> None:
    async with grpc.aio.insecure_channel(
        f"unix:{world.path}", compression=grpc.Compression.Gzip
    ) as channel:
        packed = StringValue(value="x" * 2_000_000).SerializeToString()
        bomb: Any = channel.unary_unary(PREFIX + "Say")
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await bomb(packed, timeout=TIMEOUT_S)
        assert e.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not world.echo.calls


@pytest.mark.asyncio
async def test_a_deadline_reaches_the_handler_and_ends_the_call(
    world: EchoWorld, channel: Channel
) -> None:
    answers = channel.server_stream(PREFIX + "Hold", StringValue(), StringValue, 0.3)
    assert (await anext(answers)).value == "first"
    left = world.echo.calls[0].deadline_s
    assert left is not None
    assert 0 < left <= 0.3
    with pytest.raises(SpireHwError) as e:
        await anext(answers)
    assert e.value.kind is ErrorKind.DEADLINE_EXCEEDED
    await asyncio.wait_for(world.echo.dropped.wait(), TIMEOUT_S)


@pytest.mark.asyncio
async def test_a_cancelled_call_cancels_its_handler(world: EchoWorld, channel: Channel) -> None:
    answers = channel.server_stream(PREFIX + "Hold", StringValue(), StringValue)
    assert (await anext(answers)).value == "first"
    assert world.echo.calls[0].deadline_s is None
    await answers.aclose()
    await asyncio.wait_for(world.echo.dropped.wait(), TIMEOUT_S)


@pytest.mark.asyncio
async def test_a_cancelled_task_stays_cancelled(world: EchoWorld, channel: Channel) -> None:
    task = asyncio.ensure_future(stream(channel, "Hold"))  # noqa: TID251 - cancelled below
    await asyncio.wait_for(world.echo.held.wait(), TIMEOUT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(world.echo.dropped.wait(), TIMEOUT_S)


@pytest.mark.asyncio
async def test_closing_a_channel_ends_its_calls_with_a_word(world: EchoWorld) -> None:
    channel = world.over_unix()
    task = asyncio.ensure_future(stream(channel, "Hold"))  # noqa: TID251 - awaited below
    await asyncio.wait_for(world.echo.held.wait(), TIMEOUT_S)
    await channel.close()
    with pytest.raises(UnavailableError, match="closed"):
        await task
    with pytest.raises(UnavailableError, match="closed"):
        await say(channel)


@pytest.mark.asyncio
async def test_a_socket_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    async with connect_unix(tmp_path / "none") as channel:
        with pytest.raises(UnavailableError, match="cannot connect to"):
            await say(channel)


@pytest.mark.asyncio
async def test_headers_reach_the_handler(world: EchoWorld, channel: Channel) -> None:
    await say(channel, metadata=(("a", "1"), ("a", "2"), ("b", "3")))
    seen = world.echo.calls[0]
    assert (seen.header("a"), seen.header("b"), seen.header("c")) == (["1", "2"], ["3"], [])


@pytest.mark.asyncio
async def test_the_security_header_is_demanded_where_it_belongs(tmp_path: Path) -> None:
    header = RequiredHeader("workload.spiffe.io", "true", PREFIX)
    wrong = [(), ("false",), ("true", "true"), ("TRUE",)]
    async with (
        echo_world(tmp_path, interceptors=[header]) as world,
        world.over_unix() as channel,
    ):
        for values in wrong:
            with pytest.raises(InvalidInputError, match="security header missing"):
                await say(channel, metadata=[("workload.spiffe.io", value) for value in values])
        assert await say(channel, metadata=[("workload.spiffe.io", "true")]) == "hello"
        assert len(world.echo.calls) == 1


class Order(Guard):
    def __init__(self, name: str, seen: list[str]) -> None:
        self.name = name
        self.seen = seen

    @override
    async def check(self, request: Any, call: Call) -> None:
        self.seen.append(self.name)
        if isinstance(request, StringValue) and request.value == self.name:
            raise DeniedError(f"stopped by {self.name}")


class CallLog:
    """Notes how each call ended."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, ErrorKind | None]] = []

    async def unary(self, request: Any, call: Call, proceed: UnaryNext) -> Response:
        with self._noted(call):
            return await proceed(request, call)

    async def stream(
        self, request: Any, call: Call, proceed: StreamNext
    ) -> AsyncIterator[Response]:
        with self._noted(call):
            async for response in proceed(request, call):
                yield response

    @contextmanager
    def _noted(self, call: Call) -> Iterator[None]:
        try:
            yield
        except SpireHwError as e:
            self.ended.append((call.method, e.kind))
            raise
        self.ended.append((call.method, None))


@pytest.mark.asyncio
async def test_interceptors_run_in_order_around_every_shape(tmp_path: Path) -> None:
    seen: list[str] = []
    log = CallLog()
    chain = [RequestId(), log, Order("one", seen), Order("two", seen)]
    async with (
        echo_world(tmp_path, interceptors=chain) as world,
        world.over_unix() as channel,
    ):
        await say(channel)
        with pytest.raises(DeniedError, match="stopped by one"):
            await say(channel, "one")
        assert seen == ["one", "two", "one"]
        await stream(channel, "Count")
        with pytest.raises(DeniedError, match="stopped by two"):
            await stream(channel, "Count", "two")
        assert seen == ["one", "two"] * 1 + ["one"] + ["one", "two"] * 2
        assert log.ended == [
            (PREFIX + "Say", None),
            (PREFIX + "Say", ErrorKind.PERMISSION_DENIED),
            (PREFIX + "Count", None),
            (PREFIX + "Count", ErrorKind.PERMISSION_DENIED),
        ]
        assert isinstance(world.echo.calls[0].log, LateLogger)


@pytest.mark.asyncio
async def test_too_many_calls_at_once_are_refused(tmp_path: Path) -> None:
    async with (
        echo_world(tmp_path, rpc_limits=RpcLimits(max_calls=1)) as world,
        world.over_unix() as channel,
    ):
        held = channel.server_stream(PREFIX + "Hold", StringValue(), StringValue)
        await anext(held)
        with pytest.raises(LimitError):
            await say(channel)
        await held.aclose()


@pytest.mark.asyncio
async def test_a_reader_that_rests_stops_the_sender(world: EchoWorld, channel: Channel) -> None:
    flood = channel.server_stream(PREFIX + "Flood", StringValue(), StringValue)
    await anext(flood)
    sent = -1
    async with asyncio.timeout(TIMEOUT_S):
        while sent != world.echo.sent:  # until it comes to rest
            sent = world.echo.sent
            for _ in range(10):
                await say(channel)
    assert world.echo.sent < 200  # 20 MB of an endless stream
    for _ in range(300):
        await anext(flood)
    assert world.echo.sent >= 300
    await flood.aclose()


@pytest.mark.asyncio
async def test_health_is_what_the_host_says(tmp_path: Path) -> None:
    healthy = [True]

    async def check() -> bool:
        return healthy[0]

    server = RpcServer(health_methods(check))
    server.add_front(UnixFront(tmp_path / "s", 0o600))
    await server.start()
    try:
        async with connect_unix(tmp_path / "s") as channel:
            path, request = "/grpc.health.v1.Health/", health_pb2.HealthCheckRequest
            answer_type = health_pb2.HealthCheckResponse
            answer = await channel.unary(path + "Check", request(), answer_type, TIMEOUT_S)
            assert answer.status == answer_type.SERVING
            watched = channel.server_stream(path + "Watch", request(), answer_type, TIMEOUT_S)
            assert (await anext(watched)).status == answer_type.SERVING
            await watched.aclose()
            healthy[0] = False
            answer = await channel.unary(path + "Check", request(), answer_type, TIMEOUT_S)
            assert answer.status == answer_type.NOT_SERVING
            with pytest.raises(InvalidInputError):
                await channel.unary(path + "Check", request(service="x"), answer_type, TIMEOUT_S)
    finally:
        await server.close(0)
