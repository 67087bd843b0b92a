"""Keeps an X.509 and a JWT authority alive: restores, prepares, publishes, activates, prunes.

Each step is durable before the next one: the key in the KeyManager, the authority in the bundle,
the record in the journal, and only then its use. Killed between any two steps, the next start
goes on from the journal. Which step is due is decided by `ca.slots`; what certificates look like
by `ca.profile`; signing is `ca.authority`'s.
"""

from __future__ import annotations

import asyncio
import secrets
import string
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.errors import (
    EncodingError,
    InvalidInputError,
    NotReadyError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.key import KeyType, spki_der
from spire_hw.x509.certificate import key_identifier, load_certificate, public_key_of
from spire_hw_server.ca.journal import (
    Journal,
    JwtRecord,
    X509Record,
    encode_journal,
    parse_journal,
)
from spire_hw_server.ca.slots import Record, SlotName, Slots, Status, Step
from spire_hw_server.ca.upstream import Upstream
from spire_hw_server.datastore.interface import Datastore, JournalRow

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import Keys, ManagedSigner
    from spire_hw.plugin.upstreamauthority import UpstreamAuthority
    from spire_hw.spiffeid import TrustDomain
    from spire_hw_server.bundles import Bundles
    from spire_hw_server.ca.authority import Issuer
    from spire_hw_server.ca.mark import AuthorityMark
    from spire_hw_server.ca.upstream import Roots

X509_KEY_PREFIX: Final = "x509-CA-"
JWT_KEY_PREFIX: Final = "JWT-Signer-"

CHECK_INTERVAL_S: Final = 10.0
_PRUNE_INTERVAL: Final = timedelta(hours=6)
_PRUNE_AFTER: Final = timedelta(hours=24)
_PRUNE_JOURNAL_AFTER: Final = timedelta(weeks=2)
_FAILURES_TOLERATED: Final = 10
_KID_LENGTH: Final = 32
_KID_LETTERS: Final = string.ascii_letters + string.digits


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


@dataclass
class _Line(Generic[R]):
    """One kind of authority: its slots, the signers of its keys and what is peculiar to it."""

    name: str
    key_prefix: str
    key_type: KeyType
    make: Callable[[ManagedSigner, SlotName], Awaitable[R]]
    publication: Callable[[R], Bundle]
    public_key: Callable[[R], bytes]
    is_published: Callable[[R, Bundle], bool]
    adopt: Callable[[R, ManagedSigner], None]
    slots: Slots[R] = field(default_factory=Slots)
    signers: dict[str, ManagedSigner] = field(default_factory=dict)

    def key_id(self, slot: SlotName) -> str:
        return self.key_prefix + slot.value

    def holds(self, record: R, listed: Mapping[str, ManagedSigner]) -> bool:
        """Tell whether the KeyManager lists the very key of a record."""
        signer = listed.get(self.key_id(record.slot))
        return signer is not None and spki_der(signer.public_key) == self.public_key(record)


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
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._store = store
        self._bundles = bundles
        self._issuer = issuer
        self._mark = mark
        self._clock = clock
        self._log = log
        self._lock = asyncio.Lock()
        self._row = JournalRow(0, "", b"")
        self._journal = Journal()
        self._unsaved = False
        self._failures = 0
        self._next_prune: datetime | None = None
        self._upstream = None if upstream is None else self._opened(upstream)
        self._minted_roots: dict[str, Roots] = {}
        self._x509 = _Line[X509Record](
            name="X.509",
            key_prefix=X509_KEY_PREFIX,
            key_type=settings.ca_key_type,
            make=self._make_x509,
            publication=lambda r: Bundle(
                settings.trust_domain,
                x509_authorities=self._minted_roots.pop(r.authority_id, (X509Root(r.certificate),)),
            ),
            public_key=lambda r: spki_der(public_key_of(load_certificate(r.certificate))),
            is_published=_is_x509_published,
            adopt=lambda r, s: issuer.use_x509(r.certificate, r.upstream_chain, s),
        )
        self._jwt = _Line[JwtRecord](
            name="JWT",
            key_prefix=JWT_KEY_PREFIX,
            key_type=settings.jwt_key_type,
            make=self._make_jwt,
            publication=lambda r: Bundle(
                settings.trust_domain,
                jwt_authorities=(JwtAuthority(r.authority_id, r.public_key, r.not_after),),
            ),
            public_key=lambda r: r.public_key,
            is_published=lambda r, b: b.jwt_key(r.authority_id) is not None,
            adopt=lambda r, s: issuer.use_jwt(r.authority_id, r.not_after, s),
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
        """Tell whether an UpstreamAuthority signs our CA."""
        return self._upstream is not None

    @property
    def x509_slots(self) -> Slots[X509Record]:
        """Return the X.509 authorities."""
        return self._x509.slots

    @property
    def jwt_slots(self) -> Slots[JwtRecord]:
        """Return the JWT authorities."""
        return self._jwt.slots

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
            await self._advance(self._x509)
            if self._settings.jwt_enabled:
                try:
                    await self._advance(self._jwt)
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
                    await self._prepare(self._x509)
                    await self._activate(self._x509)
                await self._advance(self._x509)
            except SpireHwError as e:
                failure = e
            if self._settings.jwt_enabled:
                try:
                    await self._advance(self._jwt)
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
            record = _old(self._x509, authority_id)
            await self._bundles.change(lambda b: b.with_tainted_x509(authority_id))
        self._log.warning("X.509 authority tainted", authority_id=authority_id)
        return record

    async def taint_jwt(self, authority_id: str) -> JwtRecord:
        """Mark the old JWT key as compromised.

        Raises:
            InvalidInputError: it is not the old one, or is tainted already.
        """
        async with self._lock:
            record = _old(self._jwt, authority_id)
            await self._bundles.change(lambda b: b.with_tainted_jwt(authority_id))
        self._log.warning("JWT authority tainted", authority_id=authority_id)
        return record

    async def revoke_x509(self, authority_id: str) -> X509Record:
        """Take the old, tainted X.509 authority out of the bundle.

        Raises:
            InvalidInputError: it is not the old one, or not tainted.
        """
        async with self._lock:
            record = _old(self._x509, authority_id)
            await self._bundles.change(lambda b: b.without_x509(authority_id))
            await self._forget_old(self._x509)
        self._log.warning("X.509 authority revoked", authority_id=authority_id)
        return record

    async def revoke_jwt(self, authority_id: str) -> JwtRecord:
        """Take the old, tainted JWT key out of the bundle.

        Raises:
            InvalidInputError: it is not the old one, or not tainted.
        """
        async with self._lock:
            record = _old(self._jwt, authority_id)
            await self._bundles.change(lambda b: b.without_jwt(authority_id))
            await self._forget_old(self._jwt)
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

    async def _forget_old(self, line: _Line[R]) -> None:
        line.slots = Slots(line.slots.active)
        self._unsaved = True
        await self._save()

    async def _prepare_by_hand(self, line: _Line[R]) -> R:
        async with self._lock:
            if line.slots.active is None:
                raise UnavailableError(f"no {line.name} authority is active yet")
            return await self._prepare(line)

    async def _activate_by_hand(self, line: _Line[R], authority_id: str) -> R:
        async with self._lock:
            return await self._activate(line, authority_id)

    async def _advance(self, line: _Line[R]) -> None:
        step = line.slots.due(self._clock.now())
        if step in {Step.PREPARE, Step.PREPARE_AND_ACTIVATE}:
            await self._prepare(line)
        elif self._unsaved:
            await self._save()
        if step in {Step.ACTIVATE, Step.PREPARE_AND_ACTIVATE}:
            await self._activate(line)

    async def _prepare(self, line: _Line[R]) -> R:
        slot = line.slots.free_slot
        signer = await self._keys.generate(line.key_id(slot), line.key_type)
        record = await line.make(signer, slot)
        await self._bundles.append(line.publication(record))
        line.slots = line.slots.prepare(record)
        line.signers[record.authority_id] = signer
        self._unsaved = True
        self._log.info(
            "authority prepared",
            kind=line.name,
            slot=slot.value,
            authority_id=record.authority_id,
            expiration=record.not_after.isoformat(),
        )
        if self._x509.slots.active is not None:
            await self._save()
        return record

    async def _activate(self, line: _Line[R], authority_id: str | None = None) -> R:
        before = line.slots
        line.slots = before.activate(authority_id)
        record = line.slots.active
        if record is None:
            raise SpireHwError("activation left no active authority")
        try:
            await self._save()
        except BaseException:
            line.slots = before
            raise
        line.adopt(record, line.signers[record.authority_id])
        line.signers = {r.authority_id: line.signers[r.authority_id] for r in line.slots.records()}
        self._log.info(
            "authority activated",
            kind=line.name,
            slot=record.slot.value,
            authority_id=record.authority_id,
            expiration=record.not_after.isoformat(),
        )
        return record

    async def _save(self) -> None:
        active = self._x509.slots.active
        if active is None:
            return
        journal = self._journal.updated(
            self._x509.slots, self._jwt.slots if self._settings.jwt_enabled else None
        )
        if active.authority_id != self._row.active_x509_authority_id:
            ids = (active.authority_id, self._row.active_x509_authority_id)
            await asyncio.to_thread(self._mark.store, tuple(i for i in ids if i))
        row = JournalRow(self._row.row_id, active.authority_id, encode_journal(journal))
        self._row = await self._store.save_journal(row)
        self._journal = journal
        self._unsaved = False

    async def _restore(self) -> None:
        listed = {s.info.key_id: s for s in await self._keys.list()}
        await self._load_journal(listed)
        bundle = self._bundles.own
        self._restore_line(self._x509, self._journal.x509, listed, bundle)
        if self._settings.jwt_enabled:
            self._restore_line(self._jwt, self._journal.jwt, listed, bundle)

    async def _load_journal(self, listed: Mapping[str, ManagedSigner]) -> None:
        marked = await asyncio.to_thread(self._mark.load)
        row = await self._store.find_journal(marked) if marked else None
        ids = tuple(
            key_identifier(spki_der(signer.public_key)).hex()
            for key_id, signer in listed.items()
            if key_id.startswith(X509_KEY_PREFIX)
        )
        if row is None and ids:
            row = await self._store.find_journal(ids)
        if row is not None:
            self._row = row
            self._journal = parse_journal(row.data)
        elif self._settings.keys_persist:
            await self._begin(marked, ids)

    async def _begin(self, marked: tuple[str, ...], listed: tuple[str, ...]) -> None:
        """Note that a first CA is being made, unless that would replace one the store ignores.

        A first start that was cut short is recognised by the note, or by its authority being in
        the store's bundle already, and goes on.

        Raises:
            NotReadyError: keys of a CA are there that this store knows nothing of.
        """
        begun = await asyncio.to_thread(self._mark.exists)
        unknown = marked or (() if begun else listed)
        published = {root.authority_id for root in self._bundles.own.x509_authorities}
        accepted = self._settings.accept_lost_authorities
        if unknown and published.isdisjoint(unknown) and accepted.isdisjoint(unknown):
            raise NotReadyError(
                f"this server has a CA already (authority {unknown[0]}), but the datastore knows "
                "nothing of it. Is it another database, or an empty one; or are the keys in "
                f"KeyManager({self._keys.name}) another server's? No new CA is started, it would "
                "replace those keys. Restore the database, correct its connection_string, or give "
                "this server a key identifier of its own. If the old CA is given up, set "
                f'experimental.accept_lost_authorities = ["{unknown[0]}"] in the server section '
                "and start again"
            )
        if unknown:
            self._log.warning(
                "the datastore holds no CA journal for this server's authority; a new CA is started",
                authority_id=unknown[0],
            )
        if not begun:
            await asyncio.to_thread(self._mark.store, ())

    def _restore_line(
        self,
        line: _Line[R],
        records: tuple[R, ...],
        listed: Mapping[str, ManagedSigner],
        bundle: Bundle,
    ) -> None:
        now = self._clock.now()
        active = Slots.restore(records).active
        if active is not None and now < active.not_after and not line.holds(active, listed):
            self._refuse_lost(line, active, listed)
        usable = []
        for record in records:
            fault = self._fault(line, record, listed, bundle, now) or self._misfit(record)
            if fault is None:
                usable.append(record)
            elif record.status is not Status.OLD:
                self._log.warning(
                    "authority of the journal is not used again",
                    kind=line.name,
                    authority_id=record.authority_id,
                    status=record.status.name,
                    reason=fault,
                )
        line.slots = Slots.restore(usable)
        for record in line.slots.records():
            line.signers[record.authority_id] = listed[line.key_id(record.slot)]
        if line.slots.active is not None:
            line.adopt(line.slots.active, line.signers[line.slots.active.authority_id])

    def _fault(
        self,
        line: _Line[R],
        record: R,
        listed: Mapping[str, ManagedSigner],
        bundle: Bundle,
        now: datetime,
    ) -> str | None:
        if now >= record.not_after:
            return "expired"
        if not line.holds(record, listed):
            return "its key is not in the KeyManager"
        if not line.is_published(record, bundle):
            return "it is no longer in the trust bundle"
        return None

    def _misfit(self, record: Record) -> str | None:
        """Return why an authority is not what the configuration asks for now."""
        if not isinstance(record, X509Record) or bool(record.upstream_chain) == self.has_upstream:
            return None
        if self.has_upstream:
            return "it is self-signed, and an UpstreamAuthority is configured now"
        return "an UpstreamAuthority signed it, and none is configured now"

    def _refuse_lost(self, line: _Line[R], record: R, listed: Mapping[str, ManagedSigner]) -> None:
        """Raise unless a new authority in place of a lost one is what the operator wants."""
        if not self._settings.keys_persist:
            self._log.info("the KeyManager keeps no keys over a restart; a new CA is started")
            return
        if record.authority_id in self._settings.accept_lost_authorities:
            self._log.warning(
                "a lost authority is replaced, as configured",
                kind=line.name,
                authority_id=record.authority_id,
            )
            return
        names = ", ".join(sorted(listed)) or "no key at all"
        raise NotReadyError(
            f"the CA journal says that {line.name} authority {record.authority_id} signs with key "
            f'"{line.key_id(record.slot)}" until {record.not_after.isoformat()}, but '
            f"KeyManager({self._keys.name}) does not have that key (it lists {names}). Is the "
            "token away, or another one? No new CA is started. If the key is lost for good, set "
            f'experimental.accept_lost_authorities = ["{record.authority_id}"] in the server '
            "section and start again"
        )

    async def _make_x509(self, signer: ManagedSigner, slot: SlotName) -> X509Record:
        now = self._clock.now().replace(microsecond=0)
        if self._upstream is not None:
            return await self._mint_x509(self._upstream, signer, slot, now)
        made = await self._issuer.self_signed(signer, now, self._settings.ca_ttl)
        return X509Record(
            slot=slot,
            authority_id=made.authority_id,
            issued_at=now,
            not_after=made.not_after,
            status=Status.PREPARED,
            certificate=made.certificate,
        )

    async def _mint_x509(
        self, upstream: Upstream, signer: ManagedSigner, slot: SlotName, now: datetime
    ) -> X509Record:
        minted = await upstream.mint(signer, self._settings.ca_ttl)
        self._minted_roots[minted.authority_id] = minted.roots
        return X509Record(
            slot=slot,
            authority_id=minted.authority_id,
            issued_at=now,
            not_after=minted.not_after,
            status=Status.PREPARED,
            certificate=minted.certificate,
            upstream_chain=minted.chain,
            upstream_authority_id=minted.root_id,
        )

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

    async def _make_jwt(self, signer: ManagedSigner, slot: SlotName) -> JwtRecord:
        now = self._clock.now().replace(microsecond=0)
        record = JwtRecord(
            slot=slot,
            authority_id="".join(secrets.choice(_KID_LETTERS) for _ in range(_KID_LENGTH)),
            issued_at=now,
            not_after=now + self._settings.ca_ttl,
            status=Status.PREPARED,
            public_key=spki_der(signer.public_key),
        )
        if self._upstream is not None:
            key = JwtAuthority(record.authority_id, record.public_key, record.not_after)
            await self._upstream.publish_jwt_key(key)
        return record

    async def _prune(self) -> None:
        now = self._clock.now()
        if self._next_prune is None or now < self._next_prune:
            return
        self._next_prune = now + _PRUNE_INTERVAL
        await self._prune_journals(now - _PRUNE_JOURNAL_AFTER)
        if await self._bundles.prune(now - _PRUNE_AFTER):
            self._log.info("expired authorities were taken out of the bundle")

    async def _prune_journals(self, before: datetime) -> None:
        """Drop journals of servers that are gone: all of their authorities ended long ago."""
        for row in await self._store.list_journals():
            if row.row_id == self._row.row_id:
                continue
            try:
                end = parse_journal(row.data).latest_end()
            except EncodingError as e:
                self._log.warning("a CA journal cannot be read", row_id=row.row_id, error=e.message)
                continue
            if end is None or end < before:
                await self._store.delete_journal(row.row_id)


def _is_x509_published(record: X509Record, bundle: Bundle) -> bool:
    if record.upstream_authority_id:
        return any(
            root.authority_id == record.upstream_authority_id and not root.tainted
            for root in bundle.x509_authorities
        )
    return any(root.der == record.certificate for root in bundle.x509_authorities)


def _old(line: _Line[R], authority_id: str) -> R:
    if not authority_id:
        raise InvalidInputError("no authority ID provided")
    active = line.slots.active
    if active is not None and active.authority_id == authority_id:
        raise InvalidInputError("the current authority cannot be tainted or revoked")
    old = line.slots.old
    if old is None or old.authority_id != authority_id:
        raise InvalidInputError(f"authority {authority_id} is not the old one")
    return old
