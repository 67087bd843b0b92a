"""Who hears when the state of a node changes: notifiers in this process, a webhook, syslog.

Each has a queue of its own, so that one that is away holds nobody up. Queues are bounded: what is
lost is in the audit log all the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from spire_hw.aio.backoff import Backoff
from spire_hw.aio.tasks import Tasks
from spire_hw.errors import SpireHwError, UnavailableError
from spire_hw.plugin.notifier import NodeStateEvent, NodeStateNotifier
from spire_hw.posture.verdict import NodeState
from spire_hw.syslog import time_text
from spire_hw.telemetry.metrics import NO_METRICS
from spire_hw_server.posture.syslog import Syslog
from spire_hw_server.posture.webhook import Webhook

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.spiffeid import TrustDomain
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_server.posture.outcome import StateChange
    from spire_hw_server.postureconfig import PostureSettings

MAX_WAITING: Final = 1000
MAX_TRIES: Final = 10
_FIRST_S: Final = 1.0
_CAP_S: Final = 60.0
_TOLD_S: Final = 60.0
_CHANGED: Final = ("posture", "state_change")


class Receiver(Protocol):
    """Somebody outside."""

    name: str

    async def start(self) -> None:
        """Make ready."""
        ...

    async def send(self, event: dict[str, object]) -> None:
        """Tell one event; UnavailableError asks for another try."""
        ...


class Hooks:
    """All of them.

    Args:
        settings: the operator's.
        trust_domain: told with each event.
        clock: time between tries.
        log: where failures go.
        metrics: takes the changes down.
    """

    def __init__(
        self,
        settings: PostureSettings,
        *,
        trust_domain: TrustDomain,
        clock: Clock,
        log: Logger,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._metrics = metrics
        self._trust_domain = trust_domain
        self._clock = clock
        self._log = log
        self._receivers: list[Receiver] = []
        if settings.webhook is not None:
            self._receivers.append(Webhook(settings.webhook, clock=clock))
        if settings.syslog is not None:
            self._receivers.append(Syslog(settings.syslog))
        self._queues = [self._queue(r.name, partial(self._send, r)) for r in self._receivers]
        self._tasks = Tasks(self._failed)

    def _queue(self, name: str, send: Callable[[NodeStateEvent], Awaitable[None]]) -> _Queue:
        return _Queue(name, send, clock=self._clock, log=self._log)

    async def start(self) -> None:
        """Make the receivers ready.

        Raises:
            NotReadyError: a file of one cannot be read.
        """
        for receiver in self._receivers:
            await receiver.start()

    def use(self, notifiers: Mapping[str, object]) -> None:
        """Take the notifiers that want to hear of nodes."""
        for name, plugin in notifiers.items():
            if isinstance(plugin, NodeStateNotifier):
                queue = self._queue(f"notifier({name})", plugin.notify_node_state)
                self._queues.append(queue)

    def tell(self, change: StateChange) -> None:
        """Hand a change to everybody; returns at once."""
        after = change.after
        labels = {"state": after.state.value, "reason": after.reasons[0] if after.reasons else ""}
        self._metrics.count(_CHANGED, labels=labels)
        before = NodeState.NEW if change.before is None else change.before.state
        event = NodeStateEvent(
            agent_id=change.agent_id,
            state=change.after.state,
            before=before,
            reasons=change.after.reasons,
            message=change.after.message,
            occasion=change.occasion,
            at=self._clock.now(),
        )
        for queue in self._queues:
            queue.put(event)

    async def run(self) -> None:
        """Deliver; ends only when cancelled."""
        for queue in self._queues:
            self._tasks.start(queue.name, queue.run())
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Tell nobody any more; what waits is lost."""
        await self._tasks.close()

    async def _send(self, receiver: Receiver, event: NodeStateEvent) -> None:
        await receiver.send(as_message(event, self._trust_domain))

    def _failed(self, name: str, error: BaseException) -> None:
        self._log.error("Telling about nodes broke down", receiver=name, exc_info=error)


def as_message(event: NodeStateEvent, trust_domain: TrustDomain) -> dict[str, object]:
    """Return an event as receivers outside get it."""
    return {
        "event": "node_state",
        "time": time_text(event.at),
        "trust_domain": trust_domain.name,
        "agent_id": event.agent_id.text,
        "state": event.state.value,
        "state_before": event.before.value,
        "reasons": list(event.reasons),
        "message": event.message,
        "occasion": event.occasion,
    }


class _Queue:
    """What one receiver has still to hear, in order."""

    def __init__(
        self,
        name: str,
        send: Callable[[NodeStateEvent], Awaitable[None]],
        *,
        clock: Clock,
        log: Logger,
    ) -> None:
        self.name = name
        self._send = send
        self._clock = clock
        self._log = log
        self._waiting: deque[NodeStateEvent] = deque()
        self._more = asyncio.Event()
        self._lost = 0

    def put(self, event: NodeStateEvent) -> None:
        """Add an event; the oldest goes when there are too many."""
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._more.set()

    async def run(self) -> None:
        """Deliver one after the other; ends only when cancelled."""
        while True:
            while self._waiting:
                await self._deliver(self._waiting.popleft())
            self._more.clear()
            await self._more.wait()

    async def _deliver(self, event: NodeStateEvent) -> None:
        backoff = Backoff(_FIRST_S, _CAP_S)
        error: Exception
        for left in reversed(range(MAX_TRIES)):
            try:
                async with asyncio.timeout(_TOLD_S):
                    await self._send(event)
            except (UnavailableError, TimeoutError) as e:
                error = e
                if left:
                    await self._clock.sleep(backoff.next_s())
            except SpireHwError as e:
                error = e
                break
            else:
                self._say_lost()
                return
        self._log.error(
            "State of a node was not told",
            receiver=self.name,
            agent_id=event.agent_id.text,
            state=event.state.value,
            error=str(error) or "no answer in time",
        )

    def _say_lost(self) -> None:
        if self._lost:
            self._log.error("States of nodes were not told", receiver=self.name, count=self._lost)
            self._lost = 0
