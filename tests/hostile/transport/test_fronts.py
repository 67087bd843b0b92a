from __future__ import annotations

import asyncio
import errno
import gc
import os
import resource
import socket
import ssl
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import pytest_asyncio
from google.protobuf.wrappers_pb2 import StringValue

from spire_hw.errors import UnavailableError
from spire_hw.transport.front import FrontLimits
from spire_hw.transport.tls import build_context
from spire_hw_sim.echo import PREFIX, TIMEOUT_S, EchoWorld, echo_world, say
from spire_hw_sim.pki import Authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from spire_hw.transport.front import Front

pytestmark = pytest.mark.usefixtures("rpc_engine")

HURRIED = FrontLimits(handshake_s=0.2, first_byte_s=0.2)


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[EchoWorld]:
    async with echo_world(tmp_path) as world:
        yield world


def client_context() -> ssl.SSLContext:
    return build_context(server_side=False, verify=ssl.CERT_NONE, roots=[], identity=None).context


async def tcp(world: EchoWorld, **more: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", world.tcp.port, **more)


async def unix(world: EchoWorld) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(str(world.path))


async def ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
        with suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


async def emptied(front: Front) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while front.connections:  # noqa: ASYNC110 - the kernel closes them, nothing tells us
            await asyncio.sleep(0.01)


async def serves_on(world: EchoWorld) -> None:
    await emptied(world.tcp)
    await emptied(world.unix)
    assert await world.who() == "anonymous"
    async with world.over_unix() as channel:
        assert await say(channel) == "hello"


JUNK = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\0" * 5000,
    os.urandom(64),
    b"PRI * HTTP/2.0\r\n\r\nSX\r\n\r\n",
]


@pytest.mark.asyncio
@pytest.mark.parametrize("junk", JUNK, ids=["http1", "zeros", "noise", "preface_misspelt"])
async def test_junk_ends_the_connection(world: EchoWorld, junk: bytes) -> None:
    for connect in (
        tcp(world),
        tcp(world, ssl=client_context(), server_hostname=""),
        unix(world),
    ):
        reader, writer = await connect
        writer.write(junk)
        await ends(reader, writer)
    await serves_on(world)
    assert len(world.echo.calls) == 2


@pytest.mark.asyncio
async def test_junk_behind_the_preface_is_grpcios_to_refuse(world: EchoWorld) -> None:
    reader, writer = await unix(world)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100)
    await ends(reader, writer)
    await serves_on(world)


@pytest.mark.asyncio
async def test_a_preface_byte_by_byte_is_still_one(world: EchoWorld) -> None:
    reader, writer = await unix(world)
    for byte in b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00":
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    assert (await asyncio.wait_for(reader.readexactly(9), TIMEOUT_S))[3] == 4  # SETTINGS
    writer.close()
    await writer.wait_closed()


@pytest.mark.asyncio
async def test_who_says_nothing_is_dropped(tmp_path: Path) -> None:
    async with echo_world(tmp_path, front_limits=HURRIED) as world:
        silent = [await tcp(world), await unix(world)]
        silent.append(await tcp(world, ssl=client_context(), server_hostname=""))
        for reader, writer in silent:
            await ends(reader, writer)
        await serves_on(world)


@pytest.mark.asyncio
async def test_a_handshake_in_drops_has_one_deadline(tmp_path: Path) -> None:
    outgoing = ssl.MemoryBIO()
    hello = client_context().wrap_bio(ssl.MemoryBIO(), outgoing)
    with suppress(ssl.SSLWantReadError):
        hello.do_handshake()
    data = outgoing.read()
    async with echo_world(tmp_path, front_limits=HURRIED) as world:
        reader, writer = await tcp(world)
        drip = iter(data)
        ended = asyncio.ensure_future(reader.read())  # noqa: TID251 - awaited below
        async with asyncio.timeout(TIMEOUT_S):
            while not ended.done():
                writer.write(bytes([next(drip)]))
                await asyncio.wait([ended], timeout=0.05)
        assert next(drip, None) is not None  # long before it was complete
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        await serves_on(world)


@pytest.mark.asyncio
async def test_connections_are_counted_by_caller_and_in_all(tmp_path: Path) -> None:
    for limits in (FrontLimits(max_per_caller=3), FrontLimits(max_connections=3)):
        async with echo_world(tmp_path, front_limits=limits) as world:
            held = [await unix(world) for _ in range(3)]
            async with asyncio.timeout(TIMEOUT_S):
                while world.unix.connections < 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await ends(*await unix(world))
            assert world.unix.connections == 3
            for reader, writer in held:
                writer.close()
                await ends(reader, writer)
            await serves_on(world)


@pytest.mark.asyncio
async def test_an_old_connection_is_cut_whatever_it_does(tmp_path: Path) -> None:
    limits = FrontLimits(max_age_s=0.2)
    async with echo_world(tmp_path, front_limits=limits) as world, world.over_unix() as channel:
        stream = channel.server_stream(PREFIX + "Hold", StringValue(), StringValue)
        assert (await anext(stream)).value == "first"
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(anext(stream), TIMEOUT_S)
        await asyncio.wait_for(world.echo.dropped.wait(), TIMEOUT_S)


@contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (top + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.asyncio
async def test_running_out_of_descriptors_does_not_end_accepting(world: EchoWorld) -> None:
    waiting = []
    with few_descriptors(6):
        with suppress(OSError):
            while True:
                one = socket.socket(socket.AF_UNIX)
                waiting.append(one)
                one.setblocking(False)
                one.connect(str(world.path))
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            os.close(os.open("/dev/null", os.O_RDONLY))
        await asyncio.sleep(0)
    for one in waiting:
        one.close()
    await serves_on(world)


@pytest.mark.asyncio
@pytest.mark.slow
async def test_refused_callers_cost_nothing_that_lasts(world: EchoWorld) -> None:
    stranger = Authority("example.org").identity(world.agent())

    async def certificate() -> None:
        async with await world.over_tcp(stranger) as channel:
            with pytest.raises(UnavailableError):
                await say(channel)

    async def junk() -> None:
        for connect in (tcp(world), unix(world)):
            reader, writer = await connect
            writer.write(b"\x16\x03\x01\xff\xff" + os.urandom(50))
            writer.write_eof()
            await ends(reader, writer)

    process = psutil.Process()

    async def round_of(count: int) -> int:
        for _ in range(count):
            await asyncio.gather(certificate(), junk(), junk())
        await emptied(world.tcp)
        await emptied(world.unix)
        gc.collect()
        return process.memory_info().rss

    await round_of(20)
    fds, rss = process.num_fds(), await round_of(20)
    assert await round_of(60) - rss < 12 * 1024 * 1024
    async with asyncio.timeout(TIMEOUT_S):  # grpcio's client closes its own in its own time
        while process.num_fds() > fds:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert not world.echo.calls
    await serves_on(world)


@pytest.mark.asyncio
async def test_a_client_that_dies_takes_its_calls_along(world: EchoWorld) -> None:
    reader, writer = await unix(world)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    await writer.drain()
    assert (await asyncio.wait_for(reader.readexactly(9), TIMEOUT_S))[3] == 4
    assert len(world.server.engine) == 1
    writer.transport.abort()
    await emptied(world.unix)
    assert len(world.server.engine) == 0


@pytest.mark.asyncio
async def test_a_certificate_chain_without_end_is_not_read(world: EchoWorld) -> None:
    long = world.authority
    for _ in range(12):
        long = long.below()
    with pytest.raises(UnavailableError):
        await world.who(long.identity(world.agent()))
    many = world.authority.identity(world.agent())
    chain = many.chain_der + tuple(Authority("x.org").der for _ in range(200))
    padded = type(many)(chain, many.private_key)
    with pytest.raises(UnavailableError):
        await world.who(padded)
    assert not world.echo.calls
    await serves_on(world)
