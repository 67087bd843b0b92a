"""Workload API clients that are not ours against our agent.

PyPI's `spiffe` is always there. Clients in other languages are programs named by environment
variables. Each gets the endpoint's address as its only argument and prints one JSON object a line:
what it fetched (see `EXPECTED`, serial numbers as text), then `{"source": serial}` from a source it
keeps open, then `{"rotated": serial}` for every update; it ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw_sim.parties import find_program
from spire_hw_sim.workload import Workload, eventually
from spire_hw_sim.world import World

if TYPE_CHECKING:
    from asyncio.subprocess import Process

PYTHON_CLIENT = Path(__file__).parent / "spiffe_client.py"
ID = "spiffe://sim.example/web"
EXPECTED = {
    "x509": ID,
    "chain": 1,
    "authorities": 1,
    "jwt": ID,
    "audience": ["db"],
    "validated": ID,
    "jwt_authorities": 1,
}
# A life short enough that half of it is over within the test.
TTL_S = 8

pytestmark = pytest.mark.asyncio


def clients() -> list[Any]:
    absent = importlib.util.find_spec("spiffe") is None
    skip = pytest.mark.skipif(absent, reason="PyPI's spiffe is not installed")
    made = [pytest.param([sys.executable, str(PYTHON_CLIENT)], id="python", marks=skip)]
    for language in ("go", "rust", "java"):
        variable = f"SPIFFE_{language.upper()}_CLIENT_BIN"
        program = find_program(variable, "")
        skip = pytest.mark.skipif(program is None, reason=f"{variable} is not set")
        made.append(pytest.param([str(program)], id=language, marks=skip))
    return made


async def told(client: Process) -> dict[str, Any]:
    assert client.stdout is not None
    line = await client.stdout.readline()
    if not line:
        assert client.stderr is not None
        raise AssertionError((await client.stderr.read()).decode())
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize("command", clients())
async def test_svids_bundles_tokens_and_rotation(command: list[str]) -> None:
    pipe = asyncio.subprocess.PIPE
    async with asyncio.timeout(90), World() as world, await world.agent() as agent:
        assert agent.identity.current is not None
        await world.create_entry(
            "/web", parent=agent.identity.current.spiffe_id, x509_svid_ttl=TTL_S
        )
        async with Workload(world.socket()) as workload:
            await eventually(workload.x509_svid)
        client = await asyncio.create_subprocess_exec(
            *(*command, f"unix://{world.socket()}"), stdin=pipe, stdout=pipe, stderr=pipe
        )
        first = await told(client)
        assert first.pop("serial")
        assert first == EXPECTED
        seen = [(await told(client))["source"]]
        while len(set(seen)) < 3:  # the one at the start and two rotations, on one stream
            seen.append((await told(client))["rotated"])
        assert client.stdin is not None
        client.stdin.close()
        assert await client.wait() == 0
