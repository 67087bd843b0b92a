"""The keys of one host on one token: found, proved, replaced, signed with.

A replacement is a new generation beside the old one. It becomes current only once its attributes
were read back, a signature of it was verified and the host's note is on disk; then the old
generation is destroyed, or kept for a while. A crash anywhere leaves one complete, signing pair.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import InvalidInputError, LimitError, NotFoundError, SpireHwError
from spire_hw.key import parse_spki
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.evidence import check_evidence, evidence_texts
from spire_hw.pkcs11.inventory.entry import Entry
from spire_hw.pkcs11.inventory.labels import Owner, key_name
from spire_hw.pkcs11.keyring.budget import Budget
from spire_hw.pkcs11.keyring.claim import Claim
from spire_hw.pkcs11.keyring.disposal import Disposal
from spire_hw.pkcs11.keyring.fitness import check_mechanisms, check_token, check_type, warn_of_pin
from spire_hw.pkcs11.keyring.generation import TASK, Generation, Made, Making
from spire_hw.pkcs11.keyring.health import health_of
from spire_hw.pkcs11.keyring.housekeeping import Housekeeping
from spire_hw.pkcs11.keyring.ledger import Ledger
from spire_hw.pkcs11.keyring.proving import OTHER_TYPE, Proving
from spire_hw.pkcs11.keyring.refusals import Refusals
from spire_hw.pkcs11.keyring.retention import Retention
from spire_hw.pkcs11.keyring.signing import Signing
from spire_hw.pkcs11.keyring.state import Existing
from spire_hw.pkcs11.keyring.stock import Stock
from spire_hw.pkcs11.keyring.testkey import TestKey
from spire_hw.pkcs11.remedies import GENERATE
from spire_hw.plugin.custody import Custody
from spire_hw.plugin.keymanager import KeyEvidence, KeyInfo

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from spire_hw.clock import Clock
    from spire_hw.key import KeyType, SignOptions
    from spire_hw.log import Logger
    from spire_hw.pkcs11.inventory.inventory import Inventory, Pair
    from spire_hw.pkcs11.keyring.importing import Import
    from spire_hw.pkcs11.keyring.policy import Policy
    from spire_hw.pkcs11.keyring.state import State, StateFile
    from spire_hw.pkcs11.pool.pool import Pool
    from spire_hw.plugin.keymanager import DeviceHealth, KeySignature, RetainedKey

_MAX_ID: Final = 255
_REST_S: Final = 60.0


class Keyring:
    """The KeyManager contract over a pool of workers.

    Args:
        pool: the workers.
        owner: whose keys.
        file: the host's note.
        policy: what the operator allows.
        instance: tells this instance from others that use the same server id.
        place: where it runs, such that no two can run there; "" when that is not known.
        key_ids: what keys are called that may be on the token though its manifest does not say so.
    """

    def __init__(
        self,
        pool: Pool,
        owner: Owner,
        file: StateFile,
        *,
        policy: Policy,
        instance: str,
        place: str = "",
        clock: Clock,
        log: Logger,
        key_ids: Iterable[str] = (),
    ) -> None:
        self._pool = pool
        self._owner = owner
        self._policy = policy
        self._clock = clock
        self._log = log
        self._ledger = Ledger(owner, file, key_ids)
        self._stock = Stock(pool, self._ledger, policy, log)
        self._proving = Proving(pool, self._ledger, policy, log)
        self._claim = Claim(
            pool, self._ledger, policy, nonce=instance, place=place, clock=clock, log=log
        )
        self._refusals = Refusals(clock, log)
        self._signing = Signing(pool, self._stock, self.get, self._refusals, clock=clock, log=log)
        self.disposal = Disposal(pool, clock, log)
        self.test_key = TestKey(pool, owner, self.disposal, clock=clock, log=log)
        self._budget = Budget(file.path.with_suffix(".budget.json"), policy.allowance, clock)
        self._retention = Retention(
            pool,
            self._ledger,
            self._stock,
            claim=self._claim,
            proving=self._proving,
            disposal=self.disposal,
            keep_s=policy.retain_replaced_s,
            clock=clock,
            log=log,
        )
        self._house = Housekeeping(
            self._stock,
            self._ledger,
            self._claim,
            self._retention,
            self.disposal,
            clock=clock,
            log=log,
        )
        self._above: dict[str, int] = {}
        self._new: set[str] = set()
        self._tasks = Tasks(self._on_task_failure)
        self._generation = Generation(self._tasks, self._make, self._abandon)

    async def open(self) -> None:
        """Take stock of the token and prove every key that is to be used.

        Raises:
            TokenError: the token, or a key on it, is not what it has to be; nothing was changed.
        """
        facts = self._pool.facts
        warn_of_pin(facts, self._log)
        check_mechanisms(facts, self._policy, self._log)
        await self._ledger.load()
        check_token(facts, self._ledger.state, self._policy)
        inventory = await self._stock.take_full()
        orphans = self._stock.orphans(inventory)
        ids = self._ledger.ids(inventory)
        entries = {}
        for name, pair in inventory.current.items():
            if name in ids and ids[name] not in inventory.existing:
                entry = await self._adopt(ids[name], pair)
                if entry is not None:
                    entries[ids[name]] = entry
        for wanted in self._policy.imports:
            entries[wanted.key_id] = await self._import(wanted, inventory)
        self._ledger.use(entries)
        await self._claim.stake(inventory)
        await self._ledger.save(lambda state: self._opened(state, inventory))
        replaced = await self._retention.sort_out(inventory)
        self.disposal.add((p.cka_id, p.label) for p in (*replaced, *orphans))
        self._tasks.start("hsm-disposal", self._dispose())
        self._tasks.start("hsm-test-key", self.test_key.run())
        self._tasks.start("hsm-housekeeping", self._house.run())
        self._tasks.start("hsm-watch", self._house.watch())

    async def _dispose(self) -> None:
        """Destroy what waits for it, but nothing that another instance may still use."""
        while True:
            try:
                await self._claim.settle()
                break
            except SpireHwError as e:
                if e is self._claim.conflict:
                    return
                await self._clock.sleep(_REST_S)
        await self.disposal.run()

    async def close(self) -> None:
        """Stop what runs in the background; the pool is closed by its owner."""
        await self._tasks.close()

    @property
    def note(self) -> State:
        """Return what this host knows of the keys on the token."""
        return self._ledger.state

    async def generate(self, key_id: str, key_type: KeyType, above: int = 0) -> KeyInfo:
        """Make a key; see `spire_hw.plugin.keymanager.KeyManager.generate_key`.

        Args:
            key_id: its id.
            key_type: its type.
            above: a generation of it that is on another token, which the new one has to be beyond.
        """
        _check_id(key_id)
        if key_type not in self._policy.key_types:
            raise InvalidInputError(f"key type {key_type.config_name} is not allowed by policy")
        for wanted in self._policy.imports:
            if wanted.key_id == key_id:
                raise wanted.taken()
        check_type(key_type, self._pool.facts)
        self._above[key_id] = above
        return await self._generation.run(key_id, key_type, self._commit)

    def get(self, key_id: str) -> Entry:
        """Return the current key of an id.

        Raises:
            InvalidInputError: `key id is required`.
            NotFoundError: there is none.
        """
        entry = self._ledger.entries.get(key_id)
        if entry is None:
            _check_id(key_id)
            raise NotFoundError(f'key "{key_id}" not found')
        return entry

    async def all(self) -> list[Entry]:
        """Return every key after asking the token that they are still there.

        What another instance has made since it took the token over is taken up. A key that was to sign
        and was not found is left out, on a token that shows others.

        Raises:
            TokenError: the token is away, or shows fewer keys than there have to be.
        """
        async with self._retention.turn:
            entries = self._ledger.entries
            gone = {key_id for key_id, e in entries.items() if self._signing.is_gone(e)}
            inventory = await self._stock.take_full(gone)
            if self._claim.is_lost(inventory):
                await self._take_up(inventory)
        return [
            entry
            for key_id, entry in self._ledger.entries.items()
            if key_id not in gone or inventory.pair(entry.cka_id) is not None
        ]

    def sign(
        self, key_id: str, digest: bytes, options: SignOptions
    ) -> Coroutine[Any, Any, KeySignature]:
        """Sign a digest; see `spire_hw.plugin.keymanager.KeyManager.sign_data`."""
        return self._signing.sign(key_id, digest, options)

    async def evidence(self, key_id: str) -> KeyEvidence:
        """Return what the token says about a key now."""
        entry = self.get(key_id)
        pair = (await self._stock.take()).pair(entry.cka_id)
        if pair is None:
            raise self._signing.gone(entry)
        facts = self._pool.facts
        location = f'PKCS#11 token "{facts.label}" serial {facts.serial}, object {entry.label}'
        return KeyEvidence(
            location,
            {"CKA_ID": pair.cka_id.hex(), **evidence_texts(pair.evidence)},
            custody=Custody.HSM_REPORTED,
            device=facts.model,
            token=facts.device,
            generation=entry.generation,
        )

    def health(self) -> DeviceHealth:
        """Return how well the keys can be used, as last seen."""
        entries = list(self._ledger.entries.values())
        unusable = self._signing.unusable(entries)
        return health_of(self._pool, self._claim, len(entries), unusable)

    def retained(self) -> list[RetainedKey]:
        """Return the replaced generations that are kept, oldest first."""
        return self._retention.list()

    async def restore(self, key_id: str, generation: int, above: int = 0) -> KeyInfo:
        """Make a kept generation current; see `spire_hw.plugin.keymanager.KeyRetention`.

        Args:
            key_id: its id.
            generation: the one to take back.
            above: a generation on another token that it is taken back over.
        """
        return info_of(await self._retention.restore(key_id, generation, above))

    async def adopt_copy(self, key_id: str, fingerprint: str) -> bool:
        """Take a copy of another token's key into use; False when there is none here.

        Raises:
            TokenError: the token failed, or the copy is not fit to be used.
        """
        return await self._retention.adopt_copy(key_id, fingerprint)

    async def drop(self, key_id: str, fingerprint: str) -> None:
        """Give up a key that was replaced on another token; it is destroyed, or kept for a while.

        Args:
            key_id: its id.
            fingerprint: which instance is meant; another one that is current by now stays.

        Raises:
            TokenError: the token failed; the key is still there.
        """
        await self._retention.drop(key_id, fingerprint)

    async def destroy_retained(self, key_id: str, generation: int) -> None:
        """Destroy a kept generation; see `spire_hw.plugin.keymanager.KeyRetention`."""
        await self._retention.destroy(key_id, generation)

    def _opened(self, state: State, inventory: Inventory) -> State:
        facts = self._pool.facts
        choices = dict(inventory.choices)
        # A key that an import takes the place of is there again without the import.
        shadowed = {k: known for k, known in state.keys.items() if k in inventory.existing}
        existing = {}
        for wanted in self._policy.imports:
            entry = self._ledger.entries[wanted.key_id]
            existing[wanted.key_id] = Existing(wanted.selector, entry.sign_key.spki)
        state = replace(
            state,
            token_label=facts.label,
            token_serial=facts.serial,
            keys=shadowed,
            choices=choices,
            existing=existing,
        )
        for entry in self._ledger.entries.values():
            if not entry.is_existing:
                state = state.with_entry(entry)
        return state

    async def _adopt(self, key_id: str, pair: Pair) -> Entry | None:
        try:
            return await self._proving.adopt(key_id, pair)
        except TokenError as e:
            if e.reason != OTHER_TYPE or key_id in self._ledger.state.keys:
                raise
            # Nobody can have used it here: it is in nobody's way.
            self._log.warning("hsm.key_ignored", key_id=key_id, label=pair.label, error=e.message)
            return None

    async def _take_up(self, inventory: Inventory) -> None:
        """Use what the instance that makes keys has made; not on note, since it may give it up."""
        ids = self._ledger.ids(inventory)
        for name, pair in inventory.current.items():
            key_id = ids.get(name)
            known = None if key_id is None else self._ledger.entries.get(key_id)
            if key_id is None or key_id in inventory.existing:
                continue
            if known is not None and known.cka_id == pair.cka_id:
                continue
            entry = await self._adopt(key_id, pair)
            if entry is not None:
                self._ledger.replace(entry)
                self._log.info(
                    "hsm.key_taken_up", key_id=key_id, label=pair.label, fp=entry.fingerprint
                )

    async def _import(self, wanted: Import, inventory: Inventory) -> Entry:
        entry = await self._proving.adopt(wanted.key_id, inventory.existing[wanted.key_id])
        before = self._ledger.state.existing.get(wanted.key_id)
        if before is not None and before.selector == wanted.selector:
            known = KeyInfo.of(wanted.key_id, entry.key_type, parse_spki(before.spki))
            if known.fingerprint != entry.fingerprint:
                raise wanted.changed(known.fingerprint, entry.fingerprint)
        return entry

    async def _make(self, key_id: str, key_type: KeyType) -> Entry:
        """Generate and prove the next generation; it is not current yet."""
        try:
            self._check_number(key_id)
            self._new.add(key_id)
            return await self._make_next(key_id, key_type)
        except SpireHwError as e:
            self._refusals.tell(key_id, GENERATE, e)
            raise
        finally:
            self._new.discard(key_id)

    def _check_number(self, key_id: str) -> None:
        """Refuse one key id too many; those whose keys are just being made count as well."""
        most, in_use = self._policy.max_keys, {*self._ledger.entries, *self._new}
        if key_id not in self._ledger.entries and len(in_use) >= most:
            raise LimitError(
                f'key "{key_id}" would be one more than the {most} that are allowed on token '
                f"{self._pool.facts.device}; find out who makes keys, or raise max_keys"
            )

    async def _make_next(self, key_id: str, key_type: KeyType) -> Entry:
        await self._claim.settle()
        inventory = await self._stock.take()
        await self._claim.check(inventory)
        await self._claim.check_writable(inventory)
        self._ledger.check_name(key_id, inventory)
        generation = self._next_generation(key_id, inventory)
        label = self._owner.key_label(key_id, generation)
        await self._budget.take(key_id)
        making = Making(self._pool, key_type, partial(self._fresh_id, inventory), label)
        try:
            described = await self._generated(key_id, making)
            public_key = described.public_key
            profile = self._pool.facts.profile
            check_evidence(f'generated key "{key_id}"', described.evidence, key_type, profile)
            info = KeyInfo.of(key_id, key_type, public_key)
            entry = Entry.of(info, making.cka_id, label, generation)
            await self._proving.prove(entry)
            inventory = await self._stock.take()
            await self._claim.check(inventory)
            await self._claim.add(inventory, key_id)
        except BaseException as e:
            # Another instance that was started meanwhile may use the new key, as it uses the others.
            if e is not self._claim.conflict:
                self.disposal.add([(making.cka_id, label)])
            if isinstance(e, TokenError):
                await self._budget.give_back(key_id)
            raise
        return entry

    async def _generated(self, key_id: str, making: Making) -> Made:
        try:
            return await making.generate(self.disposal)
        except TokenError as e:
            raise e.about_key(key_id, self._pool.facts.device) from e

    def _next_generation(self, key_id: str, inventory: Inventory) -> int:
        current, choice = self._ledger.entries.get(key_id), inventory.choices.get(key_id)
        highest = max(
            inventory.top.get(key_name(key_id), 0),
            current.generation if current is not None else 0,
            choice.over if choice is not None else 0,
            self._above.get(key_id, 0),
        )
        return highest + 1

    def _fresh_id(self, inventory: Inventory) -> bytes:
        while True:
            # Two bytes is all that some tokens keep.
            cka_id = secrets.token_bytes(self._pool.facts.profile.id_bytes)
            if cka_id not in inventory.cka_ids:
                return cka_id

    async def _commit(self, entry: Entry) -> KeyInfo:
        """Make a proved generation current and retire the one before."""
        try:
            await self._retention.replace(entry)
        except TokenError:
            self._abandon(entry)
            raise
        self._log.info(
            "hsm.key_generated", key_id=entry.key_id, label=entry.label, fp=entry.fingerprint
        )
        return info_of(entry)

    def _abandon(self, entry: Entry) -> None:
        self.disposal.add([(entry.cka_id, entry.label)])

    def _on_task_failure(self, name: str, error: BaseException) -> None:
        if name.startswith(TASK) and isinstance(error, SpireHwError):
            return  # told with its key
        reason = error.reason if isinstance(error, TokenError) else "hsm.task_failed"
        message = error.message if isinstance(error, SpireHwError) else type(error).__name__
        self._log.error(reason, task=name, error=message)


def _check_id(key_id: str) -> None:
    if not key_id:
        raise InvalidInputError("key id is required")
    if len(key_id) > _MAX_ID or not key_id.isprintable():
        raise InvalidInputError(f"key id must be printable and at most {_MAX_ID} characters")


def info_of(entry: Entry) -> KeyInfo:
    """Return the contract's view of a key."""
    return KeyInfo(entry.key_id, entry.key_type, entry.public_key, entry.fingerprint)
