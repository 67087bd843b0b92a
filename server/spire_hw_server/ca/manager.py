"""Keeps an X.509 and a JWT authority alive: by the clock, and by hand.

At start it goes on from where the last run ended (`ca.restore`); killed between any two steps, it
does so from the journal. The steps themselves are taken by `ca.succession`, which one is due is
decided by `ca.slots`. What certificates look like is `ca.profile`'s; signing is `ca.authority`'s.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final, TypeVar

from spire_hw.errors import InvalidInputError, SpireHwError, UnavailableError
from spire_hw.key import fingerprint
from spire_hw.telemetry.metrics import NO_METRICS, Timed
from spire_hw_server.ca.byhand import ByHand
from spire_hw_server.ca.keeper import JournalKeeper
from spire_hw_server.ca.line import JwtLine, Line, X509Line
from spire_hw_server.ca.restore import Restorer
from spire_hw_server.ca.slots import Record, Slots, Status
from spire_hw_server.ca.succession import Succession
from spire_hw_server.ca.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from spire_hw.clock import Clock
    from spire_hw.key import KeyType
    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import Keys
    from spire_hw.plugin.upstreamauthority import UpstreamAuthority
    from spire_hw.spiffeid import TrustDomain
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_server.bundles import Bundles
    from spire_hw_server.ca.authority import Issuer
    from spire_hw_server.ca.byhand import CaRequest
    from spire_hw_server.ca.journal import JwtRecord, X509Record
    from spire_hw_server.ca.mark import AuthorityMark
    from spire_hw_server.datastore.interface import Datastore

CHECK_INTERVAL_S: Final = 10.0
_PRUNE_INTERVAL: Final = timedelta(hours=6)
_PRUNE_AFTER: Final = timedelta(hours=24)
_PRUNE_JOURNAL_AFTER: Final = timedelta(weeks=2)
_FAILURES_TOLERATED: Final = 10
_PRUNE: Final = ("ca", "manager", "bundle", "prune")
_PRUNED: Final = ("ca", "manager", "bundle", "pruned")


@dataclass(frozen=True, slots=True)
class CaSettings:
    """What the operator decides about the authorities.

    Attributes:
        ca_ttl: life of an X.509 authority and of a JWT key.
        jwt_enabled: whether there is a JWT authority at all.
        keys_persist: False for a KeyManager that forgets its keys by nature (`memory`).
        accept_lost_authorities: authority ids whose keys the operator gave up for lost.
    """

    trust_domain: TrustDomain
    ca_ttl: timedelta
    ca_key_type: KeyType
    jwt_key_type: KeyType
    jwt_enabled: bool = True
    keys_persist: bool = True
    accept_lost_authorities: frozenset[str] = frozenset()


R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Authority:
    """The UpstreamAuthority plugin that signs our CA, and its name."""

    plugin: UpstreamAuthority
    name: str


class CaManager:
    """The authorities of one server; one instance, one event loop."""

    def __init__(
        self,
        settings: CaSettings,
        *,
        keys: Keys,
        store: Datastore,
        bundles: Bundles,
        issuer: Issuer,
        mark: AuthorityMark,
        clock: Clock,
        log: Logger,
        upstream: Authority | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._store = store
        self._bundles = bundles
        self._issuer = issuer
        self._mark = mark
        self._clock = clock
        self._log = log
        self._metrics = metrics
        self._lock = asyncio.Lock()
        self._failures = 0
        self._next_prune: datetime | None = None
        self._upstream = None if upstream is None else self._opened(upstream)
        self._x509 = X509Line(
            settings.ca_key_type,
            trust_domain=settings.trust_domain,
            ttl=settings.ca_ttl,
            issuer=issuer,
            upstream=self._upstream,
            clock=clock,
        )
        self._jwt = JwtLine(
            settings.jwt_key_type,
            trust_domain=settings.trust_domain,
            ttl=settings.ca_ttl,
            issuer=issuer,
            upstream=self._upstream,
            clock=clock,
        )
        self._keeper = JournalKeeper(store, mark, log)
        self._succession = Succession(
            self._x509,
            self._jwt if settings.jwt_enabled else None,
            keys=keys,
            bundles=bundles,
            keeper=self._keeper,
            clock=clock,
            log=log,
            metrics=metrics,
        )
        self._by_hand = ByHand(
            self._x509,
            self._succession,
            keys=keys,
            issuer=issuer,
            bundles=bundles,
            mark=mark,
            trust_domain=settings.trust_domain,
            has_upstream=upstream is not None,
            clock=clock,
            log=log,
        )

    def _opened(self, authority: Authority) -> Upstream:
        return Upstream(
            authority.plugin,
            authority.name,
            trust_domain=self._settings.trust_domain,
            subject=self._ca_subject,
            bundles=self._bundles,
            in_use=self._own_ids,
            clock=self._clock,
            log=self._log,
        )

    async def _ca_subject(self) -> bytes:
        return (await self._issuer.ca_subject()).subject

    @property
    def has_upstream(self) -> bool:
        """Tell whether our CA hangs from a root above it, by an UpstreamAuthority or by hand."""
        by_hand = any(record.offline for record in self._x509.slots.records())
        return self._upstream is not None or by_hand

    @property
    def x509_slots(self) -> Slots[X509Record]:
        """Return the X.509 authorities."""
        return self._x509.slots

    @property
    def jwt_slots(self) -> Slots[JwtRecord]:
        """Return the JWT authorities."""
        return self._jwt.slots

    def authorities(self) -> Iterator[tuple[str, X509Record | JwtRecord, bytes]]:
        """Return every authority: its kind, its record, and its key (SubjectPublicKeyInfo)."""
        for x509 in self._x509.slots.records():
            yield self._x509.name, x509, self._x509.public_key(x509)
        for jwt in self._jwt.slots.records():
            yield self._jwt.name, jwt, self._jwt.public_key(jwt)

    @asynccontextmanager
    async def held_still(self) -> AsyncIterator[dict[str, str]]:
        """Change no authority for a while; yields what needs which key, by fingerprint."""
        async with self._lock:
            needed = {}
            if self._x509.requested:
                needed[self._x509.requested] = "a CA certificate that is being signed by hand"
            for kind, record, spki in self.authorities():
                if record.status is not Status.OLD:
                    name = f"{kind} authority {record.authority_id}"
                    needed[fingerprint(spki)] = f"{name} ({record.status.name.lower()})"
            yield needed

    @property
    def healthy(self) -> bool:
        """Tell whether rotation works; ten failures in a row are tolerated."""
        return self._failures <= _FAILURES_TOLERATED

    async def start(self) -> None:
        """Restore the authorities, or make the first ones; afterwards X.509 can be issued.

        Raises:
            NotReadyError: the journal names keys that the KeyManager does not list.
            PluginError: the KeyManager failed.
            SpireHwError: the store or a file failed.
        """
        async with self._lock:
            await self._restore()
            await self._succession.advance(self._x509)
            if self._settings.jwt_enabled:
                try:
                    await self._succession.advance(self._jwt)
                except SpireHwError as e:
                    self._log.error("could not prepare the JWT authority", error=e.message)
        self._next_prune = self._clock.now()
        if self._upstream is not None:
            self._upstream.start()

    async def close(self) -> None:
        """Stop following the upstream authority."""
        if self._upstream is not None:
            await self._upstream.close()

    async def run(self) -> None:
        """Look every ten seconds what is due; ends only when cancelled."""
        while True:
            await self._clock.sleep(CHECK_INTERVAL_S)
            await self.tick()

    async def tick(self) -> None:
        """Do what is due now; failures are logged and tried again at the next tick."""
        try:
            await self.rotate()
            self._failures = 0
        except SpireHwError as e:
            self._failures += 1
            self._log.error("could not rotate the CA", error=e.message, failures=self._failures)
        try:
            await self._prune()
        except SpireHwError as e:
            self._log.error("could not prune the bundle", error=e.message)

    async def rotate(self) -> None:
        """Prepare and activate what is due.

        Raises:
            SpireHwError: the first failure, after both kinds were tried.
        """
        failure: SpireHwError | None = None
        async with self._lock:
            try:
                if self._is_root_tainted():
                    self._x509.check_makes()
                    await self._succession.prepare(self._x509)
                    await self._succession.activate(self._x509)
                await self._succession.advance(self._x509)
            except SpireHwError as e:
                failure = e
            if self._settings.jwt_enabled:
                try:
                    await self._succession.advance(self._jwt)
                except SpireHwError as e:
                    failure = failure or e
        if failure is not None:
            raise failure

    async def prepare_x509(self) -> X509Record:
        """Make the next X.509 authority now, replacing one that waits."""
        return await self._prepare_by_hand(self._x509)

    async def prepare_jwt(self) -> JwtRecord:
        """Make the next JWT key now, replacing one that waits."""
        return await self._prepare_by_hand(self._jwt)

    async def request_x509(self, *, replace: bool = False) -> CaRequest:
        """Make the key of the next X.509 authority, to be signed by hand; see `ca.byhand`."""
        async with self._lock:
            return await self._by_hand.request(replace=replace)

    async def import_x509(
        self, chain: tuple[bytes, ...], root: bytes, *, activate: bool = False
    ) -> X509Record:
        """Take a CA certificate that was signed by hand; see `ca.byhand`."""
        async with self._lock:
            return await self._by_hand.take(chain, root, activate=activate)

    async def activate_x509(self, authority_id: str) -> X509Record:
        """Let the prepared X.509 authority sign.

        Raises:
            InvalidInputError: another one is prepared.
            NotReadyError: none is prepared.
        """
        return await self._activate_by_hand(self._x509, authority_id)

    async def activate_jwt(self, authority_id: str) -> JwtRecord:
        """Let the prepared JWT key sign.

        Raises:
            InvalidInputError: another one is prepared.
            NotReadyError: none is prepared.
        """
        return await self._activate_by_hand(self._jwt, authority_id)

    async def taint_x509(self, authority_id: str) -> X509Record:
        """Mark the old X.509 authority as compromised.

        Raises:
            InvalidInputError: it is not the old one, or is tainted already.
        """
        async with self._lock:
            record = self._x509.old(authority_id)
            await self._bundles.change(lambda b: b.with_tainted_x509(authority_id))
        self._log.warning("X.509 authority tainted", authority_id=authority_id)
        return record

    async def taint_jwt(self, authority_id: str) -> JwtRecord:
        """Mark the old JWT key as compromised.

        Raises:
            InvalidInputError: it is not the old one, or is tainted already.
        """
        async with self._lock:
            record = self._jwt.old(authority_id)
            await self._bundles.change(lambda b: b.with_tainted_jwt(authority_id))
        self._log.warning("JWT authority tainted", authority_id=authority_id)
        return record

    async def revoke_x509(self, authority_id: str) -> X509Record:
        """Take the old, tainted X.509 authority out of the bundle.

        Raises:
            InvalidInputError: it is not the old one, or not tainted.
        """
        async with self._lock:
            record = self._x509.old(authority_id)
            await self._bundles.change(lambda b: b.without_x509(authority_id))
            await self._succession.forget_old(self._x509)
        self._log.warning("X.509 authority revoked", authority_id=authority_id)
        return record

    async def revoke_jwt(self, authority_id: str) -> JwtRecord:
        """Take the old, tainted JWT key out of the bundle.

        Raises:
            InvalidInputError: it is not the old one, or not tainted.
        """
        async with self._lock:
            record = self._jwt.old(authority_id)
            await self._bundles.change(lambda b: b.without_jwt(authority_id))
            await self._succession.forget_old(self._jwt)
        self._log.warning("JWT authority revoked", authority_id=authority_id)
        return record

    async def taint_upstream(self, authority_id: str) -> None:
        """Mark an upstream root as compromised that the active authority does not hang from.

        Raises:
            InvalidInputError: it is the root of the active authority, or tainted already.
            NotFoundError: there is no such root.
        """
        async with self._lock:
            self._check_not_in_use(authority_id)
            await self._bundles.change(lambda b: b.with_tainted_x509(authority_id))
        self._log.warning("upstream authority tainted", authority_id=authority_id)

    async def revoke_upstream(self, authority_id: str) -> None:
        """Take a tainted upstream root out of the bundle.

        Raises:
            InvalidInputError: it is the root of the active authority, or not tainted.
            NotFoundError: there is no such root.
        """
        async with self._lock:
            self._check_not_in_use(authority_id)
            await self._bundles.change(lambda b: b.without_x509(authority_id))
        self._log.warning("upstream authority revoked", authority_id=authority_id)

    def _check_not_in_use(self, authority_id: str) -> None:
        active = self._x509.slots.active
        if not authority_id:
            raise InvalidInputError("no subject key ID provided")
        if active is not None and active.upstream_authority_id == authority_id:
            raise InvalidInputError(
                "the current authority hangs from this upstream root; rotate to another one first"
            )

    async def _prepare_by_hand(self, line: Line[R]) -> R:
        async with self._lock:
            if line.slots.active is None:
                raise UnavailableError(f"no {line.name} authority is active yet")
            return await self._succession.prepare(line)

    async def _activate_by_hand(self, line: Line[R], authority_id: str) -> R:
        async with self._lock:
            return await self._succession.activate(line, authority_id)

    async def _restore(self) -> None:
        listed = {s.info.key_id: s for s in await self._keys.list()}
        restorer = Restorer(
            listed,
            keys_name=self._keys.name,
            bundles=self._bundles,
            keys_persist=self._settings.keys_persist,
            accept_lost=self._settings.accept_lost_authorities,
            log=self._log,
        )
        row = await restorer.find_journal(self._store, self._mark)
        if row is not None:
            self._keeper.take_over(row)
        restorer.fill(self._x509, self._keeper.journal.x509, self._clock.now())
        await self._by_hand.restore(listed)
        if self._settings.jwt_enabled:
            restorer.fill(self._jwt, self._keeper.journal.jwt, self._clock.now())

    def _own_ids(self) -> set[str]:
        return {record.upstream_authority_id for record in self._x509.slots.records()}

    def _is_root_tainted(self) -> bool:
        active = self._x509.slots.active
        return active is not None and self.is_tainted(active.authority_id)

    def is_tainted(self, authority_id: str) -> bool:
        """Tell whether an authority of ours, or the upstream root it hangs from, is tainted."""
        ids = {authority_id}
        for record in self._x509.slots.records():
            if record.authority_id == authority_id and record.upstream_authority_id:
                ids.add(record.upstream_authority_id)
        return any(r.tainted and r.authority_id in ids for r in self._bundles.own.x509_authorities)

    async def _prune(self) -> None:
        now = self._clock.now()
        if self._next_prune is None or now < self._next_prune:
            return
        self._next_prune = now + _PRUNE_INTERVAL
        await self._keeper.prune(now - _PRUNE_JOURNAL_AFTER)
        with Timed(self._metrics, _PRUNE):
            pruned = await self._bundles.prune(now - _PRUNE_AFTER)
        if pruned:
            self._metrics.count(_PRUNED)
            self._log.info("expired authorities were taken out of the bundle")
