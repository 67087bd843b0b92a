from __future__ import annotations

from dataclasses import dataclass

import pytest

from spire_hw.aio.queues import Queues


@dataclass(eq=False)
class Job:
    lane: bytes
    number: int = 0
    is_urgent: bool = False
    is_over: bool = False


def filled(*jobs: Job) -> Queues[Job]:
    queues: Queues[Job] = Queues()
    for job in jobs:
        queues.push(job)
    return queues


def test_lanes_take_turns_and_keep_their_order() -> None:
    busy = [Job(b"busy", n) for n in range(100)]
    quiet = [Job(b"quiet", n) for n in range(3)]
    queues = filled(*busy, *quiet)
    first = queues.take(8)
    assert [job for job in first if job.lane == b"busy"] == busy[:5]
    assert [job for job in first if job.lane == b"quiet"] == quiet
    assert len(queues) == 103 - len(first)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_every_job_comes_out_once(size: int) -> None:
    jobs = [Job(bytes([n % 5]), n, is_urgent=n % 3 == 0) for n in range(200)]
    queues = filled(*jobs)
    out: list[Job] = []
    while len(queues):
        some = queues.take(size)
        assert 1 <= len(some) <= size
        out += some
    assert sorted(job.number for job in out) == list(range(200))


def test_what_is_urgent_goes_first_but_not_for_ever() -> None:
    bulk = [Job(b"jwt", n) for n in range(100)]
    queues = filled(*bulk)
    for n in range(100):
        queues.push(Job(b"ca", n, is_urgent=True))
    order = [queues.take(1)[0] for _ in range(200)]
    assert all(job.is_urgent for job in order[:16])
    gaps = "".join("u" if job.is_urgent else "b" for job in order[:102])
    assert gaps == ("u" * 16 + "b") * 6
    assert [job.number for job in order if job.is_urgent] == list(range(100))


def test_a_job_that_was_lost_goes_to_the_head_of_its_lane() -> None:
    queues = filled(Job(b"a", 1), Job(b"a", 2))
    queues.push(Job(b"a", 0), first=True)
    assert [job.number for job in queues.take(3)] == [0, 1, 2]


def test_who_gave_up_is_not_served_and_takes_no_room() -> None:
    jobs = [Job(b"a", n) for n in range(4)] + [Job(b"b", n) for n in range(4)]
    queues = filled(*jobs)
    for job in jobs[:2]:
        job.is_over = True
    queues.drop_over()
    assert len(queues) == 6
    jobs[3].is_over = True
    taken = queues.take(6)
    assert jobs[3] not in taken
    assert len(taken) == 5
    assert not len(queues)
