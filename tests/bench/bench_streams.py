"""Memory of idle server streams, each on a connection of its own.

    python tests/bench/bench_streams.py [streams] [unix|tls]

Prints `stream_kib`: growth of the server process, in KiB a stream, after every stream has had one
answer of 3,000 bytes and rests. The clients are another process.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from google.protobuf.wrappers_pb2 import BytesValue

from spire_hw.aio.watch import Watch
from spire_hw.rpc.client import connect, connect_unix
from spire_hw.rpc.interceptors import RequestId
from spire_hw.rpc.server import RpcServer
from spire_hw.rpc.service import Call, Method
from spire_hw.spiffeid import TrustDomain, server_id
from spire_hw.transport.dialer import Dialer
from spire_hw.transport.front import Front, TcpFront, UnixFront
from spire_hw_sim.pki import Authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PATH = "/bench.Bench/Watch"
DOMAIN = "bench.example"
_CLIENT = "--client"


async def client(kind: str, where: str, streams: int) -> None:
    """Open the streams, say so, and hold them until standard input closes."""
    opened = []
    for _ in range(streams):
        if kind == "unix":
            channel = connect_unix(where)
        else:
            dialer = Dialer(
                "127.0.0.1",
                int(where),
                server_id=server_id(TrustDomain.parse(DOMAIN)),
                bundle=None,
            )
            channel = await connect(dialer)
        stream = channel.server_stream(PATH, BytesValue(), BytesValue)
        await anext(stream)
        opened.append((channel, stream))
    sys.stdout.write("open\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    for channel, _stream in opened:
        await channel.close()


async def serve(kind: str, streams: int) -> None:
    """Serve and measure."""
    value = Watch(b"\0" * 3000)

    async def watch(request: BytesValue, call: Call) -> AsyncIterator[bytes]:
        async for now in value:
            yield BytesValue(value=now).SerializeToString()

    server = RpcServer([Method(PATH, BytesValue, BytesValue, False, True, watch)], [RequestId()])
    with tempfile.TemporaryDirectory() as directory:
        front = _front(kind, Path(directory))
        server.add_front(front)
        await server.start()
        where = str(front.port) if isinstance(front, TcpFront) else front.address_text
        await _measure(kind, where, 1)
        used = await _measure(kind, where, streams)
        await server.close(0)
    sys.stdout.write(f"stream_kib {used / streams / 1024:.1f} ({kind}, {streams} streams)\n")


async def _measure(kind: str, where: str, streams: int) -> int:
    process = psutil.Process()
    gc.collect()
    before = process.memory_full_info().uss
    command = [sys.executable, __file__, _CLIENT, kind, where, str(streams)]
    child = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    await child.stdout.readline()
    gc.collect()
    after = process.memory_full_info().uss
    await child.communicate(b"")
    return after - before


def _front(kind: str, directory: Path) -> Front:
    if kind == "unix":
        return UnixFront(directory / "s", 0o600)
    authority = Authority(DOMAIN)
    identity = authority.identity(f"spiffe://{DOMAIN}/spire/server")
    bundles = {authority.trust_domain: authority.bundle()}
    return TcpFront(
        "127.0.0.1", 0, identity=lambda: identity, bundles=lambda: bundles, admit=lambda _: True
    )


def main() -> None:
    """Run."""
    arguments = sys.argv[1:]
    if arguments[:1] == [_CLIENT]:
        asyncio.run(client(arguments[1], arguments[2], int(arguments[3])))
        return
    streams = int(arguments[0]) if arguments else 1000
    kinds = arguments[1:] or ["unix", "tls"]
    if len(kinds) == 1:
        asyncio.run(serve(kinds[0], streams))
        return
    for kind in kinds:  # a process each: memory the first one freed would serve the second
        subprocess.run([sys.executable, __file__, str(streams), kind], check=True)  # noqa: S603 - ourselves


if __name__ == "__main__":
    main()
