from __future__ import annotations

import asyncio
import io
import json
from dataclasses import dataclass
from datetime import timedelta

import pytest

from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.log import Format, LogSettings, Output, get_logger
from spire_hw.selector import Selector
from spire_hw_agent.workload.attest import Attestors
from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio
LOG = get_logger("test")


@dataclass
class Caller:
    pid: int = 7
    uid: int = 1
    gid: int = 1
    lives: int = 99

    def alive(self) -> bool:
        self.lives -= 1
        return self.lives >= 0

    def read_link(self, name: str) -> str:
        raise NotImplementedError

    def read_file(self, name: str, limit: int) -> bytes:
        raise NotImplementedError

    def open_file(self, name: str) -> int:
        raise NotImplementedError


class Says:
    def __init__(self, *values: str) -> None:
        self._values = list(values)

    async def attest(self, process: object) -> list[str]:
        return self._values


class Fails:
    def __init__(self, error: Exception) -> None:
        self._error = error

    async def attest(self, process: object) -> list[str]:
        raise self._error


class Meets:
    """Ends only when as many as it waits for are there: they run at the same time."""

    def __init__(self, barrier: asyncio.Barrier) -> None:
        self._barrier = barrier

    async def attest(self, process: object) -> list[str]:
        await self._barrier.wait()
        return ["met"]


async def test_selectors_are_united_under_the_names_of_their_attestors() -> None:
    found = await Attestors([("a", Says("x", "y:z")), ("b", Says("x"))], LOG).attest(Caller())
    assert found == {Selector("a", "x"), Selector("a", "y:z"), Selector("b", "x")}


async def test_one_failure_leaves_the_others() -> None:
    failing = Fails(SpireHwError("no"))
    found = await Attestors([("a", failing), ("b", Says("x"))], LOG).attest(Caller())
    assert found == {Selector("b", "x")}


async def test_a_value_that_is_no_selector_counts_as_a_failure() -> None:
    found = await Attestors([("a", Says("")), ("b", Says("x"))], LOG).attest(Caller())
    assert found == {Selector("b", "x")}


async def test_when_all_fail_nobody_is_told_to_be_without_identity() -> None:
    failing = [("a", Fails(SpireHwError("no"))), ("b", Fails(TimeoutError()))]
    with pytest.raises(UnavailableError, match="workload attestation failed"):
        await Attestors(failing, LOG).attest(Caller())


async def test_an_impostor_is_refused_whatever_others_say() -> None:
    impostor = Fails(SpireHwError("changed", kind=ErrorKind.UNAUTHENTICATED))
    with pytest.raises(SpireHwError) as caught:
        await Attestors([("a", impostor), ("b", Says("x"))], LOG).attest(Caller())
    assert caught.value.kind is ErrorKind.UNAUTHENTICATED


async def test_a_process_that_ended_meanwhile_is_refused() -> None:
    with pytest.raises(SpireHwError) as caught:
        await Attestors([("a", Says("x"))], LOG).attest(Caller(lives=0))
    assert caught.value.kind is ErrorKind.UNAUTHENTICATED


async def test_attestors_run_at_once() -> None:
    barrier = asyncio.Barrier(2)
    async with asyncio.timeout(5):
        found = await Attestors([("a", Meets(barrier)), ("b", Meets(barrier))], LOG).attest(
            Caller()
        )
    assert len(found) == 2


def written(stream: io.StringIO, message: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [line for line in lines if line["msg"] == message]


async def test_selectors_are_logged_when_asked_for() -> None:
    stream = io.StringIO()
    log = Output(LogSettings(format=Format.JSON), stream=stream).logger("workload_attestor")
    unix = Says("uid:1", "user:web")
    await Attestors([("unix", unix)], log).attest(Caller())
    assert stream.getvalue() == ""
    await Attestors([("unix", unix)], log, log_selectors=True).attest(Caller())
    (line,) = written(stream, "PID attested to have selectors")
    assert line["pid"] == 7
    assert line["selectors"] == ["unix:uid:1", "unix:user:web"]


async def test_a_caller_in_a_loop_does_not_fill_the_log_and_silences_nobody_else() -> None:
    stream, clock = io.StringIO(), SimClock()
    log = Output(LogSettings(format=Format.JSON), stream=stream).logger("workload_attestor")
    attestors = Attestors(
        [("unix", Says("uid:1")), ("docker", Fails(UnavailableError("gone")))], log, clock=clock
    )
    for _ in range(100):
        await attestors.attest(Caller(uid=1))
    await attestors.attest(Caller(uid=2, pid=8))
    lines = written(stream, "Failed to collect all selectors for PID")
    assert [line["pid"] for line in lines] == [7] * 10 + [8]
    await clock.advance(timedelta(minutes=1))
    await attestors.attest(Caller(uid=1))
    assert written(stream, "Failed to collect all selectors for PID")[-1]["left_out"] == 90
