"""What the agent costs: first answers, the way from a dead process to an SVID, memory.

Run: `python tests/bench/bench_agent.py`. Server and agent are the real programs, the TPM is swtpm.
Prints `name value` lines; nothing is asserted.

`workload_first_answer_p99_ms`: FetchX509SVID from call to first message, identity cached, one call
after the other on one connection; `..._new_connection_...` opens a connection for each.
`agent_start_to_svid_s`: from starting `spire-hw-agent run` on a node that is not enrolled (TPM keys,
TPM attestation) to the first X509-SVID on its Workload API; byte code is cached, as installed.
`agent_rss_mib`, `server_rss_mib`: resident after 1,000 SVIDs were issued to the agent.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from spire_hw._pb import types_pb2, workload_pb2
from spire_hw.errors import SpireHwError
from spire_hw.rpc.client import Channel, connect_unix
from spire_hw.rpc.convert import id_to_pb
from spire_hw.spiffeid import SpiffeId
from spire_hw_sim.manufacturer import EkKind, Manufacturer
from spire_hw_sim.programs import Program, run
from spire_hw_sim.servers import Operator
from spire_hw_sim.swtpm import Swtpm

if TYPE_CHECKING:
    from collections.abc import Sequence

TRUST_DOMAIN = "bench.example"
_FETCH = "/SpiffeWorkloadAPI/FetchX509SVID"
_HEADER = (("workload.spiffe.io", "true"),)
_TICK_S = 0.005

_SERVER = """
server {{
  trust_domain = "{td}"
  bind_address = "127.0.0.1"
  bind_port = {port}
  socket_path = "{d}/s.sock"
  data_dir = "{d}/server"
  ratelimit {{ signing = false attestation = false }}
}}
plugins {{
  DataStore "sql" {{
    plugin_data {{ database_type = "sqlite3" connection_string = "{d}/server/db.sqlite3" }}
  }}
  KeyManager "disk" {{ plugin_data {{ keys_path = "{d}/server/keys.json" }} }}
  NodeAttestor "tpm" {{ plugin_data {{ ek_policy = "ca" endorsement_ca_path = "{roots}" }} }}
}}
"""

_AGENT = """
agent {{
  trust_domain = "{td}"
  server_address = "127.0.0.1"
  server_port = {port}
  data_dir = "{d}/{name}"
  socket_path = "{d}/{name}.sock"
  trust_bundle_path = "{d}/bundle.pem"
  log_level = "DEBUG"
}}
plugins {{
  KeyManager "tpm" {{ plugin_data {{ tcti = "{tcti}" }} }}
  NodeAttestor "tpm" {{ plugin_data {{ tcti = "{tcti}" }} }}
  WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"""


def tell(name: str, value: float) -> None:
    """Print one figure."""
    sys.stdout.write(f"{name} {value:.2f}\n")
    sys.stdout.flush()


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that a share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def free_port() -> int:
    """Return a TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Bench:
    """A server, a node and the workloads on it."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self.directory = directory
        self.port = free_port()
        self._stack = stack
        # A real installation has byte code; tests often run without writing it.
        self._env = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(directory / "pyc")}

    async def __aenter__(self) -> Self:
        d = self.directory
        maker = Manufacturer("Bench TPM Works")
        self.tpm = Swtpm(d / "tpm", persistent_ek=False)
        self.tpm.start()
        self._stack.callback(self.tpm.stop)
        maker.equip(self.tpm, (EkKind.ECC_P256,))
        for pcr in range(8):
            self.tpm.extend_pcr(pcr, b"a boot")
        roots = maker.write_roots(d / "roots.pem")
        conf = d / "server.conf"
        conf.write_text(_SERVER.format(td=TRUST_DOMAIN, d=d, port=self.port, roots=roots))
        self.server = self.program("spire-hw-server", conf)
        self.server.wait_until_healthy("-socketPath", d / "s.sock")
        self.operator = Operator(d / "s.sock")
        self._stack.push_async_callback(self.operator.close)
        (d / "bundle.pem").write_text(
            run("spire-hw-server", "bundle", "show", "-socketPath", d / "s.sock")
        )
        run("spire-hw-agent", "validate", "-config", self.agent_conf("warm-up"), env=self._env)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def program(self, name: str, conf: Path) -> Program:
        """Start one of the programs."""
        started = Program(
            name, ["run", "-config", conf], self.directory / f"{conf.stem}.log", env=self._env
        )
        self._stack.callback(started.stop)
        return started

    def agent_conf(self, name: str) -> Path:
        """Write the configuration of an agent with a state of its own."""
        (self.directory / name).mkdir(exist_ok=True)
        conf = self.directory / f"{name}.conf"
        conf.write_text(
            _AGENT.format(
                td=TRUST_DOMAIN, d=self.directory, port=self.port, name=name, tcti=self.tpm.tcti
            )
        )
        return conf

    async def agent_id(self) -> SpiffeId:
        """Return the ID this node's TPM gives it."""
        text = run("spire-hw-agent", "tpm", "ek-hash", "-tcti", self.tpm.tcti).split()[0]
        return SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/spire/agent/tpm/{text}")

    async def create(self, parent: SpiffeId, count: int, selector: str) -> None:
        """Create entries below an agent."""
        kind, _, value = selector.partition(":")
        for start in range(0, count, 100):
            results = await self.operator.create(
                *(
                    types_pb2.Entry(
                        spiffe_id=types_pb2.SPIFFEID(
                            trust_domain=TRUST_DOMAIN, path=f"/{value.replace(':', '-')}/{i}"
                        ),
                        parent_id=id_to_pb(parent),
                        selectors=[types_pb2.Selector(type=kind, value=value)],
                    )
                    for i in range(start, min(start + 100, count))
                )
            )
            assert all(r.status.code == 0 for r in results)


async def first_answer(channel: Channel) -> workload_pb2.X509SVIDResponse | None:
    """Open the stream, take one message, hang up."""
    stream = channel.server_stream(
        _FETCH,
        workload_pb2.X509SVIDRequest(),
        workload_pb2.X509SVIDResponse,
        metadata=_HEADER,
        timeout_s=10,
    )
    try:
        return await anext(stream, None)
    finally:
        await stream.aclose()


async def wait_for_svid(path: Path, agent: Program) -> None:
    """Wait until a workload gets an SVID, asking as an eager one would."""
    while True:
        assert agent.exit_status is None, agent.log_text()
        if path.exists():  # noqa: ASYNC240 - no I/O worth a thread
            async with connect_unix(path) as channel:
                while True:
                    with suppress(SpireHwError):
                        if await first_answer(channel):
                            return
                    await asyncio.sleep(_TICK_S)
        await asyncio.sleep(_TICK_S)


async def measure_start(bench: Bench, runs: int) -> Program:
    """Print how long a node takes from nothing to an SVID; return the last agent."""
    agent_id = await bench.agent_id()
    await bench.create(agent_id, 1, f"unix:uid:{os.getuid()}")
    times = []
    agent: Program | None = None
    for number in range(runs):
        if agent is not None:
            agent.stop()
        conf = bench.agent_conf(f"a{number}")
        started = time.perf_counter()
        agent = bench.program("spire-hw-agent", conf)
        await wait_for_svid(bench.directory / f"a{number}.sock", agent)
        times.append(time.perf_counter() - started)
    assert agent is not None
    tell("agent_start_to_svid_s", quantile(times, 0.5))
    return agent


async def measure_answers(path: Path, calls: int) -> None:
    """Print how long a workload waits for its first message."""
    async with connect_unix(path) as channel:
        for _ in range(20):
            await first_answer(channel)
        times = []
        for _ in range(calls):
            started = time.perf_counter()
            assert await first_answer(channel)
            times.append(time.perf_counter() - started)
    tell("workload_first_answer_p50_ms", quantile(times, 0.5) * 1000)
    tell("workload_first_answer_p99_ms", quantile(times, 0.99) * 1000)
    times = []
    for _ in range(calls // 4):
        started = time.perf_counter()
        async with connect_unix(path) as channel:
            assert await first_answer(channel)
        times.append(time.perf_counter() - started)
    tell("workload_first_answer_new_connection_p99_ms", quantile(times, 0.99) * 1000)


async def measure_memory(bench: Bench, agent: Program, count: int) -> None:
    """Print resident memory after many SVIDs were issued."""
    tell("agent_rss_before_mib", rss_mib(agent.pid))
    tell("server_rss_before_mib", rss_mib(bench.server.pid))
    await bench.create(await bench.agent_id(), count, "unix:uid:4294967294")
    while sum(issued(agent)) < count:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    tell("agent_rss_mib", rss_mib(agent.pid))
    tell("server_rss_mib", rss_mib(bench.server.pid))


def issued(agent: Program) -> list[int]:
    """Return how many SVIDs each batch of an agent brought."""
    lines = [line for line in agent.log_text().splitlines() if "X509-SVIDs renewed" in line]
    return [int(line.split(" count=")[1].split()[0]) for line in lines]


def rss_mib(pid: int) -> float:
    """Return the resident memory of a program and its children."""
    process = psutil.Process(pid)
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True))) / 2**20


async def measure(arguments: argparse.Namespace) -> None:
    """Run all parts."""
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        async with Bench(Path(name), AsyncExitStack()) as bench:
            agent = await measure_start(bench, arguments.starts)
            path = bench.directory / f"a{arguments.starts - 1}.sock"
            await measure_answers(path, arguments.calls)
            await measure_memory(bench, agent, arguments.svids)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--calls", type=int, default=1_000)
    parser.add_argument("--svids", type=int, default=1_000)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    main()
