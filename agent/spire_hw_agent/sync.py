"""Keeps the cache true: entries and bundles from the server, SVIDs before they are due."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization

from spire_hw.aio.alarm import Alarm
from spire_hw.aio.backoff import Backoff
from spire_hw.errors import DeniedError, ErrorKind, SpireHwError
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key, spki_der
from spire_hw.svid.x509svid import parse_x509_svid, verify_x509_svid
from spire_hw.telemetry.metrics import NO_METRICS, Timed
from spire_hw.x509.certificate import issuing_authority_id
from spire_hw.x509.csr import build_csr
from spire_hw_agent.cache import Cache, Svid

if TYPE_CHECKING:
    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.key import PrivateKey
    from spire_hw.log import Logger
    from spire_hw.spiffeid import TrustDomain
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_agent.entry import AgentEntry
    from spire_hw_agent.trust import Trust
    from spire_hw_agent.upstream.client import IssuedSvid, Upstream

_FETCH_ENTRIES = ("manager", "sync", "fetch_entries_updates")
_FETCH_SVIDS = ("manager", "sync", "fetch_svids_updates")
_EXPIRING = ("cache_manager", "expiring_svids")
_BATCH = 500
_SVID_INTERVAL_S = 0.5
_MAX_ENTRY_BACKOFF_S = 8 * 60.0
_MAX_SVID_BACKOFF_S = 4 * 60.0
_IDLE_BACKOFF_S = 5.0
# While nobody answers a try costs nobody anything: this many intervals at most, so that a server that
# comes back hears from all its agents soon, spread as evenly and no more often than on any other day.
_AWAY_INTERVALS = 2.0
_FEDERATED_AT_ONCE = 10
_SLOW_KEYS = frozenset({KeyType.RSA_2048, KeyType.RSA_4096})

# (not before, not after) to the moment of renewal.
RenewAt = Callable[[datetime, datetime], datetime]


@dataclass(slots=True)
class _Refusal:
    """An entry for which the server would not issue; asked for again later, or once it changed."""

    revision: int
    backoff: Backoff
    again_at: float


class Synchroniser:
    """The two loops that keep the cache true.

    Args:
        renew_at: when an SVID of this validity is to be renewed.
        on_synchronised: told after every synchronisation.
        on_denied: told about a refusal by the server that concerns the agent itself, and about
            which version of its identity.
    """

    def __init__(
        self,
        upstream: Upstream,
        trust: Trust,
        cache: Cache,
        *,
        clock: Clock,
        log: Logger,
        interval_s: float,
        key_type: KeyType,
        renew_at: RenewAt,
        on_synchronised: Callable[[], None],
        on_denied: Callable[[DeniedError, int], Awaitable[None]],
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._metrics = metrics
        self._upstream = upstream
        self._trust = trust
        self._cache = cache
        self._clock = clock
        self._log = log
        self._interval_s = interval_s
        self._key_type = key_type
        self._renew_at = renew_at
        self._on_synchronised = on_synchronised
        self._on_denied = on_denied
        self._alarm = Alarm(clock)
        self._refusals: dict[str, _Refusal] = {}
        self._batch = _BATCH

    # -- entries and bundles ---------------------------------------------------

    def wake(self) -> None:
        """Synchronise now: the agent has a new identity."""
        self._alarm.ring()

    async def sync_once(self) -> None:
        """Bring entries and bundles up to date.

        Raises:
            SpireHwError: the server is away or refused.
        """
        with Timed(self._metrics, _FETCH_ENTRIES):
            bundle = await self._upstream.get_bundle()
            entries = await self._upstream.sync_entries()
            domains = {td for e in entries for td in e.federates_with}
            federated = await self._federated(domains - {bundle.trust_domain})
        await self._trust.accept(bundle)
        self._cache.set_bundles(bundle, federated)
        self._cache.set_entries(entries)
        self._on_synchronised()

    async def _federated(self, domains: set[TrustDomain]) -> dict[TrustDomain, Bundle]:
        at_once = asyncio.Semaphore(_FEDERATED_AT_ONCE)

        async def fetch(td: TrustDomain) -> tuple[TrustDomain, Bundle | None]:
            async with at_once:
                try:
                    return td, await self._upstream.get_federated_bundle(td)
                except SpireHwError as e:
                    if e.kind is not ErrorKind.NOT_FOUND:
                        raise
                    self._log.warning("Federated bundle not found", trust_domain=str(td))
                    return td, None

        pairs = await asyncio.gather(*(fetch(td) for td in sorted(domains)))
        return {td: bundle for td, bundle in pairs if bundle is not None}

    async def run_entries(self) -> None:
        """Synchronise for ever."""
        cap = min(_MAX_ENTRY_BACKOFF_S, 48 * self._interval_s)
        backoff = Backoff(self._interval_s, cap)
        was_away = False
        while True:
            wait = self._interval_s
            version = self._upstream.version
            try:
                await self.sync_once()
                backoff.reset()
                if was_away:
                    self._cache.ask()  # the other loop may be in for a long wait
                was_away = False
            except DeniedError as e:
                await self._denied(e, version)
                wait = backoff.next_s()
            except SpireHwError as e:
                self._log.error("Failed to synchronise with the server", error=e.message)
                was_away = e.kind is ErrorKind.UNAVAILABLE
                wait = backoff.next_s(_AWAY_INTERVALS * self._interval_s if was_away else None)
            if not self._cache.entries:
                wait = min(wait, _IDLE_BACKOFF_S)
            await self._alarm.sleep(wait)

    # -- SVIDs -----------------------------------------------------------------

    async def run_svids(self) -> None:
        """Ask for SVIDs that are missing or due, for ever."""
        backoff = Backoff(_SVID_INTERVAL_S, _MAX_SVID_BACKOFF_S)
        while True:
            seen = self._cache.demand.version
            wait = _SVID_INTERVAL_S
            version = self._upstream.version
            try:
                await self.renew_due()
                backoff.reset()
            except DeniedError as e:
                await self._denied(e, version)
                wait = backoff.next_s()
            except SpireHwError as e:
                self._log.error("Failed to renew X509-SVIDs", error=e.message)
                wait = backoff.next_s()
            await self._rest(seen, wait)

    async def _rest(self, seen: int, wait_s: float) -> None:
        """Wait for time to pass or for a workload that lacks an SVID, whichever is first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._cache.demand.wait(seen)

    async def renew_due(self) -> None:
        """Get every SVID that is missing or due.

        Raises:
            SpireHwError: the server is away or refused a batch.
        """
        due = [e for e in self._cache.due(self._clock.now()) if not self._is_refused(e)]
        if due:
            self._metrics.sample(_EXPIRING, len(due))
        while due:
            batch, due = due[: self._batch], due[self._batch :]
            try:
                await self._renew(batch)
            except SpireHwError:
                self._batch = max(1, self._batch // 2)
                raise
            self._batch = min(_BATCH, self._batch * 2)

    def _is_refused(self, entry: AgentEntry) -> bool:
        refusal = self._refusals.get(entry.entry_id)
        return (
            refusal is not None
            and refusal.revision == entry.revision
            and self._clock.monotonic() < refusal.again_at
        )

    async def _renew(self, batch: Sequence[AgentEntry]) -> None:
        keys = [await self._new_key() for _ in batch]
        requests = [
            (entry.entry_id, await build_csr(SoftwareSigner(key), spiffe_id=entry.spiffe_id))
            for entry, key in zip(batch, keys, strict=True)
        ]
        with Timed(self._metrics, _FETCH_SVIDS):
            answers = await self._upstream.new_x509_svids(requests)
        made: dict[str, Svid] = {}
        shared: dict[bytes, bytes] = {}  # intermediates are the same for all of a batch
        for entry, key, answer in zip(batch, keys, answers, strict=True):
            try:
                svid = made[entry.entry_id] = self._svid(entry, key, answer, shared)
            except SpireHwError as e:
                self._refused(entry, e.message)
            else:
                if self._cache.is_tainted(svid):  # usable for now, and not asked for in a loop
                    self._refused(entry, "the server still signs with a tainted authority")
                else:
                    self._refusals.pop(entry.entry_id, None)
            await asyncio.sleep(0)  # workloads are waiting too
        self._cache.put_svids(made)
        self._refusals = {i: r for i, r in self._refusals.items() if i in self._cache.entries}
        self._log.debug("X509-SVIDs renewed", count=len(made))

    async def _new_key(self) -> PrivateKey:
        if self._key_type in _SLOW_KEYS:
            return await asyncio.to_thread(generate_private_key, self._key_type)
        await asyncio.sleep(0)
        return generate_private_key(self._key_type)

    def _refused(self, entry: AgentEntry, why: str) -> None:
        refusal = self._refusals.get(entry.entry_id)
        if refusal is None or refusal.revision != entry.revision:
            refusal = _Refusal(entry.revision, Backoff(_SVID_INTERVAL_S, _MAX_SVID_BACKOFF_S), 0.0)
            self._refusals[entry.entry_id] = refusal
        wait = refusal.backoff.next_s()
        refusal.again_at = self._clock.monotonic() + wait
        self._log.error(
            "Failed to get an X509-SVID",
            entry_id=entry.entry_id,
            spiffe_id=str(entry.spiffe_id),
            error=why,
            retry_in_s=round(wait, 1),
        )

    async def _denied(self, error: DeniedError, version: int) -> None:
        self._log.error("The server refused this agent", error=error.message)
        await self._on_denied(error, version)

    def _svid(
        self, entry: AgentEntry, key: PrivateKey, answer: IssuedSvid, shared: dict[bytes, bytes]
    ) -> Svid:
        if answer.error is not None:
            raise answer.error
        svid = parse_x509_svid(answer.chain)
        now = self._clock.now()
        if svid.spiffe_id != entry.spiffe_id:
            raise SpireHwError(f"server issued {svid.spiffe_id} for {entry.spiffe_id}")
        if spki_der(svid.public_key) != spki_der(key.public_key()):
            raise SpireHwError("server issued an SVID for another key")
        if svid.not_after <= now:
            raise SpireHwError("server issued an SVID that has expired")
        # A clock that is slow must not keep workloads waiting.
        bundle = self._cache.bundle
        verify_x509_svid(svid, {bundle.trust_domain: bundle}, max(now, svid.not_before))
        return Svid(
            spiffe_id=svid.spiffe_id,
            chain=tuple(shared.setdefault(der, der) for der in answer.chain),
            private_key=key.private_bytes(
                serialization.Encoding.DER,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            not_after=svid.not_after,
            renew_at=self._renew_at(svid.not_before, svid.not_after),
            revision=entry.revision,
            authority_id=issuing_authority_id(svid.certificates),
        )
