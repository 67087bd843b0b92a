"""Which identities a workload has: selectors in, live updates out.

The cache holds this agent's entries, their X509-SVIDs and the bundles, all in memory. Workloads
with the same selectors share one group, so that an update is computed and encoded once and handed
to every open stream by reference.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from spire_hw.aio.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.selector import Selector
    from spire_hw.spiffeid import SpiffeId, TrustDomain
    from spire_hw_agent.entry import AgentEntry, JwtToken, Selectors


_JWT_MARGIN = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Svid:
    """An X509-SVID with its key, as a workload gets it.

    Attributes:
        chain: DER certificates, leaf first.
        private_key: DER PKCS#8; a secret.
        renew_at: when its successor is asked for.
        revision: revision of the entry it was issued for.
        authority_id: of the root it chains to.
    """

    spiffe_id: SpiffeId
    chain: tuple[bytes, ...]
    private_key: bytes = field(repr=False)
    not_after: datetime
    renew_at: datetime
    revision: int
    authority_id: str = ""


@dataclass(frozen=True, slots=True)
class Identity:
    """An entry together with its SVID."""

    entry: AgentEntry
    svid: Svid


@dataclass(frozen=True)
class WorkloadUpdate:
    """Everything a workload with certain selectors may have.

    Attributes:
        granted: whether any entry matches; without one there is nothing for this workload.
        identities: in the order of their entry ids, the first is the default; None while SVIDs
            are missing and there is nothing to show.
        bundle: own trust domain.
        federated: bundles of the trust domains its entries federate with.
    """

    granted: bool
    identities: tuple[Identity, ...] | None
    bundle: Bundle
    federated: Mapping[TrustDomain, Bundle]
    # Answers encoded once for all streams of the group, by method.
    encoded: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)


@dataclass(slots=True)
class _Group:
    selectors: Selectors
    updates: Watch[WorkloadUpdate]
    readers: int = 0


class Cache:
    """The agent's view of its entries; lives on one event loop.

    Args:
        bundle: the own trust domain's bundle.
        max_svids: how many SVIDs are kept for entries without an open stream.
        max_tokens: how many JWT-SVIDs are kept.

    Attributes:
        tokens: JWT-SVIDs of the entries.
        demand: set whenever SVIDs may be missing.
    """

    def __init__(self, bundle: Bundle, *, max_svids: int = 1000, max_tokens: int = 1000) -> None:
        self._bundle = bundle
        self._tainted: frozenset[str] = frozenset()
        self._federated: dict[TrustDomain, Bundle] = {}
        self._entries: dict[str, AgentEntry] = {}
        self._by_first_selector: dict[Selector, set[str]] = {}
        self._svids: dict[str, Svid] = {}
        self._groups: dict[Selectors, _Group] = {}
        self._used: OrderedDict[str, None] = OrderedDict()
        self._max_svids = max_svids
        self._is_cut_off = False
        self.tokens = JwtCache(max_tokens=max_tokens)
        self.demand = Watch(0)

    @property
    def bundle(self) -> Bundle:
        """Return the own bundle."""
        return self._bundle

    @property
    def entries(self) -> Mapping[str, AgentEntry]:
        """Return all entries by id."""
        return self._entries

    @property
    def svid_count(self) -> int:
        """Return how many SVIDs are held."""
        return len(self._svids)

    def bundles(self) -> dict[TrustDomain, Bundle]:
        """Return the own and all foreign bundles."""
        return {self._bundle.trust_domain: self._bundle, **self._federated}

    # -- what the server says ------------------------------------------------

    def set_entries(self, entries: Iterable[AgentEntry]) -> None:
        """Replace all entries; SVIDs of vanished ones are dropped at once.

        Nothing is taken while the node is cut off: an answer may have been under way.
        """
        fresh = {} if self._is_cut_off else {e.entry_id: e for e in entries}
        if fresh == self._entries:
            return
        self._entries = fresh
        index: defaultdict[Selector, set[str]] = defaultdict(set)
        for entry in fresh.values():
            if not entry.store_svid:
                index[min(entry.selectors)].add(entry.entry_id)
        self._by_first_selector = dict(index)
        for entry_id in [i for i in self._svids if not self._still_fits(i)]:
            del self._svids[entry_id]
        for entry_id in [i for i in self._used if i not in fresh]:
            del self._used[entry_id]
        self.tokens.keep(fresh)
        self._refresh_groups()
        self.ask()

    def ask(self) -> None:
        """Have whoever gets SVIDs look now for what is missing or due."""
        self.demand.set(self.demand.value + 1)

    def _still_fits(self, entry_id: str) -> bool:
        entry = self._entries.get(entry_id)
        return entry is not None and entry.spiffe_id == self._svids[entry_id].spiffe_id

    def set_bundles(self, bundle: Bundle, federated: Mapping[TrustDomain, Bundle]) -> None:
        """Replace the own and the foreign bundles."""
        if bundle == self._bundle and dict(federated) == self._federated:
            return
        self._bundle = bundle
        self._federated = dict(federated)
        self._tainted = frozenset(r.authority_id for r in bundle.x509_authorities if r.tainted)
        self._refresh_groups()

    def put_svids(self, svids: Mapping[str, Svid]) -> None:
        """Store SVIDs by entry id; those of entries that vanished meanwhile are ignored."""
        for entry_id, svid in svids.items():
            if entry_id in self._entries and self._entries[entry_id].spiffe_id == svid.spiffe_id:
                self._svids[entry_id] = svid
        self._refresh_groups()

    def reissue(self) -> None:
        """Forget every SVID and token, so that all are issued anew: the authorities changed."""
        self._svids.clear()
        self.tokens.clear()
        self._refresh_groups()
        self.ask()

    def revoke(self) -> None:
        """Forget everything that was granted: the agent lost its own identity."""
        self.set_entries(())
        self.tokens.clear()

    @property
    def is_cut_off(self) -> bool:
        """Tell whether nothing is granted on this node, whatever its entries say."""
        return self._is_cut_off

    def cut_off(self) -> None:
        """Forget everything that was granted and take nothing new; every open stream is told."""
        if self._is_cut_off:
            return
        self._is_cut_off = True
        self.revoke()
        for group in self._groups.values():
            group.updates.set(self._update_for(group.selectors, None))

    def restore(self) -> None:
        """Take entries again, from the next synchronisation on."""
        self._is_cut_off = False

    # -- what is due ----------------------------------------------------------

    def due(self, now: datetime) -> list[AgentEntry]:
        """Return the entries that need a new SVID, those with an open stream first."""
        self.expire(now)
        wanted = self._wanted()
        self._trim(wanted)
        return [e for e in wanted if self._is_due(e, now)]

    def _is_due(self, entry: AgentEntry, now: datetime) -> bool:
        svid = self._svids.get(entry.entry_id)
        return (
            svid is None
            or svid.revision != entry.revision
            or now >= svid.renew_at
            or self.is_tainted(svid)
        )

    def is_tainted(self, svid: Svid) -> bool:
        """Tell whether an SVID chains to an authority that is being withdrawn."""
        return svid.authority_id in self._tainted

    def expire(self, now: datetime) -> None:
        """Drop the SVIDs that have ended."""
        gone = [i for i, s in self._svids.items() if s.not_after <= now]
        for entry_id in gone:
            del self._svids[entry_id]
        if gone:
            self._refresh_groups()

    def _wanted(self) -> list[AgentEntry]:
        live = {e.entry_id: e for g in self._groups.values() for e in self.matching(g.selectors)}
        live |= {e.entry_id: e for e in self._entries.values() if e.store_svid}
        room = self._max_svids - len(live)
        for entry_id in reversed(self._used):
            if room <= 0:
                break
            if entry_id not in live:
                live[entry_id] = self._entries[entry_id]
                room -= 1
        for entry in self._entries.values():
            if room <= 0:
                break
            if entry.prefetch and entry.entry_id not in live:
                live[entry.entry_id] = entry
                room -= 1
        return list(live.values())

    def _trim(self, wanted: list[AgentEntry]) -> None:
        keep = {e.entry_id for e in wanted}
        for entry_id in [i for i in self._svids if i not in keep]:
            del self._svids[entry_id]

    def storable(self) -> dict[str, tuple[AgentEntry, Svid | None]]:
        """Return the entries whose SVIDs go into outside stores, by id, with their SVIDs."""
        return {i: (e, self._svids.get(i)) for i, e in self._entries.items() if e.store_svid}

    # -- what a workload may have ---------------------------------------------

    def matching(self, selectors: Selectors) -> list[AgentEntry]:
        """Return the entries whose selectors are all among these, in the order of their ids."""
        found = [
            self._entries[entry_id]
            for selector in selectors
            for entry_id in self._by_first_selector.get(selector, ())
            if self._entries[entry_id].selectors <= selectors
        ]
        return _unique_hints(sorted(found, key=lambda e: e.entry_id))

    @contextmanager
    def subscribe(self, selectors: Selectors) -> Iterator[Watch[WorkloadUpdate]]:
        """Follow what a workload with these selectors may have.

        Yields:
            A watch of the latest update.
        """
        group = self._groups.get(selectors)
        if group is None:
            group = _Group(selectors, Watch(self._update_for(selectors, None)))
            self._groups[selectors] = group
        group.readers += 1
        for entry in self.matching(selectors):
            self._used[entry.entry_id] = None
            self._used.move_to_end(entry.entry_id)
        if group.updates.value.identities is None:
            self.ask()
        try:
            yield group.updates
        finally:
            group.readers -= 1
            if not group.readers:
                self._groups.pop(selectors, None)

    def _refresh_groups(self) -> None:
        for group in self._groups.values():
            old = group.updates.value
            new = self._update_for(group.selectors, old)
            if new != old:
                group.updates.set(new)

    def _update_for(self, selectors: Selectors, old: WorkloadUpdate | None) -> WorkloadUpdate:
        entries = self.matching(selectors)
        return WorkloadUpdate(
            bool(entries),
            self._identities(entries, old),
            self._bundle,
            self.federated_of(entries),
        )

    def _identities(
        self, entries: list[AgentEntry], old: WorkloadUpdate | None
    ) -> tuple[Identity, ...] | None:
        """Return all identities; while some lack an SVID, those that were shown before."""
        svids = self._svids
        ready = tuple(Identity(e, svids[e.entry_id]) for e in entries if e.entry_id in svids)
        if len(ready) == len(entries):
            return ready
        shown = {i.entry.entry_id for i in (old.identities or ())} if old is not None else set()
        return tuple(i for i in ready if i.entry.entry_id in shown) or None

    def federated_of(self, entries: Iterable[AgentEntry]) -> dict[TrustDomain, Bundle]:
        """Return the bundles of the trust domains that entries federate with."""
        return {
            td: self._federated[td]
            for entry in entries
            for td in entry.federates_with
            if td in self._federated
        }


def _unique_hints(entries: list[AgentEntry]) -> list[AgentEntry]:
    """Of entries with the same hint keep the oldest (SPIFFE Workload API, section 5.2.1)."""
    oldest: dict[str, AgentEntry] = {}
    for entry in entries:
        if entry.hint:
            holder = oldest.setdefault(entry.hint, entry)
            if (entry.created_at, entry.entry_id) < (holder.created_at, holder.entry_id):
                oldest[entry.hint] = entry
    return [e for e in entries if not e.hint or oldest[e.hint] is e]


class JwtCache:
    """JWT-SVIDs by entry and exact set of audiences, least recently used first out."""

    def __init__(self, *, max_tokens: int = 1000) -> None:
        self._tokens: OrderedDict[tuple[str, tuple[str, ...]], tuple[int, JwtToken]] = OrderedDict()
        self._max_tokens = max_tokens

    @staticmethod
    def _key(entry: AgentEntry, audience: Iterable[str]) -> tuple[str, tuple[str, ...]]:
        return entry.entry_id, tuple(sorted(set(audience)))

    def __len__(self) -> int:
        return len(self._tokens)

    def get(self, entry: AgentEntry, audience: Iterable[str], now: datetime) -> JwtToken | None:
        """Return a token of this revision of the entry that has not ended yet, or None."""
        key = self._key(entry, audience)
        revision, token = self._tokens.get(key, (None, None))
        if token is None:
            return None
        if revision != entry.revision or token.expires_at <= now + _JWT_MARGIN:
            del self._tokens[key]
            return None
        self._tokens.move_to_end(key)
        return token

    def put(self, entry: AgentEntry, audience: Iterable[str], token: JwtToken) -> None:
        """Keep a token; the least recently used one makes room."""
        key = self._key(entry, audience)
        self._tokens[key] = (entry.revision, token)
        self._tokens.move_to_end(key)
        while len(self._tokens) > self._max_tokens:
            self._tokens.popitem(last=False)

    def keep(self, entries: Mapping[str, AgentEntry]) -> None:
        """Forget the tokens of entries that are gone or have changed."""
        for key, (revision, _) in list(self._tokens.items()):
            entry = entries.get(key[0])
            if entry is None or entry.revision != revision:
                del self._tokens[key]

    def clear(self) -> None:
        """Forget every token."""
        self._tokens.clear()
