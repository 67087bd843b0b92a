"""One token for each test: as it is, on a clock that the test moves, or failing as planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw_sim.clock import SimClock
from spire_hw_sim.tokenrig import TokenRig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
def clock() -> SimClock:
    return SimClock()


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[TokenRig]:
    async with TokenRig(tmp_path) as made:
        yield made


@pytest_asyncio.fixture
async def timed(tmp_path: Path, clock: SimClock) -> AsyncIterator[TokenRig]:
    async with TokenRig(tmp_path, clock) as made:
        yield made


@pytest_asyncio.fixture
async def tampered(tmp_path: Path) -> AsyncIterator[TokenRig]:
    async with TokenRig(tmp_path, tampered=True) as made:
        yield made
