"""Callers that do not play by the rules: headers, ended processes, connections handed on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw._pb import workload_pb2 as pb
from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError
from spire_hw_sim.workload import Workload, eventually
from spire_hw_sim.world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio

# Connects and ends; its child keeps the connection and lets others talk through it.
_HEIR = """
import os, socket, sys, threading
outer = socket.socket(socket.AF_UNIX)
outer.connect(sys.argv[1])
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[2])
listening.listen()
if os.fork():
    os._exit(0)
inner, _ = listening.accept()
def copy(source, target):
    while data := source.recv(65536):
        target.sendall(data)
threading.Thread(target=copy, args=(outer, inner), daemon=True).start()
copy(inner, outer)
"""


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(asyncio.timeout(60))
        made = await stack.enter_async_context(World())
        agent = await stack.enter_async_context(await made.agent())
        assert agent.identity.current is not None
        await made.create_entry("/a", parent=agent.identity.current.spiffe_id)
        async with Workload(made.socket()) as workload:
            await eventually(workload.x509_svid)
        yield made


@pytest.mark.parametrize(
    "header",
    [
        (),
        (("workload.spiffe.io", "false"),),
        (("workload.spiffe.io", "True"),),
        (("workload.spiffe.io", "true "), ("workload.spiffe.io", "true")),
        (("workload.spiffe.io", "true"), ("workload.spiffe.io", "true")),
        (("workload-spiffe-io", "true"),),
    ],
)
async def test_every_method_demands_the_header_exactly_once(
    world: World, header: tuple[tuple[str, str], ...]
) -> None:
    async with Workload(world.socket(), header) as workload:
        attempts = (
            workload.x509_svid,
            workload.x509_bundles,
            workload.jwt_bundles,
            lambda: workload.jwt_svid(["a"]),
            lambda: workload.validate("a", "b"),
            lambda: workload.call("FetchWITSVID", pb.WITSVIDRequest(), pb.WITSVIDResponse),
        )
        for attempt in attempts:
            with pytest.raises(InvalidInputError, match="security header missing"):
                await attempt()


async def test_a_connection_left_to_a_child_is_worth_nothing(world: World) -> None:
    proxy = world.directory / "proxy.sock"
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _HEIR, str(world.socket()), str(proxy))
    )
    assert await parent.wait() == 0  # from here on only the child holds the connection
    async with Workload(proxy) as workload:
        with pytest.raises(SpireHwError) as caught:
            await workload.x509_svid()
    assert caught.value.kind in {ErrorKind.UNAUTHENTICATED, ErrorKind.UNAVAILABLE}


_ASKS = """
import asyncio, sys
from spire_hw_sim.workload import Workload
async def main():
    async with Workload(sys.argv[1]) as w, w.x509_svids() as stream:
        await anext(stream)
        print("served", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_callers_that_are_killed_leave_nothing_behind(world: World) -> None:
    before = open_files()
    for _ in range(3):
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _ASKS, str(world.socket())), stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert await child.stdout.readline() == b"served\n"
        child.kill()
        await child.wait()
    while open_files() > before:  # noqa: ASYNC110 - the kernel's list
        await asyncio.sleep(0.02)
