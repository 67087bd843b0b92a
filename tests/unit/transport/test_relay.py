from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw.transport.half import Half
from spire_hw.transport.peer import TcpPeer
from spire_hw.transport.relay import Callers, PrivateDirectory, join

if TYPE_CHECKING:
    from pathlib import Path

PEER = TcpPeer("10.0.0.1", 1, None, ())


async def half(**more: object) -> tuple[Half, socket.socket]:
    """Return a connected end and the socket of its peer."""
    near, far = socket.socketpair()
    far.setblocking(False)
    made = Half(**more)  # type: ignore[arg-type]
    await asyncio.get_running_loop().create_connection(lambda: made, sock=near)
    return made, far


async def read(far: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size and (more := await loop.sock_recv(far, size - len(data))):
        data += more
    return data


@pytest.mark.asyncio
async def test_bytes_that_came_early_arrive_first() -> None:
    (one, far_one), (two, far_two) = await half(begins=b"he"), await half()
    far_one.send(b"hello")
    await one.begun()
    join(one, two)
    far_one.send(b" world")
    assert await read(far_two, 11) == b"hello world"
    far_two.send(b"back")
    assert await read(far_one, 4) == b"back"
    far_one.close()
    assert await read(far_two, 1) == b""
    far_two.close()


@pytest.mark.asyncio
async def test_another_beginning_is_told() -> None:
    one, far = await half(begins=b"hello")
    far.send(b"help")
    with pytest.raises(InvalidInputError):
        await one.begun()
    one.abort()
    far.close()


@pytest.mark.asyncio
async def test_an_end_before_the_beginning_is_told() -> None:
    one, far = await half(begins=b"hello")
    far.send(b"he")
    far.close()
    with pytest.raises(UnavailableError):
        await one.begun()


@pytest.mark.asyncio
async def test_little_is_read_before_joining() -> None:
    (one, far_one), (two, far_two) = await half(begins=b"x"), await half()
    sent = b"x" + os.urandom(1 << 20)
    loop = asyncio.get_running_loop()
    sending = loop.create_task(loop.sock_sendall(far_one, sent))
    await one.begun()
    assert one.transport is not None
    for _ in range(1000):
        if not one.transport.is_reading():
            break
        await asyncio.sleep(0.01)
    assert one._gate is not None
    assert len(one._gate.data) < 1 << 17
    join(one, two)
    assert await read(far_two, len(sent)) == sent
    await sending
    for end in (one, two):
        end.abort()
    far_one.close()
    far_two.close()


@pytest.mark.asyncio
async def test_a_full_end_stops_the_other_and_nothing_is_lost() -> None:
    (one, far_one), (two, far_two) = await half(), await half()
    join(one, two)
    assert one.transport is not None
    block = os.urandom(1 << 16)
    sent = bytearray()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        while one.transport.is_reading() or len(sent) < 1 << 20:
            try:
                sent += block[: far_one.send(block)]
            except BlockingIOError:
                if not one.transport.is_reading():
                    break
            await asyncio.sleep(0)
        assert not one.transport.is_reading()
        assert two.transport is not None
        assert two.transport.get_write_buffer_size() <= 1 << 18
        assert await read(far_two, len(sent)) == bytes(sent)
        await loop.sock_sendall(far_one, b"on")
        assert await read(far_two, 2) == b"on"
    far_one.close()
    far_two.close()
    one.abort()


@pytest.mark.asyncio
async def test_the_end_of_one_is_the_end_of_both_and_is_told_once() -> None:
    told: list[str] = []
    one, far_one = await half(on_end=lambda: told.append("one"))
    two, far_two = await half(on_end=lambda: told.append("two"))
    join(one, two)
    far_two.shutdown(socket.SHUT_WR)
    assert await read(far_one, 1) == b""
    assert await read(far_two, 1) == b""
    assert sorted(told) == ["one", "two"]
    far_one.close()
    far_two.close()


@pytest.mark.asyncio
async def test_callers_know_who_is_on_which_name() -> None:
    callers = Callers()
    names: list[str] = []
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        names.append("unix-abstract:" + writer.get_extra_info("peername")[1:].decode())
        writer.write(await reader.readexactly(1))
        await reader.read()
        writer.close()
        closed.set()

    inner = await asyncio.start_unix_server(serve, callers.path)
    one, far = await half(begins=b"")
    far.send(b"x")
    await callers.attach(one, PEER)
    assert await read(far, 1) == b"x"
    assert callers.of(names[0]) is PEER
    assert callers.of("unix:") is None
    assert list(callers) == [PEER]
    far.close()
    async with asyncio.timeout(10):
        while len(callers):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await closed.wait()
    inner.close()
    await inner.wait_closed()
    callers.close()


@pytest.mark.asyncio
async def test_without_inner_server_nothing_is_kept() -> None:
    callers = Callers()
    one, far = await half(begins=b"")
    with pytest.raises(UnavailableError):
        await callers.attach(one, PEER)
    assert len(callers) == 0
    one.abort()
    far.close()
    callers.close()


def test_what_killed_processes_left_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "spire-hw-rpc-left"
    left.mkdir(mode=0o700)
    other = tmp_path / "precious"
    other.mkdir()
    live = PrivateDirectory()
    second = PrivateDirectory()
    assert not left.exists()
    assert other.exists()
    assert live.path.exists()
    assert live.path.stat().st_mode & 0o777 == 0o700
    for directory in (live, second):
        directory.remove()
        assert not directory.path.exists()
