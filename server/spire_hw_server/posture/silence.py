"""Nodes that show nothing good any more become stale, also when this server was away itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.errors import DeniedError, NotFoundError, SpireHwError
from spire_hw_server.datastore.records import EvidenceRecord, PostureUpdate
from spire_hw_server.posture import states
from spire_hw_server.posture.history import posture_of
from spire_hw_server.posture.outcome import StateChange

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.posture.judge import NodeJudge
    from spire_hw_server.posture.ledger import Ledger
    from spire_hw_server.postureconfig import PostureSettings

_OCCASION: Final = "silence"
_LONGEST_ROUND_S: Final = 30.0
_BATCH: Final = 500
_PRUNE_S: Final = 3600.0


class Silence:
    """Looks for silent nodes again and again, and for history that is too old."""

    def __init__(
        self,
        store: Datastore,
        ledger: Ledger,
        judge: NodeJudge,
        settings: PostureSettings,
        *,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._judge = judge
        self._settings = settings
        self._clock = clock
        self._log = log
        # While this server was away nobody could show anything.
        self._started_at = clock.now()
        self._prune_at = clock.monotonic() + _PRUNE_S

    async def run(self) -> None:
        """Look on a schedule; ends only when cancelled."""
        interval = self._settings.heartbeat_interval
        round_s = _LONGEST_ROUND_S
        if interval is not None:
            round_s = min(round_s, interval.total_seconds() / 2)
        while True:
            await self._clock.sleep(round_s)
            try:
                await self.look()
                await self._prune()
            except SpireHwError as e:
                self._log.error("Could not look for silent nodes", error=e.message)

    async def look(self) -> None:
        """Find silent nodes once.

        Raises:
            UnavailableError: the store is away.
        """
        interval = self._settings.heartbeat_interval
        if interval is None or not self._judge.is_active:
            return
        patience: timedelta = interval * self._settings.stale_after
        now = self._clock.now()
        if now - self._started_at < patience:
            return
        await self._ledger.flush()
        while True:
            found = await self._store.list_silent(now - patience, _BATCH)
            moved = [await self._move(agent_id, now) for agent_id in found]
            if len(found) < _BATCH or not any(moved):
                return

    async def _move(self, agent_id: SpiffeId, now: datetime) -> bool:
        known = await self._ledger.get(agent_id, fresh=True)
        good_at = None if known is None else known.posture.last_good_at
        if known is None or good_at is None:
            return False
        before = known.standing
        after = states.after_silence(before, good_at, self._settings.stale_action, now)
        if after == before:
            return False
        record = EvidenceRecord(
            made_at=now,
            occasion=_OCCASION,
            verdict=self._settings.stale_action.value,
            state=after.state.value,
            policy=known.posture.policy,
            policy_version=known.posture.policy_version,
            summary=after.message,
        )
        posture = posture_of(agent_id, after, known)
        try:
            await self._judge.move(
                PostureUpdate(posture, record), StateChange(agent_id, before, after, _OCCASION)
            )
        except (NotFoundError, DeniedError):
            return False  # gone or changed meanwhile
        return True

    async def _prune(self) -> None:
        if self._clock.monotonic() < self._prune_at:
            return
        self._prune_at = self._clock.monotonic() + _PRUNE_S
        gone = await self._store.prune_evidence(
            self._clock.now() - self._settings.evidence_retention
        )
        if gone:
            self._log.info("Old evidence was deleted", count=gone)
