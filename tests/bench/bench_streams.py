"""Print `stream_kib`: memory of one idle stream on a connection of its own.

    python tests/bench/bench_streams.py [streams] [agent|unix|tls]

`agent`, the default, is a real agent with FetchX509SVID streams on its Workload API; `unix` and `tls`
are the transport alone. What grows while the streams are opened counts, in KiB a stream, after every
stream has had its first answer and rests. The clients are another process.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
from google.protobuf.wrappers_pb2 import BytesValue

from spire_hw._pb import workload_pb2
from spire_hw.aio.watch import Watch
from spire_hw.bundle.document import encode_pem
from spire_hw.errors import SpireHwError
from spire_hw.rpc.client import Channel, connect, connect_unix
from spire_hw.rpc.interceptors import RequestId
from spire_hw.rpc.server import RpcServer
from spire_hw.rpc.service import Call, Method
from spire_hw.spiffeid import SpiffeId, TrustDomain, agent_id, server_id
from spire_hw.transport.dialer import Dialer
from spire_hw.transport.tcpfront import TcpFront
from spire_hw.transport.unixfront import UnixFront
from spire_hw_sim.meter import MeteredServer, server_process, tell
from spire_hw_sim.pki import Authority
from spire_hw_sim.programs import Program
from spire_hw_sim.servers import TRUST_DOMAIN, Operator, entry_message, server_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from spire_hw.transport.front import Front

PATH: Final = "/bench.Bench/Watch"
FETCH: Final = "/SpiffeWorkloadAPI/FetchX509SVID"
HEADER: Final = (("workload.spiffe.io", "true"),)
DOMAIN: Final = "bench.example"
START_S: Final = 60.0
_CLIENT: Final = "--client"


async def client(kind: str, where: str, streams: int) -> None:
    """Open the streams, say so, and hold them until standard input closes."""
    opened = []
    for _ in range(streams):
        channel = await _channel(kind, where)
        if kind == "agent":
            first = workload_pb2.X509SVIDRequest(), workload_pb2.X509SVIDResponse
            stream = channel.server_stream(FETCH, *first, metadata=HEADER)
        else:
            stream = channel.server_stream(PATH, BytesValue(), BytesValue)
        await anext(stream)
        opened.append((channel, stream))
    sys.stdout.write("open\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    for channel, _stream in opened:
        await channel.close()


async def _channel(kind: str, where: str) -> Channel:
    if kind != "tls":
        return connect_unix(where)
    dialer = Dialer(
        "127.0.0.1", int(where), server_id=server_id(TrustDomain.parse(DOMAIN)), bundle=None
    )
    return await connect(dialer)


async def grown(pid: int, kind: str, where: str, streams: int) -> int:
    """Return how many bytes a process grows while it has so many streams."""
    process = psutil.Process(pid)
    gc.collect()
    before = process.memory_full_info().uss
    command = [sys.executable, __file__, _CLIENT, kind, where, str(streams)]
    child = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert await child.stdout.readline() == b"open\n"
    gc.collect()
    after = process.memory_full_info().uss
    await child.communicate(b"")
    return after - before


async def report(measure: Callable[[int], Awaitable[int]], streams: int) -> None:
    """Measure once with a single stream, so that what is made only once does not count, then all."""
    await measure(1)
    tell("stream_kib", await measure(streams) / streams / 1024)


async def serve(kind: str, streams: int) -> None:
    """Serve from this process and measure it."""
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
        await report(lambda count: grown(os.getpid(), kind, where, count), streams)
        await server.close(0)


def _front(kind: str, directory: Path) -> Front:
    if kind == "unix":
        return UnixFront(directory / "s", 0o600)
    authority = Authority(DOMAIN)
    identity = authority.identity(f"spiffe://{DOMAIN}/spire/server")
    bundles = {authority.trust_domain: authority.bundle()}
    return TcpFront(
        "127.0.0.1", 0, identity=lambda: identity, bundles=lambda: bundles, admit=lambda _: True
    )


def agent_config(directory: Path, port: int, token: str) -> str:
    """Return the agent's configuration."""
    return f"""
agent {{
  trust_domain = "{TRUST_DOMAIN}"
  server_address = "127.0.0.1"
  server_port = {port}
  data_dir = "{directory}/agent"
  socket_path = "{directory}/w.sock"
  trust_bundle_path = "{directory}/bundle.pem"
  join_token = "{token}"
}}
plugins {{
  KeyManager "disk" {{ plugin_data {{ directory = "{directory}/agent" }} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"""


async def prepare(server: MeteredServer, directory: Path) -> None:
    """Register this user as a workload and write what the agent needs."""
    operator = Operator(server.socket)
    token = await operator.token()
    parent = agent_id(TrustDomain.parse(TRUST_DOMAIN), "join_token", token)
    await operator.create(entry_message("/bench", parent, [f"unix:uid:{os.getuid()}"]))
    (directory / "bundle.pem").write_bytes(encode_pem(await operator.bundle()))
    (directory / "agent.conf").write_text(agent_config(directory, server.port, token))
    (directory / "agent").mkdir()
    await operator.close()


async def first_svid(socket: Path) -> SpiffeId:
    """Wait until the agent serves, and return who we are."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            async with connect_unix(socket) as channel:
                stream = channel.server_stream(
                    FETCH,
                    workload_pb2.X509SVIDRequest(),
                    workload_pb2.X509SVIDResponse,
                    metadata=HEADER,
                    timeout_s=5,
                )
                return SpiffeId.parse((await anext(stream)).svids[0].spiffe_id)
        except SpireHwError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


def measure_agent(streams: int) -> None:
    """Measure an agent's Workload API."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench")))
        more = "ratelimit { attestation = false }"
        server = stack.enter_context(server_process(directory, server_config(directory, more=more)))
        asyncio.run(prepare(server, directory))
        config = directory / "agent.conf"
        agent = Program("spire-hw-agent", ["run", "-config", config], directory / "agent.log")
        stack.callback(agent.stop)
        where = directory / "w.sock"

        async def main() -> None:
            await first_svid(where)
            await report(lambda count: grown(agent.pid, "agent", str(where), count), streams)

        asyncio.run(main())


def main() -> None:
    """Run."""
    arguments = sys.argv[1:]
    if arguments[:1] == [_CLIENT]:
        asyncio.run(client(arguments[1], arguments[2], int(arguments[3])))
        return
    streams = int(arguments[0]) if arguments else 1000
    kind = arguments[1] if len(arguments) > 1 else "agent"
    if kind == "agent":
        measure_agent(streams)
    else:
        asyncio.run(serve(kind, streams))


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    main()
