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


def admitted(queues: Queues[Job], job: Job, limit: int) -> list[Job]:
    """Return who had to go for a job, which may be the job itself."""
    before = len(queues)
    gone = queues.admit(job, limit)
    assert len(queues) == (before + 1 if gone is None else before)
    return [] if gone is None else [gone]


def test_a_full_queue_lets_in_a_lane_that_has_less_than_the_longest() -> None:
    busy = [Job(b"busy", n) for n in range(8)]
    queues = filled(*busy)
    quiet = [Job(b"quiet", n) for n in range(5)]
    for n, job in enumerate(quiet[:4]):
        assert admitted(queues, job, 8) == [busy[7 - n]]
    # Now both have as much: neither gets more from the other, and nothing goes to and fro.
    assert admitted(queues, quiet[4], 8) == [quiet[4]]
    more = Job(b"busy", 8)
    assert admitted(queues, more, 8) == [more]
    assert {job.number for job in queues.take(8) if job.lane == b"busy"} == {0, 1, 2, 3}


def test_what_is_urgent_is_let_in_for_the_youngest_of_the_longest_lane() -> None:
    short, long = [Job(b"a", n) for n in range(3)], [Job(b"b", n) for n in range(5)]
    queues = filled(*short, *long)
    urgent = Job(b"ca", is_urgent=True)
    assert admitted(queues, urgent, 8) == [long[4]]
    assert queues.take(1) == [urgent]


@pytest.mark.parametrize("limit", [1, 2, 3, 8, 9])
def test_a_flood_of_either_sort_leaves_the_other_its_half(limit: int) -> None:
    queues: Queues[Job] = Queues()
    for n in range(3 * limit):
        queues.admit(Job(b"bulk", n), limit)
    for n in range(3 * limit):
        queues.admit(Job(b"tls", n, is_urgent=True), limit)
    for n in range(3 * limit):
        queues.admit(Job(b"bulk", 100 + n), limit)
    waiting = queues.take(16)
    assert len(waiting) == limit
    assert sum(job.is_urgent for job in waiting) == (limit + 1) // 2
    # And who was there first stayed.
    assert all(job.number < limit for job in waiting)


def test_a_flood_of_one_urgent_lane_does_not_shut_another_out() -> None:
    tls = [Job(b"tls", n, is_urgent=True) for n in range(8)]
    queues = filled(*tls)
    assert admitted(queues, Job(b"ca", is_urgent=True), 8) == [tls[7]]


def test_the_last_one_is_the_youngest_of_the_longest_lane_of_those_that_are_more() -> None:
    bulk = [Job(b"a", 0), *(Job(b"b", n) for n in range(3))]
    urgent = [Job(b"ca", n, is_urgent=True) for n in range(3)]
    queues = filled(*bulk, *urgent)
    gone: list[Job | None] = []
    while len(queues):
        last = queues.last()
        assert queues.pop_last() is last
        gone.append(last)
    order = [bulk[3], bulk[2], urgent[2], bulk[0], urgent[1], bulk[1], urgent[0]]
    assert gone == order
    assert queues.last() is None
    assert queues.pop_last() is None
