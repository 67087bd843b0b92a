"""What is read again when its files change, and what happens when they are spoilt."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.files import parse_file
from spire_hw.log import get_logger
from spire_hw.tpm.castore import watch_roots
from spire_hw.tpm.certificate import encode_pem
from spire_hw.tpm.watched import Watched
from spire_hw_sim.clock import SimClock
from spire_hw_sim.pki import now
from spire_hw_sim.tpmnode import Vendor

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.asyncio
LOG = get_logger("test")
MINUTE = timedelta(seconds=61)


def _number(text: bytes) -> int:
    if not text.isdigit():
        raise InvalidInputError("holds no number")
    return int(text)


@pytest_asyncio.fixture
async def clock() -> SimClock:
    return SimClock(now())


def watch(path: Path) -> Watched[int]:
    return Watched(f"a number at {path}", lambda: [path], lambda: parse_file(path, 9, _number))


async def later(watched: Watched[int], clock: SimClock) -> int:
    await clock.advance(MINUTE)
    return await watched.current(clock, LOG)


async def test_files_are_looked_at_once_a_minute(tmp_path: Path, clock: SimClock) -> None:
    path = tmp_path / "n"
    path.write_bytes(b"1")
    watched = watch(path)
    assert await watched.current(clock, LOG) == 1
    path.write_bytes(b"2")
    await clock.advance(timedelta(seconds=59))
    assert await watched.current(clock, LOG) == 1
    await clock.advance(timedelta(seconds=2))
    assert await watched.current(clock, LOG) == 2
    assert watched.value == 2


async def test_a_file_renamed_into_place_is_seen_whatever_its_date(
    tmp_path: Path, clock: SimClock
) -> None:
    path, new = tmp_path / "n", tmp_path / "new"
    path.write_bytes(b"1")
    watched = watch(path)
    assert await watched.current(clock, LOG) == 1
    new.write_bytes(b"2")
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    new.replace(path)
    assert await later(watched, clock) == 2
    path.write_bytes(b"3")
    os.utime(path, (0, 0))
    assert await later(watched, clock) == 3


async def test_spoilt_files_change_nothing_until_they_are_mended(
    tmp_path: Path, clock: SimClock
) -> None:
    path = tmp_path / "n"
    path.write_bytes(b"1")
    watched = watch(path)
    assert await watched.current(clock, LOG) == 1
    for spoilt in (b"x", b"9" * 10, b""):
        path.write_bytes(spoilt)
        assert await later(watched, clock) == 1
    path.unlink()
    assert await later(watched, clock) == 1
    path.mkdir()
    assert await later(watched, clock) == 1
    path.rmdir()
    path.write_bytes(b"4")
    assert await later(watched, clock) == 4


async def test_faults_at_the_start_are_told(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match=r"a number at .* cannot be read: No such file"):
        watch(tmp_path / "none")
    (tmp_path / "n").write_bytes(b"x")
    with pytest.raises(InvalidInputError, match="holds no number"):
        watch(tmp_path / "n")


async def test_makers_come_and_go(tmp_path: Path, clock: SimClock) -> None:
    one, other = Vendor.make("One"), Vendor.make("Other")
    for folder in ("roots", "intermediates"):
        (tmp_path / folder).mkdir()
    (tmp_path / "roots" / "one.pem").write_bytes(encode_pem(one.root.certificate))
    watched = watch_roots(tmp_path, ["ab"])

    async def shown() -> tuple[list[bytes], list[bytes]]:
        await clock.advance(MINUTE)
        roots = await watched.current(clock, LOG)
        assert roots.pinned == {"ab"}
        return [c.der for c in roots.anchors], [c.der for c in roots.intermediates]

    assert await shown() == ([one.root.certificate], [])
    added = tmp_path / "intermediates" / "other.pem"
    added.write_bytes(encode_pem(other.intermediate.certificate))
    (tmp_path / "roots" / "other.pem").write_bytes(encode_pem(other.root.certificate))
    both = [one.root.certificate, other.root.certificate]
    assert await shown() == (both, [other.intermediate.certificate])
    (tmp_path / "roots" / "one.pem").unlink()
    assert await shown() == ([other.root.certificate], [other.intermediate.certificate])
    # The last one cannot go: an empty directory is more likely a mistake.
    (tmp_path / "roots" / "other.pem").unlink()
    assert await shown() == ([other.root.certificate], [other.intermediate.certificate])
