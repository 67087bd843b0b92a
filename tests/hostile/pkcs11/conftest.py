"""One token for each test: as it is, on a clock that the test moves, or failing as planned."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from spire_hw import log
from spire_hw_sim.clock import SimClock
from spire_hw_sim.tokenrig import TokenRig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
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


@pytest.fixture
def told() -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Give the lines logged so far under a code, each with its fields."""
    stream = io.StringIO()
    log.configure(log.LogSettings(format=log.Format.JSON), stream=stream)

    def lines(code: str) -> list[dict[str, Any]]:
        written = [json.loads(line) for line in stream.getvalue().splitlines()]
        return [line for line in written if line["msg"] == code]

    yield lines
    log.configure(log.LogSettings())
