from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import pytest

from spire_hw.errors import LimitError
from spire_hw.log import LateLogger, get_logger
from spire_hw.rpc.interceptors import (
    CallerRate,
    RateLimiter,
    RequestId,
    call_fields,
    caller_fields,
)
from spire_hw.rpc.service import Call
from spire_hw.spiffeid import SpiffeId
from spire_hw.transport.peer import TcpPeer, UnixPeer
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from spire_hw.transport.peer import CallerProcess, Peer


class Someone:
    pid, uid, gid = 7, 8, 9


UNIX = UnixPeer(cast("CallerProcess", Someone()))
TCP = TcpPeer("10.0.0.1", 4444, None, ())


def call(peer: Peer = TCP, deadline_s: float | None = None) -> Call:
    return Call("/a.b.Service/Method", peer, (), get_logger("test"), deadline_s)


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


@pytest.mark.asyncio
async def test_the_burst_is_free_and_the_rest_waits() -> None:
    clock = SimClock()
    limiter = RateLimiter(10, clock=clock)
    await limiter.take("a", 10)
    await limiter.take("b", 10)  # a key of its own
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(limiter.take("a", 5))
        await clock.advance(seconds(0.4))
        assert not waiting.done()
        await clock.advance(seconds(0.1))
        assert waiting.done()


@pytest.mark.asyncio
async def test_those_who_wait_come_in_turn() -> None:
    clock = SimClock()
    limiter = RateLimiter(1, clock=clock)
    await limiter.take("a")
    done: list[int] = []

    async def one(number: int) -> None:
        await limiter.take("a")
        done.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(one(number))
        for expected in range(3):
            await clock.advance(seconds(1))
            assert done == list(range(expected + 1))


@pytest.mark.asyncio
async def test_more_than_the_burst_fails_at_once() -> None:
    with pytest.raises(LimitError, match="exceeds burst"):
        await RateLimiter(500).take("a", 501)


@pytest.mark.asyncio
async def test_a_wait_past_the_deadline_fails_at_once_and_takes_nothing() -> None:
    clock = SimClock()
    limiter = RateLimiter(1, clock=clock)
    await limiter.take("a")
    with pytest.raises(LimitError):
        await limiter.take("a", deadline_s=0.5)
    await clock.advance(seconds(1))
    await limiter.take("a", deadline_s=0.0)


@pytest.mark.asyncio
async def test_without_deadline_nobody_waits_for_ever() -> None:
    clock = SimClock()
    limiter = RateLimiter(1, clock=clock, max_wait_s=2)
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(limiter.take("a"))
        await clock.advance(seconds(0))
        with pytest.raises(LimitError):
            await limiter.take("a")
        await clock.advance(seconds(3))


@pytest.mark.asyncio
async def test_who_gives_up_gives_back() -> None:
    clock = SimClock()
    limiter = RateLimiter(1, clock=clock)
    await limiter.take("a")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await limiter.take("a")
    await clock.advance(seconds(1))
    await limiter.take("a", deadline_s=0.0)


@pytest.mark.asyncio
async def test_idle_keys_are_forgotten_and_busy_ones_are_not() -> None:
    clock = SimClock()
    limiter = RateLimiter(1, clock=clock, max_wait_s=1)
    for number in range(100):
        await limiter.take(str(number))
    for _ in range(3):
        await clock.advance(seconds(61))
        await limiter.take("busy")
    assert set(limiter._young) | set(limiter._old) == {"busy"}


@pytest.mark.asyncio
async def test_unix_callers_are_exempt() -> None:
    rate = CallerRate(RateLimiter(1, clock=SimClock()))
    for _ in range(5):
        await rate.take(call(UNIX), 1000)
    await rate.take(call(TCP))
    with pytest.raises(LimitError):
        await rate.take(call(TCP, deadline_s=0.1))


def test_callers_are_logged_by_upstreams_names() -> None:
    assert caller_fields(UNIX) == {"caller_pid": 7, "caller_uid": 8, "caller_gid": 9}
    assert caller_fields(TCP) == {"caller_addr": "10.0.0.1:4444"}
    known = TcpPeer("::1", 1, SpiffeId.parse("spiffe://a.org/b"), ())
    assert caller_fields(known) == {"caller_addr": "[::1]:1", "caller_id": "spiffe://a.org/b"}


@pytest.mark.asyncio
async def test_each_call_gets_an_id_of_its_own() -> None:
    fields = [call_fields("/spire.api.Some/Do", UNIX) for _ in range(2)]
    first, second = (one.pop("request_id") for one in fields)
    assert first != second
    assert fields[0] == {"service": "Some", "method": "Do", **caller_fields(UNIX)}
    one = call()
    await RequestId().check(None, one)
    assert isinstance(one.log, LateLogger)
