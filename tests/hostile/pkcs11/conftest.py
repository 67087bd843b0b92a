"""One token for each test, whose module fails as planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest_asyncio

from spire_hw_sim.tokenrig import TokenRig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest_asyncio.fixture
async def tampered(tmp_path: Path) -> AsyncIterator[TokenRig]:
    async with TokenRig(tmp_path, tampered=True) as made:
        yield made
