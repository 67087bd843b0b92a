"""Which entries may an agent have: a graph in memory, kept in step with the store.

An agent may have every entry below its own ID, below an alias it matches, and below any entry it
may have. An alias is an entry below the server's ID; it matches nodes that have all its
selectors, and is itself never handed out. What an agent may have is worked out when it is first
asked for and kept until a change concerns it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypeVar

from typing_extensions import override

from spire_hw.aio.watch import Watch
from spire_hw.spiffeid import SpiffeId, TrustDomain, server_id
from spire_hw.telemetry.metrics import NO_METRICS, Timed
from spire_hw_server.datastore.follow import Follower
from spire_hw_server.datastore.records import ChangeKind, EntryFilter, Node, NodeFilter, Page

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.selector import Selector, SelectorSet
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.records import Change, Entry

_K = TypeVar("_K")
_V = TypeVar("_V")

_LOAD_PAGE: Final = 5000
_RELOAD: Final = ("entry", "cache", "reload")
_MANY_CHANGES: Final = 256
_UNDATED: Final = datetime.min.replace(tzinfo=UTC)
_NOTHING: Final[SelectorSet] = frozenset()


class AuthorizedEntries(Mapping[str, "Entry"]):
    """The entries one agent may have, by entry id, oldest first; never changes."""

    __slots__ = ("_entries",)

    def __init__(self, entries: dict[str, Entry]) -> None:
        self._entries = entries

    @override
    def __getitem__(self, entry_id: str) -> Entry:
        return self._entries[entry_id]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    @override
    def __len__(self) -> int:
        return len(self._entries)

    @override
    def __contains__(self, entry_id: object) -> bool:
        return entry_id in self._entries


def order_of(entry: Entry) -> tuple[datetime, str]:
    """Return what entries are sorted by: age, then entry id."""
    return (entry.created_at or _UNDATED, entry.entry_id)


class EntryGraph:
    """Entries and nodes in memory, without any I/O.

    IDs are filed by their text, whose hash Python keeps.
    """

    def __init__(self, trust_domain: TrustDomain) -> None:
        self._server = server_id(trust_domain).text
        self._entries: dict[str, Entry] = {}
        self._below: dict[str, dict[str, Entry]] = {}
        self._having: dict[str, dict[str, Entry]] = {}
        self._aliases: dict[Selector, dict[str, tuple[SelectorSet, Entry]]] = {}
        self._alias_keys: dict[str, Selector] = {}
        self._nodes: dict[str, SelectorSet | None] = {}
        self._known: dict[str, AuthorizedEntries] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, entry_id: str) -> Entry | None:
        """Return an entry, None when there is none."""
        return self._entries.get(entry_id)

    def by_spiffe_id(self, spiffe_id: SpiffeId) -> tuple[Entry, ...]:
        """Return the entries with a SPIFFE ID, oldest first."""
        return tuple(sorted(self._having.get(spiffe_id.text, {}).values(), key=order_of))

    def selectors_of(self, agent_id: SpiffeId) -> SelectorSet:
        """Return the selectors of a node; none when it is unknown or banned."""
        return self._nodes.get(agent_id.text) or _NOTHING

    def is_banned(self, agent_id: SpiffeId) -> bool:
        """Tell whether a node is known to be banned."""
        return self._nodes.get(agent_id.text, _NOTHING) is None

    def put_entry(self, entry: Entry) -> bool:
        """Add or replace an entry; tell whether that changed anything."""
        old = self._entries.get(entry.entry_id)
        if old == entry:
            return False
        if old is not None:
            self._unlink(old)
        self._entries[entry.entry_id] = entry
        self._below.setdefault(entry.parent_id.text, {})[entry.entry_id] = entry
        self._having.setdefault(entry.spiffe_id.text, {})[entry.entry_id] = entry
        if entry.parent_id.text == self._server:
            self._link_alias(entry)
        self._forget(entry)
        return True

    def remove_entry(self, entry_id: str) -> bool:
        """Take an entry out; tell whether it was there."""
        old = self._entries.get(entry_id)
        if old is None:
            return False
        self._unlink(old)
        return True

    def put_node(self, agent_id: SpiffeId, selectors: Iterable[Selector] | None) -> bool:
        """Set the selectors of a node, None when it is banned; tell whether that changed."""
        new = None if selectors is None else frozenset(selectors)
        key = agent_id.text
        if key in self._nodes and self._nodes[key] == new:
            return False
        self._nodes[key] = new
        self._known.pop(key, None)
        return True

    def remove_node(self, agent_id: SpiffeId) -> bool:
        """Take a node out; tell whether it was there."""
        self._known.pop(agent_id.text, None)
        if agent_id.text not in self._nodes:
            return False
        del self._nodes[agent_id.text]
        return True

    def forget_all(self) -> None:
        """Work out everything anew; cheaper than many single changes."""
        self._known.clear()

    def authorized(self, agent_id: SpiffeId) -> AuthorizedEntries:
        """Return what an agent may have; nothing when it is banned."""
        key = agent_id.text
        known = self._known.get(key)
        if known is not None:
            return known
        selectors = self._nodes.get(key, _NOTHING)
        if selectors is None:
            return AuthorizedEntries({})
        found = self._walk(key, selectors)
        if key in self._nodes:
            self._known[key] = found
        return found

    def _walk(self, agent_id: str, selectors: SelectorSet) -> AuthorizedEntries:
        """Go down from the agent and its aliases."""
        parents = {agent_id}
        for selector in selectors:
            for needed, alias in self._aliases.get(selector, {}).values():
                if needed <= selectors:
                    parents.add(alias.spiffe_id.text)
        waiting = list(parents)
        found: list[Entry] = []
        while waiting:
            below = self._below.get(waiting.pop())
            if below is None:
                continue
            found.extend(below.values())
            for entry in below.values():
                child = entry.spiffe_id.text
                if child not in parents:
                    parents.add(child)
                    waiting.append(child)
        found.sort(key=order_of)
        return AuthorizedEntries({e.entry_id: e for e in found})

    def _link_alias(self, entry: Entry) -> None:
        """File an alias under the one of its selectors that has the fewest so far."""
        needed = frozenset(entry.selectors)
        key = min(needed, key=lambda s: (len(self._aliases.get(s, {})), s))
        self._aliases.setdefault(key, {})[entry.entry_id] = (needed, entry)
        self._alias_keys[entry.entry_id] = key

    def _unlink(self, entry: Entry) -> None:
        del self._entries[entry.entry_id]
        _drop(self._below, entry.parent_id.text, entry.entry_id)
        _drop(self._having, entry.spiffe_id.text, entry.entry_id)
        key = self._alias_keys.pop(entry.entry_id, None)
        if key is not None:
            _drop(self._aliases, key, entry.entry_id)
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        """Forget the answers an entry has or may have a part in: go up to agents and aliases."""
        needed: list[SelectorSet] = []
        seen: set[str] = set()
        waiting = [entry]
        while waiting:
            lower = waiting.pop()
            parent = lower.parent_id.text
            if parent == self._server:
                needed.append(frozenset(lower.selectors))
            elif parent not in seen:
                seen.add(parent)
                self._known.pop(parent, None)
                waiting.extend(self._having.get(parent, {}).values())
        if needed:
            for agent_id in list(self._known):
                selectors = self._nodes.get(agent_id) or _NOTHING
                if any(s <= selectors for s in needed):
                    del self._known[agent_id]


def _drop(index: dict[_K, dict[str, _V]], key: _K, entry_id: str) -> None:
    inner = index[key]
    del inner[entry_id]
    if not inner:
        del index[key]


class EntryCache:
    """The graph of a running server.

    Args:
        datastore: where entries and nodes are.
        trust_domain: the server's own.
        clock: time.
        log: where trouble is reported.
        poll_s: seconds between looks at what other servers changed (`cache_reload_interval`).
        full_reload_s: seconds between complete reloads.
        metrics: takes those down.
    """

    def __init__(
        self,
        datastore: Datastore,
        *,
        trust_domain: TrustDomain,
        clock: Clock,
        log: Logger,
        poll_s: float = 5.0,
        full_reload_s: float = 86400.0,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._metrics = metrics
        self._datastore = datastore
        self._trust_domain = trust_domain
        self._graph = EntryGraph(trust_domain)
        self.watch: Watch[int] = Watch(0)
        self._follower = Follower(
            datastore,
            self,
            name="entries",
            clock=clock,
            log=log,
            poll_s=poll_s,
            full_reload_s=full_reload_s,
        )

    def __len__(self) -> int:
        return len(self._graph)

    @property
    def version(self) -> int:
        """Return a number that grows with every change of entries or nodes."""
        return self.watch.value

    async def start(self) -> None:
        """Load everything and follow the store.

        Raises:
            SpireHwError: the store cannot be read.
        """
        await self._follower.start()

    async def refresh(self) -> None:
        """Catch up with everything committed before the call.

        Raises:
            SpireHwError: the store cannot be read.
        """
        await self._follower.refresh()

    async def refresh_own(self) -> None:
        """Catch up with what was written through this server's store before the call; cheaper.

        Raises:
            SpireHwError: the store cannot be read.
        """
        await self._follower.refresh_own()

    async def close(self) -> None:
        """Stop following."""
        await self._follower.close()

    def authorized(self, agent_id: SpiffeId) -> AuthorizedEntries:
        """Return the entries an agent may have; the same object until they change."""
        return self._graph.authorized(agent_id)

    def entry(self, entry_id: str) -> Entry | None:
        """Return an entry, None when there is none."""
        return self._graph.entry(entry_id)

    def by_spiffe_id(self, spiffe_id: SpiffeId) -> tuple[Entry, ...]:
        """Return the entries with a SPIFFE ID, oldest first."""
        return self._graph.by_spiffe_id(spiffe_id)

    def node_selectors(self, agent_id: SpiffeId) -> SelectorSet:
        """Return the selectors of a node; none when it is unknown or banned."""
        return self._graph.selectors_of(agent_id)

    def is_banned(self, agent_id: SpiffeId) -> bool:
        """Tell whether a node is known to be banned; the store may know more."""
        return self._graph.is_banned(agent_id)

    async def load(self) -> None:
        """Read everything anew; called by the follower."""
        with Timed(self._metrics, _RELOAD):
            await self._load()

    async def _load(self) -> None:
        graph = EntryGraph(self._trust_domain)
        token = ""
        while True:
            entries = await self._datastore.list_entries(EntryFilter(), Page(_LOAD_PAGE, token))
            for entry in entries.entries:
                graph.put_entry(entry)
            token = entries.next_token
            if not token:
                break
        while True:
            nodes = await self._datastore.list_nodes(NodeFilter(), Page(_LOAD_PAGE, token))
            for node in nodes.nodes:
                graph.put_node(node.agent_id, _selectors(node))
            token = nodes.next_token
            if not token:
                break
        self._graph = graph
        self.watch.set(self.watch.value + 1)

    async def apply(self, changes: Sequence[Change]) -> None:
        """Read what changed; called by the follower."""
        entry_ids = {c.key for c in changes if c.kind is ChangeKind.ENTRY}
        left = {SpiffeId(c.key): c.node for c in changes if c.kind is ChangeKind.NODE}
        unknown = [agent_id for agent_id, node in left.items() if node is None]
        entries = await self._datastore.get_entries(entry_ids) if entry_ids else {}
        nodes = left | (await self._datastore.get_nodes(unknown) if unknown else {})
        graph = self._graph
        if len(entry_ids) > _MANY_CHANGES:
            graph.forget_all()
        changed = False
        for entry_id in entry_ids:
            entry = entries.get(entry_id)
            if entry is None:
                changed |= graph.remove_entry(entry_id)
            else:
                changed |= graph.put_entry(entry)
        for agent_id, node in nodes.items():
            if node is None:
                changed |= graph.remove_node(agent_id)
            else:
                changed |= graph.put_node(agent_id, _selectors(node))
        if changed:
            self.watch.set(self.watch.value + 1)


def _selectors(node: Node) -> tuple[Selector, ...] | None:
    return None if node.banned else node.selectors
