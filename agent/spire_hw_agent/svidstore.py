"""SVIDs of entries with `store_svid` go into outside stores, for workloads that no agent can reach.

The type of such an entry's selectors names the SVIDStore plugin, their values say where in the
store. What is in a store follows the entry: a new SVID or other bundles are put over the old ones,
and what no entry asks for any more is taken out. After a restart everything is put again; what an
entry that vanished meanwhile had stored stays, for nobody remembers it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from spire_hw.aio.backoff import Backoff
from spire_hw.errors import SpireHwError
from spire_hw.plugin.svidstore import StoredX509Svid

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.svidstore import SvidStore
    from spire_hw_agent.cache import Cache, Svid
    from spire_hw_agent.entry import AgentEntry

INTERVAL_S: Final = 5.0
_MAX_BACKOFF_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an SVID is: the store's name and what tells the place in it."""

    store: str
    metadata: tuple[str, ...]


@dataclass(slots=True)
class _Stored:
    """What is in a store for one entry."""

    place: _Place
    svid: StoredX509Svid


@dataclass(slots=True)
class _Failure:
    backoff: Backoff
    again_at: float


class SvidStores:
    """Keeps outside stores in step with the cache.

    Args:
        cache: the agent's entries, SVIDs and bundles.
        stores: SVIDStore plugins by name.
    """

    def __init__(
        self, cache: Cache, stores: Mapping[str, SvidStore], *, clock: Clock, log: Logger
    ) -> None:
        self._cache = cache
        self._stores = dict(stores)
        self._clock = clock
        self._log = log
        self._stored: dict[str, _Stored] = {}
        self._failures: dict[str, _Failure] = {}
        self._unknown: set[tuple[str, str]] = set()
        self._busy = asyncio.Lock()

    async def run(self) -> None:
        """Look every five seconds what has to be put or taken out; ends only when cancelled."""
        while True:
            await self.store_once()
            await self._clock.sleep(INTERVAL_S)

    async def store_once(self) -> None:
        """Put and take out what is due; failures are logged and tried again later."""
        async with self._busy:
            await self._store_once()

    async def _store_once(self) -> None:
        wanted = self._cache.storable()
        for entry_id in [i for i in self._stored if i not in wanted]:
            await self._try(entry_id, self._take_out)
        for entry_id, (entry, svid) in wanted.items():
            place = self._place(entry)
            if place is None or svid is None:
                continue
            held = self._stored.get(entry_id)
            if held is not None and held.place != place:
                await self._try(entry_id, self._take_out)
            made = self._document(entry, svid)
            held = self._stored.get(entry_id)
            if held is None or held.svid != made:
                await self._try(entry_id, partial(self._put, place=place, svid=made))
        known = wanted.keys() | self._stored.keys()
        self._failures = {i: f for i, f in self._failures.items() if i in known}

    def _place(self, entry: AgentEntry) -> _Place | None:
        selectors = sorted(entry.selectors)
        types = {selector.type for selector in selectors}
        name = selectors[0].type
        if len(types) == 1 and name in self._stores:
            return _Place(name, tuple(selector.value for selector in selectors))
        if (entry.entry_id, name) not in self._unknown:
            self._unknown.add((entry.entry_id, name))
            self._log.error(
                "Entry asks for an SVIDStore that is not configured",
                entry_id=entry.entry_id,
                svid_store=", ".join(sorted(types)),
            )
        return None

    def _document(self, entry: AgentEntry, svid: Svid) -> StoredX509Svid:
        federated = self._cache.federated_of([entry])
        return StoredX509Svid(
            spiffe_id=svid.spiffe_id,
            chain=svid.chain,
            private_key=svid.private_key,
            bundle=tuple(root.der for root in self._cache.bundle.x509_authorities),
            expires_at=svid.not_after,
            federated_bundles={
                domain: tuple(root.der for root in bundle.x509_authorities)
                for domain, bundle in federated.items()
            },
        )

    async def _try(self, entry_id: str, what: Callable[[str], Awaitable[None]]) -> None:
        failure = self._failures.get(entry_id)
        if failure is not None and self._clock.monotonic() < failure.again_at:
            return
        try:
            await what(entry_id)
        except SpireHwError as e:
            failure = failure or _Failure(Backoff(INTERVAL_S, _MAX_BACKOFF_S, 2.0), 0.0)
            wait_s = failure.backoff.next_s()
            failure.again_at = self._clock.monotonic() + wait_s
            self._failures[entry_id] = failure
            self._log.error(
                "Failed to bring an SVID store up to date",
                entry_id=entry_id,
                error=e.message,
                retry_in_s=round(wait_s, 1),
            )
        else:
            self._failures.pop(entry_id, None)

    async def _put(self, entry_id: str, *, place: _Place, svid: StoredX509Svid) -> None:
        await self._stores[place.store].put_x509_svid(svid, place.metadata)
        self._stored[entry_id] = _Stored(place, svid)
        self._log.debug("SVID stored", entry_id=entry_id, svid_store=place.store)

    async def _take_out(self, entry_id: str) -> None:
        place = self._stored[entry_id].place
        await self._stores[place.store].delete_x509_svid(place.metadata)
        del self._stored[entry_id]
        self._log.debug("SVID taken out of its store", entry_id=entry_id, svid_store=place.store)
