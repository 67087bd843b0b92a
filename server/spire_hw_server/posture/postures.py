"""The parts of this room, put together for one server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.posture.document import encode_evidence
from spire_hw.posture.heartbeat import HeartbeatVerifier
from spire_hw.telemetry.metrics import NO_METRICS
from spire_hw_server.posture.heartbeat import Heartbeats
from spire_hw_server.posture.hooks import Hooks
from spire_hw_server.posture.judge import NodeJudge
from spire_hw_server.posture.ledger import Ledger
from spire_hw_server.posture.operators import Operators
from spire_hw_server.posture.policies import Policies
from spire_hw_server.posture.reevaluate import Reevaluation
from spire_hw_server.posture.revocation import Revocation
from spire_hw_server.posture.silence import Silence

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from typing import Any

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.spiffeid import SpiffeId, TrustDomain
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.records import Node
    from spire_hw_server.postureconfig import PostureSettings


class Postures:
    """What a server knows of its nodes' machines, and what it does about it.

    Attributes:
        judge: for attestors.
        ledger: what is known of nodes.
        policies: those in force.
        heartbeats: the streams of agents.
        operators: what is done by hand.
    """

    def __init__(
        self,
        store: Datastore,
        settings: PostureSettings,
        *,
        trust_domain: TrustDomain,
        node_of: Callable[[SpiffeId], Awaitable[Node | None]],
        poll_s: float,
        full_reload_s: float,
        clock: Clock,
        log: Logger,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        """Build it.

        Args:
            store: where all of it is kept.
            settings: the operator's.
            trust_domain: for those who are told of changes.
            node_of: the stored node of an agent ID, None when there is none.
            poll_s: seconds between looks at what other servers did.
            full_reload_s: seconds after which everything is read anew.
            clock: time.
            log: takes the audit records.
            metrics: takes down what heartbeats come to and how states change.
        """
        interval = settings.heartbeat_interval
        self._hooks = Hooks(
            settings, trust_domain=trust_domain, clock=clock, log=log, metrics=metrics
        )
        self.policies = Policies(
            store=store,
            policy_dir=settings.policy_dir,
            clock=clock,
            log=log,
            poll_s=poll_s,
            full_reload_s=full_reload_s,
        )
        self.ledger = Ledger(store, clock=clock, log=log)
        self.judge = NodeJudge(
            store,
            self.ledger,
            self.policies,
            settings,
            clock=clock,
            log=log,
            on_change=self._hooks.tell,
        )
        self.heartbeats = Heartbeats(
            self.judge,
            self.ledger,
            node_of=node_of,
            interval_s=None if interval is None else interval.total_seconds(),
            clock=clock,
            log=log,
            metrics=metrics,
        )
        self._reevaluation = Reevaluation(
            store,
            self.ledger,
            self.judge,
            self.policies,
            on_done=self.heartbeats.hurry,
            clock=clock,
            log=log,
        )
        self._revocation = Revocation(
            store, self.ledger, self.judge, settings, clock=clock, log=log
        )
        self.operators = Operators(
            store, self.ledger, self.judge, self._reevaluation, self._revocation, clock=clock
        )
        self._silence = Silence(store, self.ledger, self.judge, settings, clock=clock, log=log)

    async def start(self) -> None:
        """Read policies and secrets.

        Raises:
            SpireHwError: something is wrong with one of them.
        """
        await self._hooks.start()
        await self.policies.start()

    def use(self, attestors: Mapping[str, object], notifiers: Mapping[str, object]) -> None:
        """Take the plugins that know of heartbeats, certificates and states of nodes."""
        self.heartbeats.verifiers.update(
            {n: a for n, a in attestors.items() if isinstance(a, HeartbeatVerifier)}
        )
        self._revocation.use(attestors)
        self._hooks.use(notifiers)

    async def latest(self, agent_id: SpiffeId) -> bytes:
        """Return the document of the last evidence of a node that was accepted, whole.

        Raises:
            NotFoundError: there is none.
            EncodingError: what is stored cannot be read.
        """
        known = await self.ledger.get(agent_id)
        return encode_evidence(await self._reevaluation.whole(agent_id, known))

    def loops(self) -> dict[str, Coroutine[Any, Any, None]]:
        """Return what has to run all the time, by name."""
        return {
            "heartbeats": self.heartbeats.run(),
            "heartbeat store": self.ledger.run(),
            "silent nodes": self._silence.run(),
            "policy changes": self._reevaluation.run(),
            "revoked certificates": self._revocation.run(),
            "state changes": self._hooks.run(),
        }

    async def close(self) -> None:
        """Store what is not stored yet, and stop."""
        await self.heartbeats.close()
        await self.policies.close()
        await self._hooks.close()
        await self.ledger.flush()
