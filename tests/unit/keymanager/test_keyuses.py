"""Times of last use: in memory, in a file now and then, and no harm when the file is no good."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from spire_hw.aio.tasks import Tasks
from spire_hw.log import get_logger
from spire_hw.plugin.keyuses import SAVE_S, KeyUses
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from pathlib import Path

LOG = get_logger("test")


def uses(path: Path, clock: SimClock) -> KeyUses:
    made = KeyUses(path, clock=clock, log=LOG)
    made.load()
    return made


def test_uses_are_kept_over_a_restart(tmp_path: Path) -> None:
    clock, path = SimClock(), tmp_path / "uses.json"
    first = uses(path, clock)
    assert first.last("a") is None
    first.used("a")
    first.save()
    assert uses(path, clock).last("a") == clock.now().replace(microsecond=0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_is_written_when_nothing_was_used(tmp_path: Path) -> None:
    path = tmp_path / "uses.json"
    uses(path, SimClock()).save()
    assert not path.exists()


@pytest.mark.asyncio
async def test_uses_are_written_every_few_minutes(tmp_path: Path) -> None:
    clock, path = SimClock(), tmp_path / "uses.json"
    one = uses(path, clock)
    tasks = Tasks(on_failure=lambda name, error: None)
    tasks.start("uses", one.run())
    one.used("a")
    await clock.advance(timedelta(seconds=SAVE_S / 2))
    assert not path.exists()
    await clock.advance(timedelta(seconds=SAVE_S))
    assert json.loads(path.read_text()).keys() == {"a"}
    await tasks.close()


def test_a_bounded_number_of_keys_is_kept(tmp_path: Path) -> None:
    clock, path = SimClock(datetime(2026, 1, 1, tzinfo=UTC)), tmp_path / "uses.json"
    one = uses(path, clock)
    for number in range(1000):
        one.used(str(number))
    one.save()
    assert len(json.loads(path.read_text())) == 256


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"a": "b"}',
        b'{"a": -1}',
        b'{"a": true}',
        b'{"a": 1e400}',
        b"\xff",
        b"[" * 10_000,
        b" " * 100_000,
    ],
)
def test_a_file_that_is_no_good_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "uses.json"
    path.write_bytes(content)
    one = uses(path, SimClock())
    assert one.last("a") is None
    one.used("a")
    one.save()
    assert uses(path, SimClock()).last("a") is not None


def test_a_directory_that_cannot_be_written_is_no_trouble(tmp_path: Path) -> None:
    one = uses(tmp_path / "gone" / "uses.json", SimClock())
    one.used("a")
    one.save()
    assert one.last("a") is not None
