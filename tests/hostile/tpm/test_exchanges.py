"""Whoever holds a node's public EK certificate can begin exchanges, but not keep the node out."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import LimitError
from spire_hw_plugins.nodeattestor.tpm.exchanges import (
    GIVE_WAY_S,
    MAX_OPEN,
    MAX_PER_EK,
    MAX_PER_SOURCE,
    Exchanges,
)
from spire_hw_sim.again import refused_now
from spire_hw_sim.clock import SimClock
from spire_hw_sim.softtpm import SoftTpm
from spire_hw_sim.tpmlab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spire_hw.plugin.nodeattestor import AttestedIdentity
    from spire_hw_plugins.nodeattestor.tpm.wire import Response
    from spire_hw_sim.tpmnode import TpmNode

pytestmark = pytest.mark.asyncio

EK, OTHER_EK = "aa" * 32, "bb" * 32


def thief_of(lab: Lab, victim: TpmNode) -> TpmNode:
    """Return a machine that shows another's EK certificate beside an AK of its own."""
    thief = lab.node(SoftTpm(ek=victim.tpm.ek))
    thief.certificate, thief.chain = victim.certificate, victim.chain
    return thief


class Standoff:
    """Exchanges that were begun in a node's name and are never answered."""

    def __init__(self, lab: Lab, node: TpmNode) -> None:
        self._lab = lab
        self._node = node
        self._tasks = Tasks(on_failure=lambda name, error: None)
        self.open: list[asyncio.Task[AttestedIdentity]] = []

    async def begin(self, source: str) -> asyncio.Task[AttestedIdentity]:
        """Begin one and return once its challenge was sent, or it failed."""
        asked = asyncio.Event()

        async def silent(_: bytes) -> bytes:
            asked.set()
            await asyncio.Event().wait()
            return b""

        task = self._tasks.spawn(source, self._lab.attest(self._node, answer=silent, source=source))
        waiting = self._tasks.spawn("asked", asked.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        self.open.append(task)
        return task

    async def close(self) -> None:
        await self._tasks.close()


async def test_a_stolen_certificate_elsewhere_takes_nothing_from_the_node(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    standoff = Standoff(lab, thief_of(lab, node))
    for number in range(8):
        held = await standoff.begin(f"192.0.2.{number}")
        assert not held.done()
    made = await lab.attest(node, source="198.51.100.7")
    assert made.agent_id.path.endswith(node.ek_hash)
    for held in standoff.open:
        with pytest.raises(LimitError, match="this node is attesting already"):
            await held
    assert lab.server.open_exchanges == 0
    await standoff.close()


async def test_of_two_good_exchanges_of_one_node_one_wins(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    both_asked = asyncio.Barrier(2)

    async def answer(message: bytes) -> bytes:
        await both_asked.wait()
        return node.answer(message)

    done = await asyncio.gather(
        *(lab.attest(node, answer=answer, source=f"192.0.2.{n}") for n in range(2)),
        return_exceptions=True,
    )
    (refused,) = (found for found in done if isinstance(found, BaseException))
    assert isinstance(refused, LimitError)
    assert refused.message == "envelope: this node is attesting already"
    assert lab.server.open_exchanges == 0
    await lab.attest(node)


async def test_the_thief_gets_no_further_than_the_challenge(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    error = await lab.refusal(thief_of(lab, node), response=_guess)
    assert "secret does not match" in error.message


def _guess(response: Response) -> Response:
    return replace(response, secret=bytes(32))


async def test_from_one_source_an_old_exchange_gives_way(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node, source = lab.node(), "192.0.2.1"
    standoff = Standoff(lab, thief_of(lab, node))
    held = await standoff.begin(source)
    with pytest.raises(LimitError, match="attesting already"):
        await lab.attest(node, source=source)
    await lab.clock.advance(timedelta(seconds=GIVE_WAY_S))
    await lab.attest(node, source=source)
    with pytest.raises(LimitError, match="made room"):
        await held
    assert lab.server.open_exchanges == 0
    await standoff.close()


async def test_limits_by_key_by_source_and_in_all() -> None:
    clock = SimClock()
    one = "192.0.2.1"
    cases: list[tuple[int, Callable[[int], tuple[str, str]]]] = [
        (1, lambda n: (EK, one)),
        (MAX_PER_SOURCE, lambda n: (f"{n:064x}", one)),
        (MAX_PER_EK, lambda n: (EK, f"source {n}")),
        (MAX_OPEN, lambda n: (f"{n:064x}", f"source {n}")),
    ]
    for limit, place in cases:
        exchanges = Exchanges(clock)
        with ExitStack() as held:
            for number in range(limit):
                held.enter_context(exchanges.hold(*place(number)))
            error = refused_now(lambda: held.enter_context(exchanges.hold(*place(limit))))  # noqa: B023
            assert isinstance(error, LimitError)
            assert len(exchanges) == limit
        assert len(exchanges) == 0


async def test_what_is_young_is_never_broken_off() -> None:
    clock = SimClock()
    exchanges = Exchanges(clock)
    with ExitStack() as held:
        first = held.enter_context(exchanges.hold(EK, "192.0.2.1"))
        await clock.advance(timedelta(seconds=GIVE_WAY_S - 0.1))
        with pytest.raises(LimitError), exchanges.hold(EK, "192.0.2.1"):
            pass
        first.check()
        with exchanges.hold(OTHER_EK, "192.0.2.1"), exchanges.hold(EK, "192.0.2.2"):
            first.check()
        await clock.advance(timedelta(seconds=0.1))
        with exchanges.hold(EK, "192.0.2.1"), pytest.raises(LimitError, match="made room"):
            first.check()


async def test_a_slow_tpm_has_as_long_as_its_operator_allows(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, 'challenge_timeout = "2m"')
    node, source = lab.node(), "192.0.2.1"
    standoff = Standoff(lab, thief_of(lab, node))
    held = await standoff.begin(source)
    await lab.clock.advance(timedelta(seconds=39))
    with pytest.raises(LimitError, match="attesting already"):
        await lab.attest(node, source=source)
    assert not held.done()
    await lab.clock.advance(timedelta(seconds=1))
    await lab.attest(node, source=source)
    with pytest.raises(LimitError, match="made room"):
        await held
    await standoff.close()


async def test_an_unknown_source_is_bound_by_the_key_alone() -> None:
    exchanges = Exchanges(SimClock())
    with ExitStack() as held:
        for number in range(MAX_PER_SOURCE + 3):
            held.enter_context(exchanges.hold(f"{number:064x}", ""))
        with pytest.raises(LimitError), exchanges.hold(f"{0:064x}", ""):
            pass
