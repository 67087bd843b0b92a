from __future__ import annotations

import asyncio

import pytest

from spire_hw.errors import ErrorKind, LimitError, UnavailableError
from spire_hw.key import HashAlgorithm, SignOptions
from spire_hw.pkcs11.pool.backlog import Backlog, Job
from spire_hw.pkcs11.wire import SignItem, SignKey

WAIT_S = 30.0


def job(lane: bytes = b"a", *, urgent: bool = False) -> Job:
    loop = asyncio.get_running_loop()
    key = SignKey(lane, b"")
    item = SignItem(key, bytes(32), SignOptions(HashAlgorithm.SHA256, urgent=urgent))
    return Job(item, loop.create_future(), loop.time() + WAIT_S)


def refusal(one: Job) -> LimitError:
    error = one.future.exception()
    assert isinstance(error, LimitError)
    assert error.kind is ErrorKind.RESOURCE_EXHAUSTED
    return error


def let_in(backlog: Backlog, count: int) -> list[Job]:
    """Return those of so many that were let in."""
    inside = []
    for _ in range(count):
        one = job()
        try:
            backlog.add(one)
        except LimitError:
            continue
        inside.append(one)
    return inside


@pytest.mark.asyncio
async def test_as_many_wait_as_are_made_in_time() -> None:
    backlog = Backlog(1024, WAIT_S)
    backlog.learn([0.5])
    # Two a second for 27 s of the 30 s; one of them is the worker's.
    assert len(let_in(backlog, 200)) == 53
    with pytest.raises(LimitError, match=r"queue full \(53\): token signs 2 a second"):
        backlog.add(job())
    assert len(backlog) == 53


@pytest.mark.asyncio
async def test_several_workers_make_more_and_one_that_is_new_counts_as_the_others() -> None:
    backlog = Backlog(1024, WAIT_S)
    backlog.learn([0.5, 0.25, None])
    assert len(let_in(backlog, 500)) == int(0.9 * 30 * 9) - 3


@pytest.mark.parametrize("pace", [None, 0.0, 0.0002, 0.02])
@pytest.mark.asyncio
async def test_a_token_that_is_quick_or_not_known_has_the_whole_queue(pace: float | None) -> None:
    backlog = Backlog(64, WAIT_S)
    backlog.learn([pace])
    assert len(let_in(backlog, 200)) == 64
    with pytest.raises(LimitError, match=r"queue full \(64\)$"):
        backlog.add(job())
    backlog.learn([pace])
    assert len(backlog) == 64


@pytest.mark.asyncio
async def test_one_that_hardly_signs_is_asked_one_by_one() -> None:
    backlog = Backlog(64, WAIT_S)
    backlog.learn([40.0])
    assert len(let_in(backlog, 10)) == 1


@pytest.mark.asyncio
async def test_what_came_before_the_token_became_slow_is_refused_where_it_would_be_late() -> None:
    backlog = Backlog(1024, WAIT_S)
    busy = let_in(backlog, 200)
    quiet, urgent = job(b"quiet"), job(b"ca", urgent=True)
    backlog.add(quiet)
    backlog.add(urgent)
    backlog.learn([0.5])
    late = [one for one in busy if one.is_over]
    # The youngest of the busy key, and no other.
    assert late == busy[-len(late) :]
    assert 50 <= len(backlog) <= 60
    assert not quiet.is_over
    assert not urgent.is_over
    for one in late:
        assert "token signs 2 a second" in refusal(one).message


@pytest.mark.asyncio
async def test_what_a_token_did_a_while_ago_refuses_nobody() -> None:
    backlog = Backlog(64, 0.05)
    backlog.learn([0.02])
    assert len(let_in(backlog, 64)) == 1
    await asyncio.sleep(0.06)
    assert len(let_in(backlog, 64)) == 63


@pytest.mark.asyncio
async def test_one_that_is_displaced_is_told_and_one_that_was_lost_is_never_refused() -> None:
    backlog = Backlog(4, WAIT_S)
    bulk = let_in(backlog, 4)
    backlog.add(job(b"ca", urgent=True))
    refusal(bulk[3])
    backlog.again(bulk[3])
    assert len(backlog) == 5
    backlog.refuse_all(UnavailableError("gone"))
    assert len(backlog) == 0
    assert isinstance(bulk[0].future.exception(), UnavailableError)
