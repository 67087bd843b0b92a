"""A whole server on real sockets, as in the integration tests, with the machine's time."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw_server.app import Server
from spire_hw_sim.clock import SimClock
from spire_hw_sim.servers import Operator, ScriptedAgent, joined_agent, server_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

NO_LIMITS = "ratelimit { attestation = false signing = false }"


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """Return a directory whose path leaves room for socket names."""
    path = Path(tempfile.mkdtemp(prefix="srv"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def clock() -> SimClock:
    return SimClock()


@pytest_asyncio.fixture
async def server(short_dir: Path, clock: SimClock) -> AsyncIterator[Server]:
    """Return a running server with software keys and SQLite."""
    running = Server(server_settings(short_dir, key_manager="memory", more=NO_LIMITS), clock=clock)
    await running.start()
    yield running
    await running.close()


@pytest_asyncio.fixture
async def operator(server: Server) -> AsyncIterator[Operator]:
    """Return the admin socket of the server."""
    admin = Operator(server.settings.socket_path)
    yield admin
    await admin.close()


@pytest_asyncio.fixture
async def agent(server: Server, operator: Operator) -> ScriptedAgent:
    """Return an agent that joined the server."""
    return await joined_agent(server, operator)
