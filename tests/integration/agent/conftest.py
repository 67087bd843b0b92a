"""A server and agents in this process over real sockets; this process is the workload."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest_asyncio

from spire_hw_sim.world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    """Return a running server; whatever a test waits for comes within a minute."""
    async with asyncio.timeout(60), World() as made:
        yield made
