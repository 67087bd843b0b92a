"""Heartbeats: the streams agents hold to this server, and what goes over them.

A stream rests almost always. It is woken when a heartbeat is due, and when its node changed: then
the agent hears of it at once. A node that lost its identity goes on answering: that is how it gets
it back.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import (
    AttestationError,
    DeniedError,
    DeniedReason,
    ErrorKind,
    InvalidInputError,
    LimitError,
    SpireHwError,
)
from spire_hw.logsample import Sampler
from spire_hw.posture.evidence import Occasion
from spire_hw.posture.heartbeat import HeartbeatChallenge, HeartbeatVerifier
from spire_hw.posture.memory import complete
from spire_hw.posture.verdict import NodeState
from spire_hw.selector import Selector
from spire_hw.telemetry.metrics import NO_METRICS
from spire_hw_server.posture.ahead import verify_ahead
from spire_hw_server.posture.outcome import refusal
from spire_hw_server.posture.pace import Pace, Sleeper, spread
from spire_hw_server.posture.stream import CannotAnswer, StateMessage, state_message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.posture.judge import EvidenceRequest
    from spire_hw.posture.memory import Memory
    from spire_hw.spiffeid import SpiffeId
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_server.datastore.records import Node
    from spire_hw_server.posture.judge import NodeJudge
    from spire_hw_server.posture.ledger import Known, Ledger
    from spire_hw_server.posture.outcome import Outcome
    from spire_hw_server.posture.stream import Answer, Send, Stream

ANSWER_S: Final = 30.0
_JITTER: Final = 0.1
# How long those who should have been asked long ago are spread over.
_LATE_S: Final = 10.0
_NONCE_BYTES: Final = 32
_BEATS: Final = ("posture", "heartbeat")
_REFUSED: Final = ("posture", "heartbeat", "refused")
_BROKEN_LIST: Final = "ima_replay"

# Evidence that is not good; anything else is a fault of the stream, or of ours.
_REFUSALS: Final = (AttestationError, InvalidInputError, LimitError)


class Heartbeats:
    """All streams of one server.

    Args:
        judge: makes something of what nodes show.
        ledger: what is known of them.
        node_of: the stored node of an agent ID, None when there is none.
        interval_s: between two heartbeats of a node; None for none.
        clock: time.
        log: takes the audit records.
        metrics: takes down what heartbeats come to.

    Attributes:
        verifiers: attestors that check heartbeats, by name.
        is_ending: the server goes down, streams end.
    """

    def __init__(
        self,
        judge: NodeJudge,
        ledger: Ledger,
        *,
        node_of: Callable[[SpiffeId], Awaitable[Node | None]],
        interval_s: float | None,
        clock: Clock,
        log: Logger,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self.metrics = metrics
        self.judge = judge
        self.ledger = ledger
        self.node_of = node_of
        self.verifiers: dict[str, HeartbeatVerifier] = {}
        self.clock = clock
        self.log = log
        self.pace = Pace(clock)
        self.refusals = Sampler(clock)
        self.tasks = Tasks(on_failure=lambda name, error: None)
        self._interval_s = interval_s
        self._sessions: dict[SpiffeId, Session] = {}
        self.is_ending = False

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def interval_s(self) -> float | None:
        """Return the time between two heartbeats, None when there are none."""
        return self._interval_s if self.judge.is_active else None

    def is_connected(self, agent_id: SpiffeId) -> bool:
        """Tell whether an agent holds a stream to this server."""
        return agent_id in self._sessions

    async def run(self) -> None:
        """Keep the pace; ends only when cancelled."""
        await self.pace.run()

    def end(self) -> None:
        """Let all streams end: a server that goes down waits for calls in progress."""
        self.is_ending = True
        for session in self._sessions.values():
            session.sleeper.wake()

    async def close(self) -> None:
        """End what waits for answers."""
        await self.tasks.close()

    def node_changed(self, agent_id: SpiffeId) -> None:
        """Take note that a node was changed in the store."""
        self.ledger.forget(agent_id)
        session = self._sessions.get(agent_id)
        if session is not None:
            session.sleeper.wake()

    def hurry(self) -> None:
        """Ask nodes that lost their identity now: what was wrong may be right by a new policy."""
        for session in self._sessions.values():
            if session.told in {NodeState.QUARANTINED, NodeState.STALE}:
                self.pace.set(session.sleeper, spread(_LATE_S / 2, 1))

    @contextmanager
    def open(self, stream: Stream, answers: AsyncIterator[Answer], send: Send) -> Iterator[Session]:
        """Hold a stream for as long as the context lasts; it replaces an older one of its node.

        Args:
            stream: who holds it.
            answers: what the agent sends, one for each challenge.
            send: sends to the agent.
        """
        session = Session(self, stream, answers, send)
        before = self._sessions.get(stream.agent_id)
        if before is not None:
            before.is_replaced = True
            before.sleeper.wake()
        self._sessions[stream.agent_id] = session
        if self.is_ending:
            session.sleeper.wake()
        try:
            yield session
        finally:
            self.pace.drop(session.sleeper)
            if self._sessions.get(stream.agent_id) is session:
                del self._sessions[stream.agent_id]


def _is_broken_part(wanted: EvidenceRequest, error: AttestationError) -> bool:
    """Tell whether all that is wrong is a part of an IMA list that does not fit what is known."""
    is_part = wanted.ima is not None and wanted.ima.count > 0
    return is_part and [finding.code for finding in error.findings] == [_BROKEN_LIST]


class _EndedError(Exception):
    """A stream that came to its end."""


class _BrokenError(Exception):
    """An agent sent something that is no message for this place."""

    def __init__(self, error: SpireHwError) -> None:
        super().__init__(error.message)
        self.error = error


class Session:
    """One stream; `Heartbeats.open` makes it.

    Attributes:
        sleeper: wakes it.
        is_replaced: its node opened another stream.
        told: the state its agent was told last.
    """

    __slots__ = (
        "_answers",
        "_hub",
        "_next_s",
        "_send",
        "_stream",
        "agent_id",
        "is_replaced",
        "sleeper",
        "told",
    )

    def __init__(
        self, hub: Heartbeats, stream: Stream, answers: AsyncIterator[Answer], send: Send
    ) -> None:
        self._hub = hub
        self._stream = stream
        self._answers = answers
        self._send = send
        self._next_s: float | None = None
        self.agent_id = stream.agent_id
        self.sleeper = Sleeper()
        self.is_replaced = False
        self.told: NodeState | None = None

    async def greeting(self) -> StateMessage:
        """Return what the agent is told first."""
        # It may have held its stream to another server, which wrote what it saw without notice.
        known = await self._hub.ledger.get(self.agent_id, fresh=True)
        self._schedule(known)
        return self._state(known)

    async def run(self) -> None:
        """Challenge and tell until the agent ends, got another SVID, or opened another stream.

        Raises:
            DeniedError: the node is banned or gone, or its SVID has expired.
            InvalidInputError: the agent sent something else than an answer.
            LimitError: it sent too much.
            SpireHwError: DEADLINE_EXCEEDED, a challenge was not answered in time.
        """
        try:
            while True:
                await self.sleeper.waiting()
                if self.sleeper.happened:
                    await self._look()
                if self.sleeper.is_due:
                    self.sleeper.is_due = False
                    await self._beat()
        except _EndedError:
            return
        except _BrokenError as e:
            self._refused(e.error)
            raise e.error from e

    async def _look(self) -> None:
        """Tell the agent what happened to its node."""
        self.sleeper.happened = False
        await self._checked()
        known = await self._hub.ledger.get(self.agent_id)
        if known is not None and known.standing.state is not self.told:
            await self._send(self._state(known))

    async def _beat(self) -> None:
        """Run one heartbeat and tell the state after it."""
        hub = self._hub
        node = await self._checked()
        known = await hub.ledger.get(self.agent_id)
        verifier = hub.verifiers.get(node.attestation_type)
        if hub.interval_s is None or verifier is None or known is None or known.memory is None:
            self._schedule(known)
            await self._send(self._state(known))
            return
        try:
            outcome = await self._evidence(verifier, known, known.memory)
        except DeniedError:
            raise
        except SpireHwError as e:
            self._refused(e)
            self._schedule(None)
            known = await hub.ledger.get(self.agent_id)
            await self._send(self._state(known, refused=e))
            if not isinstance(e, _REFUSALS):
                raise
            return
        reattest = await self._take(node, known, outcome)
        self._schedule(None)
        known = await hub.ledger.get(self.agent_id)
        await self._send(self._state(known, outcome=outcome, reattest=reattest))

    async def _evidence(
        self, verifier: HeartbeatVerifier, known: Known, memory: Memory
    ) -> Outcome | None:
        """Ask the node and return what came of it, None when it could not answer.

        The boot log is asked for at once when the machine booted since, so that policy has all it
        looks at; so is the whole IMA list when its rest does not go on where it should: garbage, or
        a list that was rewritten.
        """
        hub = self._hub
        ids = memory.last.boot_id, self._stream.boot_id
        whole = None not in ids and ids[0] != ids[1]
        anew = False
        while True:
            policy = hub.judge.policy_for(memory.last.ek)
            wanted = hub.judge.wanted_by_heartbeat(policy, known, whole=whole, anew=anew)
            challenge = HeartbeatChallenge(secrets.token_bytes(_NONCE_BYTES), wanted)
            await self._send(challenge)
            answer = await self._answer()
            if isinstance(answer, CannotAnswer):
                if hub.refusals.admit((self.agent_id, "cannot")) is not None:
                    hub.log.warning(
                        "Heartbeat not answered", agent_id=str(self.agent_id), reason=answer.reason
                    )
                return None
            spki = self._stream.spki_sha256
            try:
                evidence = await verifier.check_heartbeat(
                    memory.known_node(spki), challenge, answer, hub.clock.now()
                )
            except AttestationError as e:
                if anew or not _is_broken_part(wanted, e):
                    raise
                whole = anew = True
                continue
            if policy is None or policy.boot is None or wanted.boot_log:
                break
            if complete(memory, evidence).boot is not None:
                break
            whole = True
        await verify_ahead(policy, evidence)
        return hub.judge.assess(known, evidence, policy)

    async def _answer(self) -> Answer:
        """Wait for the answer to a challenge; what happens meanwhile is told at once."""
        hub = self._hub
        receiving = hub.tasks.spawn("heartbeat answer", self._receive())
        hub.pace.set(self.sleeper, ANSWER_S)
        try:
            while True:
                either: set[asyncio.Future[Any]] = {receiving, self.sleeper.waiting()}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if self.sleeper.happened:
                    await self._look()
                if receiving.done():
                    return receiving.result()
                if self.sleeper.is_due:
                    text = f"challenge: not answered in {ANSWER_S:g} s"
                    raise SpireHwError(text, kind=ErrorKind.DEADLINE_EXCEEDED)
        finally:
            hub.pace.drop(self.sleeper)
            receiving.cancel()

    async def _receive(self) -> Answer:
        try:
            async for answer in self._answers:
                return answer
        except SpireHwError as e:
            raise _BrokenError(e) from e
        raise _EndedError

    async def _take(self, node: Node, known: Known, outcome: Outcome | None) -> bool:
        """Store what a heartbeat came to; tell whether the agent should attest anew."""
        hub = self._hub
        if outcome is None:
            return False
        hub.metrics.count(_BEATS, labels={"accepted": "yes" if outcome.accepted else "no"})
        if not outcome.accepted:
            error = refusal(outcome)
            self._refused(error)
            await hub.judge.record(self.agent_id, outcome, Occasion.HEARTBEAT.value)
            return False
        if outcome.standing.is_cut_off:
            return False
        if outcome.is_routine and outcome.memory is not None:
            hub.ledger.sighted(self.agent_id, known, outcome.memory, outcome.evidence)
            known.verdict = outcome.by_policy
            kind = node.attestation_type
            return not {Selector(kind, value) for value in outcome.verdict.selectors}.issubset(
                node.selectors
            )
        await hub.judge.record(self.agent_id, outcome, Occasion.HEARTBEAT.value)
        return True

    def _refused(self, error: SpireHwError) -> None:
        """Write the audit record of a heartbeat that was not accepted, but not every one."""
        hub = self._hub
        found = error.findings if isinstance(error, AttestationError) else []
        codes = list(dict.fromkeys(finding.code for finding in found))
        for code in codes or [error.kind.name.lower()]:
            hub.metrics.count(_REFUSED, labels={"reason": code})
        left_out = hub.refusals.admit((self.agent_id, *codes))
        if left_out is not None:
            hub.log.warning(
                "Heartbeat refused",
                type="audit",
                status="error",
                status_code=error.kind.name,
                status_message=error.message,
                reasons=codes,
                agent_id=str(self.agent_id),
                left_out=left_out,
            )

    async def _checked(self) -> Node:
        """Return the node if it still is the one the stream was opened for.

        Raises:
            DeniedError: it is banned or gone, or its SVID has expired.
            _EndedError: it has another SVID or another stream by now.
        """
        if self.is_replaced or self._hub.is_ending:
            raise _EndedError
        node = await self._hub.node_of(self.agent_id)
        if node is None:
            raise DeniedError("node: was evicted", DeniedReason.AGENT_NOT_ATTESTED)
        if node.banned:
            if self.told is not NodeState.BANNED:
                await self._send(StateMessage(NodeState.BANNED, message="node: banned"))
            raise DeniedError("node: banned", DeniedReason.AGENT_BANNED)
        if self._hub.clock.now() >= self._stream.not_after:
            raise DeniedError("node: its SVID has expired", DeniedReason.AGENT_EXPIRED)
        if self._stream.serial_number not in {node.serial_number, node.new_serial_number}:
            raise _EndedError
        return node

    def _schedule(self, known: Known | None) -> None:
        """Set the time of the next heartbeat.

        Args:
            known: the node when the stream begins: its last heartbeat counts. None in the middle.
        """
        hub = self._hub
        interval_s = hub.interval_s
        if interval_s is None or not self._stream.can_answer:
            self._next_s = None
            return
        wait_s = spread(interval_s, _JITTER)
        if known is not None and known.posture.last_seen_at is not None:
            age_s = (hub.clock.now() - known.posture.last_seen_at).total_seconds()
            wait_s -= max(0.0, age_s)
        if wait_s <= 0:
            wait_s = spread(min(interval_s, _LATE_S) / 2, 1)
        self._next_s = wait_s
        hub.pace.set(self.sleeper, wait_s)

    def _state(
        self,
        known: Known | None,
        *,
        outcome: Outcome | None = None,
        refused: SpireHwError | None = None,
        reattest: bool = False,
    ) -> StateMessage:
        """Return what the agent is told of its state."""
        lacks = self._hub.interval_s is not None and self._stream.can_answer
        lacks &= known is None or known.memory is None
        lacks &= self._stream.attestation_type in self._hub.verifiers
        said = state_message(
            None if known is None else known.standing,
            next_s=self._next_s,
            reattest=reattest or lacks,
            outcome=outcome,
            refused=refused,
        )
        self.told = said.state
        return said
