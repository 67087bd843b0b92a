from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import stat
import sys
from typing import TYPE_CHECKING

import psutil
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from spire_hw.errors import InvalidInputError, NotReadyError, UnavailableError
from spire_hw.rpc.server import RpcServer
from spire_hw.transport.peer import UnixPeer
from spire_hw.transport.unixfront import UnixFront
from spire_hw_sim.echo import TIMEOUT_S, Echo, echo_world, say

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("rpc_engine")

EXECUTABLE = os.path.realpath(sys.executable)
HOLD = """
import asyncio, sys
from google.protobuf.wrappers_pb2 import StringValue
from spire_hw.rpc.client import connect_unix
async def main():
    stream = connect_unix(sys.argv[1]).server_stream("/sim.Echo/Hold", StringValue(), StringValue)
    print(await anext(stream), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.asyncio
async def test_the_caller_is_the_process_that_connected(tmp_path: Path) -> None:
    async with echo_world(tmp_path) as world:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOLD, str(world.path), stdout=asyncio.subprocess.PIPE
        )
        await asyncio.wait_for(world.echo.held.wait(), TIMEOUT_S)
        peer = world.echo.calls[0].peer
        assert isinstance(peer, UnixPeer)
        process = peer.process
        assert (process.pid, process.uid, process.gid) == (child.pid, os.getuid(), os.getgid())
        assert process.alive()
        assert process.read_link("exe") == EXECUTABLE
        assert b"world" not in process.read_file("status", 10_000)
        assert f"Pid:\t{child.pid}".encode() in process.read_file("status", 10_000)
        child.send_signal(signal.SIGKILL)
        await child.communicate()
        await asyncio.wait_for(world.echo.dropped.wait(), TIMEOUT_S)
        assert not process.alive()
        with pytest.raises(UnavailableError, match="has ended"):
            process.read_link("exe")


@pytest.mark.asyncio
async def test_callers_that_leave_take_everything_with_them(tmp_path: Path) -> None:
    async with echo_world(tmp_path) as world:
        async with world.over_unix() as channel:
            await say(channel)  # what is made once is made now
        await gone(world.unix)
        before = psutil.Process().num_fds()
        for _ in range(20):
            async with world.over_unix() as channel:
                stream = channel.server_stream("/sim.Echo/Hold", StringValue(), StringValue)
                assert (await anext(stream)).value == "first"
                await stream.aclose()
        gc.collect()  # grpcio's client keeps a connection for as long as a call object lives
        await gone(world.unix)
        async with asyncio.timeout(TIMEOUT_S):  # the inner ends follow the outer ones
            while len(world.server.engine) or psutil.Process().num_fds() > before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def gone(front: UnixFront) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while front.connections:  # noqa: ASYNC110 - the kernel closes them, nothing tells us
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
@pytest.mark.parametrize("bits", [0o777, 0o770, 0o600])
async def test_modes_are_as_asked_whatever_the_umask(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "made" / "here" / "api.sock"
    server = RpcServer([])
    server.add_front(UnixFront(path, bits, directory_mode=0o755))
    old = os.umask(0o077)
    try:
        await server.start()
    finally:
        os.umask(old)
    assert mode(path) == bits
    assert mode(path.parent) == 0o755
    assert mode(path.parent.parent) == 0o755  # who may pass the last directory gets to it
    await server.close(0)
    assert not path.exists()
    assert list(path.parent.iterdir()) == []


@pytest.mark.asyncio
async def test_an_existing_directory_keeps_its_mode(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o750)  # noqa: PTH101, S103
    server = RpcServer([])
    server.add_front(UnixFront(tmp_path / "s", 0o600, directory_mode=0o755))
    await server.start()
    assert mode(tmp_path) == 0o750
    await server.close(0)


@pytest.mark.asyncio
async def test_without_directory_it_does_not_start(tmp_path: Path) -> None:
    server = RpcServer([])
    server.add_front(UnixFront(tmp_path / "missing" / "s", 0o600))
    with pytest.raises(UnavailableError, match="cannot listen"):
        await server.start()


@pytest.mark.asyncio
async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
        left_behind.listen()
    assert path.exists()
    async with echo_world(tmp_path) as world, world.over_unix() as channel:
        assert await say(channel) == "hello"


@pytest.mark.asyncio
async def test_a_live_socket_is_not_taken(tmp_path: Path) -> None:
    async with echo_world(tmp_path) as world:
        second = RpcServer([])
        second.add_front(UnixFront(world.path, 0o700))
        with pytest.raises(UnavailableError, match="another process listens"):
            await second.start()
        async with world.over_unix() as channel:
            assert await say(channel) == "hello"


@pytest.mark.asyncio
async def test_what_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "api.sock").write_text("precious")
    server = RpcServer([])
    server.add_front(UnixFront(tmp_path / "api.sock", 0o600))
    with pytest.raises(UnavailableError, match="not a socket"):
        await server.start()
    assert (tmp_path / "api.sock").read_text() == "precious"


@pytest.mark.asyncio
async def test_the_socket_of_a_successor_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    first, second = RpcServer([]), RpcServer(Echo().methods())
    first.add_front(UnixFront(path, 0o600))
    await first.start()
    path.unlink()
    second.add_front(UnixFront(path, 0o600))
    await second.start()
    await first.close(0)
    assert path.exists()
    await second.close(0)


@pytest.mark.asyncio
async def test_a_path_clients_could_not_use_is_refused(tmp_path: Path) -> None:
    server = RpcServer([])
    server.add_front(UnixFront(tmp_path / ("x" * 120), 0o600))
    with pytest.raises(InvalidInputError, match="over 107 bytes"):
        await server.start()


@pytest.mark.asyncio
async def test_fronts_and_servers_start_once(tmp_path: Path) -> None:
    async with echo_world(tmp_path) as world:
        with pytest.raises(NotReadyError):
            await world.server.start()
        with pytest.raises(NotReadyError):
            await world.unix.start(world.server.engine)
        with pytest.raises(NotReadyError):
            world.server.add_front(world.unix)


@pytest.mark.asyncio
async def test_calls_in_progress_may_finish_when_the_server_closes(tmp_path: Path) -> None:
    async with (
        echo_world(tmp_path) as world,
        world.over_unix() as channel,
        channel.bidi("/sim.Echo/Chat", StringValue) as chat,
    ):
        await chat.send(StringValue(value="a"))
        assert (await chat.receive() or StringValue()).value == "A"
        async with asyncio.TaskGroup() as group:
            closing = group.create_task(world.server.close(TIMEOUT_S))
            await chat.send(StringValue(value="b"))
            assert (await chat.receive() or StringValue()).value == "B"
            assert not closing.done()
            await chat.done_sending()
            assert await chat.receive() is None
