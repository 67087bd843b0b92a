"""What is remembered of keys across restarts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import NotReadyError, UnavailableError
from spire_hw.key import KeyType
from spire_hw_signer.notes import USE_GRAIN_S, Notes
from spire_hw_signer.rates import DAY_S

if TYPE_CHECKING:
    from pathlib import Path

P256 = KeyType.EC_P256


async def reopened(path: Path) -> Notes:
    notes = Notes(path)
    await notes.load()
    return notes


@pytest.mark.asyncio
async def test_generations_survive(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    notes = await reopened(path)
    making = notes.begin("aa", "k", P256, "", 10.0)
    notes.change(making, fingerprint="f1")
    notes.begin("bb", "k", P256, "f1", 20.0)
    await notes.save()
    again = await reopened(path)
    assert again.made() == [("k", 10.0), ("k", 20.0)]
    assert again.generation("k", "f1") == 1
    assert again.generation("k", "f2") == again.generation("l", "f1") == 0
    unfinished = again.unfinished("k", P256)
    assert unfinished is not None
    assert (unfinished.request_id, unfinished.generation) == ("bb", 2)
    assert again.unfinished("k", KeyType.EC_P384) is None
    assert again.newest == 20.0


@pytest.mark.asyncio
async def test_only_the_last_generation_can_be_unfinished(tmp_path: Path) -> None:
    notes = await reopened(tmp_path / "n")
    notes.begin("aa", "k", P256, "", 10.0)
    notes.change(notes.begin("bb", "k", P256, "", 20.0), fingerprint="f")
    assert notes.unfinished("k", P256) is None


@pytest.mark.asyncio
async def test_a_key_counts_as_used_up_to_the_next_note(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    notes = await reopened(path)
    assert notes.idle_s("k", 1000.0) is None
    assert notes.use(["k"], 1000.0)
    await notes.save_uses(["k"])
    assert not notes.use(["k"], 1000.0 + USE_GRAIN_S - 1)
    assert notes.use(["k"], 1000.0 + USE_GRAIN_S)
    await notes.save()
    assert notes.idle_s("k", 1100.0) == 40.0
    again = await reopened(path)
    assert again.idle_s("k", 1000.0 + USE_GRAIN_S) == 0.0
    assert again.idle_s("k", 1000.0 + 2 * USE_GRAIN_S + 5) == 5.0


@pytest.mark.asyncio
async def test_a_new_generation_was_not_used(tmp_path: Path) -> None:
    notes = await reopened(tmp_path / "n")
    notes.use(["k"], 1000.0)
    notes.unused("k")
    assert notes.idle_s("k", 1001.0) is None


@pytest.mark.asyncio
async def test_old_generations_are_dropped_but_not_the_last_of_a_key(tmp_path: Path) -> None:
    notes = await reopened(tmp_path / "n")
    notes.begin("aa", "a", P256, "", 0.0)
    notes.begin("bb", "b", P256, "", 0.0)
    notes.begin("cc", "b", P256, "", 3 * DAY_S)
    assert [m[0] for m in notes.made()] == ["a", "b"]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"makings": [{}], "used": {}}', b'{"makings": [], "used": {"k": "x"}}'],
)
async def test_notes_that_were_tampered_with_are_not_taken_for_none(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "notes.json"
    path.write_bytes(content)
    with pytest.raises(NotReadyError, match="not what was written"):
        await reopened(path)


@pytest.mark.asyncio
async def test_notes_that_cannot_be_written_stop_the_work(tmp_path: Path) -> None:
    notes = await reopened(tmp_path / "gone" / "notes.json")
    notes.begin("aa", "k", P256, "", 1.0)
    with pytest.raises(UnavailableError, match="nothing is signed or made"):
        await notes.save()


@pytest.mark.asyncio
async def test_a_use_is_due_until_it_is_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "notes.json"
    notes = await reopened(path)
    assert notes.use(["k"], 1000.0)
    with pytest.raises(UnavailableError, match="nothing is signed or made"):
        await notes.save_uses(["k"])
    assert notes.use(["k"], 1001.0)  # not a minute later, at once
    path.parent.mkdir()
    assert notes.use(["k", "l"], 1002.0)
    await notes.save_uses(["k", "l"])
    assert not notes.use(["k", "l"], 1003.0)
    written = path.stat().st_ino
    await notes.save_uses(["k", "l"])  # somebody else has written them: once is enough
    assert path.stat().st_ino == written
    again = await reopened(path)
    assert again.idle_s("k", 1000.0 + USE_GRAIN_S) == 0.0
    assert not again.use(["k"], 1004.0)


@pytest.mark.asyncio
async def test_what_a_clock_that_was_ahead_noted_lies_in_the_present(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    notes = await reopened(path)
    notes.change(notes.begin("aa", "k", P256, "", 900 * DAY_S), fingerprint="f")
    notes.use(["k"], 900 * DAY_S)
    await notes.save()
    for one in (notes, await reopened(path)):
        await one.believe(1000.0)
        assert one.idle_s("k", 1007.0) == 7.0
        assert one.made() == [("k", 1000.0)]
    assert (await reopened(path)).newest == 1000.0
    notes.use(["k"], 1100.0)
    await notes.believe(2000.0)
    assert notes.idle_s("k", 2000.0) == 900.0
