from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import ErrorKind, LimitError
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.keyring.budget import Allowance, Budget
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from pathlib import Path

ALLOWANCE = Allowance(per_day=12, burst=4)


async def taken(budget: Budget, key_id: str = "x509-CA-A") -> int:
    """Return how many can be taken one after the other."""
    count = 0
    while count < 100:
        try:
            await budget.take(key_id)
        except LimitError:
            break
        count += 1
    return count


@pytest.mark.asyncio
async def test_a_burst_is_allowed_and_then_one_every_two_hours(tmp_path: Path) -> None:
    clock = SimClock()
    budget = Budget(tmp_path / "budget", ALLOWANCE, clock)
    assert await taken(budget) == 4
    for _ in range(30):
        await clock.advance(timedelta(hours=2, seconds=1))
        assert await taken(budget) == 1
    await clock.advance(timedelta(days=3))
    assert await taken(budget) == 4


@pytest.mark.asyncio
async def test_who_starts_over_finds_what_was_taken(tmp_path: Path) -> None:
    clock = SimClock()
    made = 0
    for _ in range(50):
        budget = Budget(tmp_path / "budget", ALLOWANCE, clock)
        made += min(1, await taken(budget))
    assert made <= 4
    assert await taken(budget, "JWT-Signer-A") == 4


@pytest.mark.asyncio
async def test_what_left_no_key_is_given_back(tmp_path: Path) -> None:
    budget = Budget(tmp_path / "budget", ALLOWANCE, SimClock())
    for _ in range(40):
        await budget.take("a")
        await budget.give_back("a")
    await budget.give_back("a")
    assert await taken(budget, "a") == 4


@pytest.mark.asyncio
async def test_a_clock_that_goes_back_fills_nothing(tmp_path: Path) -> None:
    late = SimClock()
    await late.advance(timedelta(days=1))
    assert await taken(Budget(tmp_path / "budget", ALLOWANCE, late)) == 4
    assert await taken(Budget(tmp_path / "budget", ALLOWANCE, SimClock())) == 0


@pytest.mark.asyncio
async def test_no_limit_keeps_no_note(tmp_path: Path) -> None:
    budget = Budget(tmp_path / "budget", Allowance(per_day=0), SimClock())
    assert await taken(budget) == 100
    assert not (tmp_path / "budget").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"time": 1, "levels": {"a": "x"}}'])
@pytest.mark.asyncio
async def test_a_note_that_cannot_be_read_allows_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "budget"
    path.write_bytes(content)
    with pytest.raises(TokenError, match="remove it") as caught:
        await Budget(path, ALLOWANCE, SimClock()).take("a")
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
