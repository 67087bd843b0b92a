"""All the nodes of a fleet: attests them a few at a time and keeps each of them beating."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Self

from spire_hw.aio.backoff import Backoff
from spire_hw.aio.tasks import Tasks
from spire_hw.clock import SystemClock
from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw_sim.fleet.node import LightNode
from spire_hw_sim.fleet.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.bundle.bundle import Bundle
    from spire_hw_sim.fleet.keys import FleetKeys

_FIRST_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 30.0
_PAUSE_S: Final = 1.0
# A server asks its clients to leave at this age.
_CONNECTION_S: Final = 180.0
_random: Final = random.SystemRandom()
_HOSTS: Final = 250


class Fleet:
    """Nodes in this process; an async context manager: all of them end with it.

    Args:
        keys: of the machines.
        count: how many.
        address: of the server.
        port: likewise.
        bundle: whom they believe.
        at_once: attestations under way at one time.

    Attributes:
        attestations, heartbeats: how they went.
        interruptions: streams that were cut; nodes come back by themselves.
        told: the last summary, of when the nodes ended.
    """

    def __init__(
        self,
        keys: FleetKeys,
        count: int,
        *,
        address: str,
        port: int,
        bundle: Bundle,
        at_once: int = 8,
    ) -> None:
        self._keys = keys
        self._count = count
        self._where = (address, port, bundle)
        self._gate = asyncio.Semaphore(at_once)
        self._clock = SystemClock()
        self._nodes: list[LightNode] = []
        self._waiting = count
        self._ready = asyncio.Event()
        self.told: dict[str, Any] = {}
        self._broken = asyncio.Event()
        self._failure: BaseException | None = None
        self._tasks = Tasks(self._failed)
        self.attestations = Tally("attestations")
        self.heartbeats = Tally("heartbeats")
        self.interruptions = Tally("interruptions")

    async def __aenter__(self) -> Self:
        for number in range(self._count):
            self._tasks.start(f"node {number}", self._live(number))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.told = self.summary()
        await self._tasks.close()

    async def attested(self, within_s: float) -> None:
        """Wait until every node has attested once.

        Raises:
            SpireHwError: it takes longer, or the server does not know heartbeats.
        """
        await self._until(self._ready, within_s)
        if self._waiting:
            raise UnavailableError(
                f"{self._waiting} of {self._count} nodes have not attested within {within_s:g} s"
            )

    async def observe(self, duration_s: float | None) -> None:
        """Let the nodes beat for a while, for ever when None; errors as in `attested`."""
        self.heartbeats.clear()
        await self._until(self._broken, duration_s)

    async def _until(self, event: asyncio.Event, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()
        if self._failure is not None:
            raise self._failure

    async def _live(self, number: int) -> None:
        machine = self._keys.node(number)
        if machine.key is None:
            raise ValueError("a fleet's machine has its key in its TPM")
        address, port, bundle = self._where
        node = LightNode(
            machine,
            machine.key,
            address=address,
            port=port,
            bundle=bundle,
            local_address=local_address(address, number),
        )
        await self._attest(node)
        self._nodes.append(node)
        self._waiting -= 1
        if not self._waiting:
            self._ready.set()
        # Like a fleet that has been up for long: its connections are of all ages.
        leave_after_s = _CONNECTION_S * _random.random()
        while True:
            try:
                await node.beat(self.heartbeats, leave_after_s)
            except SpireHwError as e:
                if e.kind is ErrorKind.UNIMPLEMENTED:
                    raise
                self.interruptions.failed(e)
                await self._clock.sleep(_PAUSE_S * (1 + _random.random()))
                if e.kind is ErrorKind.PERMISSION_DENIED:
                    await self._attest(node)
            if node.renew_at is not None and self._clock.now() >= node.renew_at:
                await self._attest(node)
            leave_after_s = _CONNECTION_S

    async def _attest(self, node: LightNode) -> None:
        """Attest, as often as it takes."""
        backoff = Backoff(_FIRST_BACKOFF_S, _MAX_BACKOFF_S)
        while not await self._try_attest(node):
            await self._clock.sleep(backoff.next_s())

    async def _try_attest(self, node: LightNode) -> bool:
        async with self._gate:
            try:
                with self.attestations.watching():
                    await node.attest()
            except SpireHwError:  # counted
                return False
        return True

    def _failed(self, name: str, error: BaseException) -> None:
        self._failure = self._failure or error
        self._ready.set()
        self._broken.set()

    def line(self) -> str:
        """Return how far it is, in one line."""
        beats = self.heartbeats
        return (
            f"attested {self._count - self._waiting}/{self._count}, "
            f"{self.connected} connected, {len(beats.times_s)} heartbeats, "
            f"{self.attestations.failures.total() + beats.failures.total()} failed"
        )

    @property
    def connected(self) -> int:
        """Return how many nodes have a stream open."""
        return sum(node.standing is not None for node in self._nodes)

    def report(self) -> Iterator[str]:
        """Yield what was counted, for people."""
        told = self.told
        states = ", ".join(f"{count} {state}" for state, count in told["states"].items())
        yield f"{told['attested']} of {told['nodes']} nodes attested, connected: {states or 'none'}"
        yield from self.attestations.lines()
        yield from self.heartbeats.lines()
        for reason, count in told["interruptions"].items():
            yield f"interrupted: {reason} {count}"

    def summary(self) -> dict[str, Any]:
        """Return everything that was counted."""
        states = Counter(n.standing.state.value for n in self._nodes if n.standing is not None)
        return {
            "nodes": self._count,
            "attested": self._count - self._waiting,
            "connected": states.total(),
            "states": dict(sorted(states.items())),
            "attestations": self.attestations.summary(),
            "heartbeats": self.heartbeats.summary(),
            "interruptions": dict(self.interruptions.failures.most_common()),
        }


def local_address(server: str, number: int) -> str:
    """Return an address of this machine's own for a node whose server is here as well.

    Servers count connections and attestations by address; a real fleet has many.
    """
    try:
        if not ipaddress.IPv4Address(server).is_loopback:
            return ""
    except ValueError:
        return ""
    rest, host = divmod(number, _HOSTS)
    network, subnet = divmod(rest, _HOSTS)
    return f"127.{network + 1}.{subnet}.{host + 1}"
