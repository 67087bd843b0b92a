"""Attested nodes in memory, for the check that every call of an agent passes.

A node is read from the store at its first call and kept until a change of it is seen. Changes made
through this server's store are seen before the next look-up answers; those of other servers that
share the database at the next poll.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from spire_hw.errors import NotFoundError, SpireHwError
from spire_hw.spiffeid import SpiffeId
from spire_hw_server.datastore.records import ChangeKind, Node

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw_server.datastore.interface import Datastore

_MAX_NODES: Final = 100_000
_CHANGES: Final = 1000


class NodeCache:
    """The nodes that call, by agent ID; all use is on one event loop."""

    def __init__(
        self,
        store: Datastore,
        *,
        clock: Clock,
        log: Logger,
        poll_s: float = 1.0,
        limit: int = _MAX_NODES,
    ) -> None:
        self._store = store
        self._clock = clock
        self._log = log
        self._poll_s = poll_s
        self._limit = limit
        self._nodes: OrderedDict[SpiffeId, Node] = OrderedDict()
        self._seen = 0
        self._noticed = 0
        # Told of every change, with the agent ID.
        self.on_change: Callable[[SpiffeId], None] | None = None

    def __len__(self) -> int:
        return len(self._nodes)

    async def start(self) -> None:
        """Begin to follow changes."""
        self._noticed = self._store.changed.version
        self._seen = await self._store.last_change()

    async def run(self) -> None:
        """Follow the changes of other servers; ends only when cancelled."""
        while True:
            await self._clock.sleep(self._poll_s)
            try:
                await self._catch_up()
            except SpireHwError as e:
                self._nodes.clear()
                self._log.warning("could not follow changes of nodes", error=e.message)

    async def get(self, agent_id: SpiffeId) -> Node | None:
        """Return the node, None when there is none.

        Raises:
            UnavailableError: it is not in memory and the store is away.
        """
        if self._store.changed.version != self._noticed:
            await self._catch_up()
        node = self._nodes.get(agent_id)
        if node is not None:
            return node
        return await self.reload(agent_id)

    async def reload(self, agent_id: SpiffeId) -> Node | None:
        """Read one node from the store, whatever is in memory."""
        self._nodes.pop(agent_id, None)
        before = (self._store.changed.version, self._seen)
        try:
            node = await self._store.get_node(agent_id)
        except NotFoundError:
            return None
        # What changed while it was read may be missing in what was read.
        if (self._store.changed.version, self._seen) == before:
            self._nodes[agent_id] = node
            if len(self._nodes) > self._limit:
                self._nodes.popitem(last=False)
        return node

    def forget(self, agent_id: SpiffeId) -> None:
        """Drop a node that was changed, banned or deleted."""
        self._nodes.pop(agent_id, None)

    async def follow_own(self) -> None:
        """Take note of changes made through this server's store at once; ends when cancelled."""
        changed = self._store.changed
        seen = changed.version
        while True:
            _, seen = await changed.wait(seen)
            if seen == self._noticed:
                continue  # whoever asked for a node was quicker
            try:
                await self._catch_up()
            except SpireHwError as e:
                self._nodes.clear()
                self._log.warning("could not follow changes of nodes", error=e.message)

    def _changed(self, agent_id: SpiffeId) -> None:
        self._nodes.pop(agent_id, None)
        if self.on_change is not None:
            self.on_change(agent_id)

    async def _catch_up(self) -> None:
        noticed = self._store.changed.version
        while True:
            changes = self._store.recent_changes(self._seen)
            if not changes:
                changes = await self._store.list_changes(self._seen, _CHANGES)
            if changes and changes[0].event_id != self._seen + 1:
                self._nodes.clear()
            for change in changes:
                if change.kind is ChangeKind.NODE:
                    self._changed(SpiffeId(change.key))
                self._seen = max(self._seen, change.event_id)
            if len(changes) < _CHANGES:
                break
        self._noticed = noticed
