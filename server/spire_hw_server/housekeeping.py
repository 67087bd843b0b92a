"""What nobody needs any longer is deleted: expired entries, tokens, nodes, old changes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from spire_hw.errors import NotFoundError, SpireHwError
from spire_hw.telemetry.metrics import NO_METRICS, Timed
from spire_hw_server.datastore.records import NodeFilter, Page

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_server.datastore.interface import Datastore

ROUND_S: Final = 60.0
_ENTRIES_EVERY: Final = timedelta(minutes=5)
_NODES_EVERY: Final = timedelta(hours=1)
_CHANGES_EVERY: Final = timedelta(hours=6)
# The first two are upstream's names; its lists of changes are one here.
_JOBS: Final = {
    "entries": ("registration_entry", "manager", "prune"),
    "nodes": ("node", "manager", "prune"),
    "changes": ("datastore", "event", "prune"),
}


@dataclass(frozen=True, slots=True)
class HousekeepingSettings:
    """How long things are kept.

    Attributes:
        nodes_after: how long a node may have been expired; None keeps all.
        nodes_batch: so many nodes are deleted in one round.
        tofu_nodes: also those that could not attest again.
        changes_after: how old a change may become.
    """

    nodes_after: timedelta | None = None
    nodes_batch: int = 1000
    tofu_nodes: bool = False
    changes_after: timedelta = timedelta(hours=12)


class Housekeeping:
    """Deletes on a schedule; a job that fails is logged and comes again at its next time."""

    def __init__(
        self,
        store: Datastore,
        settings: HousekeepingSettings,
        *,
        clock: Clock,
        log: Logger,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._metrics = metrics
        self._store = store
        self._settings = settings
        self._clock = clock
        self._log = log
        now = clock.now()
        self._due: dict[str, datetime] = {
            "entries": now + _ENTRIES_EVERY,
            "nodes": now + _NODES_EVERY,
            "changes": now + _CHANGES_EVERY,
        }

    async def run(self) -> None:
        """Look once a minute what is due; ends only when cancelled."""
        while True:
            await self._clock.sleep(ROUND_S)
            await self.tick()

    async def tick(self) -> None:
        """Run the jobs that are due now."""
        await self._job("entries", _ENTRIES_EVERY, self._prune_entries)
        await self._job("nodes", _NODES_EVERY, self._prune_nodes)
        await self._job("changes", _CHANGES_EVERY, self._prune_changes)

    async def _job(
        self, name: str, every: timedelta, action: Callable[[datetime], Awaitable[None]]
    ) -> None:
        now = self._clock.now()
        if now < self._due[name]:
            return
        self._due[name] = now + every
        try:
            with Timed(self._metrics, _JOBS[name]):
                await action(now)
        except SpireHwError as e:
            self._log.error("could not prune", what=name, error=e.message)

    async def _prune_entries(self, now: datetime) -> None:
        entries = await self._store.prune_entries(now)
        tokens = await self._store.prune_join_tokens(now)
        if entries or tokens:
            self._log.info("expired items were deleted", entries=entries, join_tokens=tokens)

    async def _prune_changes(self, now: datetime) -> None:
        await self._store.prune_changes(now - self._settings.changes_after)

    async def _prune_nodes(self, now: datetime) -> None:
        if self._settings.nodes_after is None:
            return
        where = NodeFilter(
            banned=False,
            can_reattest=None if self._settings.tofu_nodes else True,
            expires_before=now - self._settings.nodes_after,
        )
        page = await self._store.list_nodes(where, Page(size=self._settings.nodes_batch))
        deleted = 0
        for node in page.nodes:
            try:
                await self._store.delete_node(node.agent_id)
            except NotFoundError:
                continue  # somebody else was quicker
            deleted += 1
        if deleted:
            self._log.info("expired agents were deleted", count=deleted)
