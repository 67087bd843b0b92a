"""The private sockets between the relay and grpcio: for this process alone."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio

from spire_hw.rpc.grpcio.server import GrpcioEngine
from spire_hw_sim.echo import PREFIX, TIMEOUT_S, EchoWorld, echo_world, say

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("grpcio_engine")


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[EchoWorld]:
    async with echo_world(tmp_path) as world:
        yield world


def private(world: EchoWorld) -> GrpcioEngine:
    assert isinstance(world.server.engine, GrpcioEngine)
    return world.server.engine


@pytest.mark.asyncio
async def test_an_unknown_inner_peer_is_nobody(world: EchoWorld) -> None:
    async with grpc.aio.insecure_channel(f"unix:{private(world).path}") as channel:
        unary: Any = channel.unary_unary(PREFIX + "Say")
        stream: Any = channel.unary_stream(PREFIX + "Count")
        for answer in (unary(b"", timeout=TIMEOUT_S), stream(b"", timeout=TIMEOUT_S)):
            assert await answer.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not world.echo.calls


@pytest.mark.asyncio
async def test_an_abstract_name_like_ours_is_nobody(world: EchoWorld) -> None:
    async with world.over_unix() as channel:
        await say(channel)
        (taken,) = private(world)._callers._peers
        forged = taken.removeprefix("unix-abstract:")
        impostor = socket.socket(socket.AF_UNIX)
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            impostor.bind("\0" + forged)
        impostor.close()
    assert len(world.echo.calls) == 1


STRANGER = """
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n")
print(s.recv(100))
"""


@pytest.mark.asyncio
async def test_the_dialers_door_opens_for_this_process_only(world: EchoWorld) -> None:
    dialer = world.dialer()
    await dialer.start()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STRANGER, dialer.path, stdout=-1, stderr=-1
    )
    out, err = await asyncio.wait_for(child.communicate(), TIMEOUT_S)
    assert out == b"b''\n" or b"ConnectionResetError" in err or b"BrokenPipe" in err
    assert world.tcp.connections == 0
    await dialer.close()


@pytest.mark.asyncio
async def test_private_sockets_are_out_of_reach_for_others(world: EchoWorld) -> None:
    dialer = world.dialer()
    await dialer.start()
    for path in (dialer.path, private(world).path):
        assert os.stat(path).st_mode & 0o777 == 0o600  # noqa: PTH116
        assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700  # noqa: PTH116, PTH120
    await dialer.close()
    assert not os.path.exists(dialer.path)  # noqa: ASYNC240, PTH110
