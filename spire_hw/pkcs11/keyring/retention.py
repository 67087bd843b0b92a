"""Replaced generations that are kept for a while: unused, restorable, destroyed when their time is up.

What is kept stands in the host's note, written in one step with the key that took its place. So a
crash at any moment leaves each generation current, kept, or unknown to the note; what a listing shows
and the note does not know is kept from the next start on.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from spire_hw.errors import ErrorKind, InvalidInputError, NotFoundError, SpireHwError
from spire_hw.key import key_type_of, parse_spki, spki_der
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.inventory.choice import Choice
from spire_hw.pkcs11.inventory.labels import key_name
from spire_hw.pkcs11.keyring.state import NotedKey, Retained
from spire_hw.pkcs11.keys import public_key_of
from spire_hw.pkcs11.wire import Kind, pack_bytes
from spire_hw.plugin.keymanager import KeyInfo, RetainedKey

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw.clock import Clock
    from spire_hw.key import KeyType, PublicKey
    from spire_hw.log import Logger
    from spire_hw.pkcs11.inventory.entry import Entry
    from spire_hw.pkcs11.inventory.inventory import Inventory, Pair
    from spire_hw.pkcs11.keyring.claim import Claim
    from spire_hw.pkcs11.keyring.disposal import Disposal
    from spire_hw.pkcs11.keyring.ledger import Ledger
    from spire_hw.pkcs11.keyring.proving import Proving
    from spire_hw.pkcs11.keyring.state import State
    from spire_hw.pkcs11.keyring.stock import Stock
    from spire_hw.pkcs11.keys import PublicMaterial
    from spire_hw.pkcs11.pool.pool import Pool


class Retention:
    """Keeps replaced generations.

    Attributes:
        turn: held while it is decided which generation of a key is current.
    """

    def __init__(
        self,
        pool: Pool,
        ledger: Ledger,
        stock: Stock,
        *,
        claim: Claim,
        proving: Proving,
        disposal: Disposal,
        keep_s: float,
        clock: Clock,
        log: Logger,
    ) -> None:
        self.turn = asyncio.Lock()
        self._pool = pool
        self._ledger = ledger
        self._stock = stock
        self._claim = claim
        self._proving = proving
        self._disposal = disposal
        self._keep_s = keep_s
        self._clock = clock
        self._log = log

    @property
    def _now(self) -> float:
        return self._clock.now().timestamp()

    async def replace(self, entry: Entry) -> None:
        """Make a proved generation current; keep the one before, or have it destroyed.

        Raises:
            TokenError: the note cannot be written; nothing changed.
        """
        async with self.turn:
            await self._make_current(entry, None)

    async def _make_current(self, entry: Entry, choice: Choice | None) -> None:
        old, now = self._ledger.entries.get(entry.key_id), self._now
        if old is not None and old.cka_id == entry.cka_id:
            # In use already, by way of a listing: what takes nobody's place leaves nothing over.
            old = None
        is_kept = old is not None and self._keep_s > 0

        def change(state: State) -> State:
            state = state.with_entry(entry)
            if choice is not None:
                state = replace(state, choices={**state.choices, entry.key_id: choice})
            return state.retaining(old, now) if old is not None and is_kept else state

        await self._ledger.save(change)
        self._ledger.replace(entry)
        if old is not None and not is_kept:
            self._disposal.add([(old.cka_id, old.label)])

    async def sort_out(self, inventory: Inventory) -> list[Pair]:
        """Note which of the generations that are not current are kept; return the others.

        Raises:
            TokenError: the note cannot be written.
        """
        ids = self._ledger.ids(inventory)
        shown = {p.cka_id.hex() for p in (*inventory.retired, *inventory.halves)}
        noted = self._ledger.state.retained
        kept = {i: k for i, k in noted.items() if i in shown} if self._keep_s > 0 else {}
        others = []
        for pair in inventory.retired:
            if pair.cka_id.hex() in kept:
                continue
            key_id = ids.get(pair.name)
            found = self._found(pair, key_id) if self._keep_s > 0 else None
            self._tell_leftover(key_id, pair, inventory, is_kept=found is not None)
            if found is None:
                others.append(pair)
            else:
                kept[pair.cka_id.hex()] = found
        if kept != noted:
            await self._ledger.save(lambda state: replace(state, retained=kept))
        return others

    def _tell_leftover(
        self, key_id: str | None, pair: Pair, inventory: Inventory, *, is_kept: bool
    ) -> None:
        """Tell of a second generation that a crash, or another host, left beside the current one."""
        current = inventory.current.get(pair.name)
        fields = {} if current is None else {"used": current.label, "used_fp": current.fingerprint}
        self._log.warning(
            "hsm.key_leftover",
            key_id=pair.name if key_id is None else key_id,
            label=pair.label,
            fp=pair.fingerprint,
            **fields,
            kept=is_kept,
        )

    def _found(self, pair: Pair, key_id: str | None) -> Retained | None:
        if key_id is None or pair.material is None:
            return None
        try:
            public_key = public_key_of(pair.material)
            key_type_of(public_key)
        except InvalidInputError:
            return None
        known = NotedKey(pair.generation, pair.cka_id, spki_der(public_key))
        return Retained(key_id, known, self._now)

    def is_kept(self, pair: Pair) -> bool:
        """Tell whether a pair is to stay, be it whole or not."""
        return pair.cka_id.hex() in self._ledger.state.retained

    def next_s(self) -> float | None:
        """Return in how many seconds the next one's time is up, None when nothing is kept."""
        since = [kept.since for kept in self._ledger.state.retained.values()]
        return max(0.0, min(since) + self._keep_s - self._now) if since else None

    async def expire(self, inventory: Inventory) -> None:
        """Destroy what was kept for long enough.

        Raises:
            TokenError: the note cannot be written.
        """
        async with self.turn:
            retained = self._ledger.state.retained
            over = {i for i, kept in retained.items() if kept.since + self._keep_s <= self._now}
            pairs = [p for p in inventory.everything if p.cka_id.hex() in over]
            shown = {p.cka_id.hex() for p in inventory.everything}
            await self._forget({i for i in retained if i in over or i not in shown})
            # Forgotten first: nobody can take back what is being destroyed.
            self._disposal.add((p.cka_id, p.label) for p in pairs)

    async def _forget(self, cka_ids: Iterable[str]) -> None:
        gone = set(cka_ids)
        if gone:
            await self._ledger.save(
                lambda state: replace(
                    state, retained={i: k for i, k in state.retained.items() if i not in gone}
                )
            )

    def list(self) -> list[RetainedKey]:
        """Return what is kept, oldest first."""
        kept = sorted(self._ledger.state.retained.values(), key=lambda k: k.since)
        return [RetainedKey(_info_of(k), k.known.generation, k.since + self._keep_s) for k in kept]

    async def restore(self, key_id: str, generation: int, above: int) -> Entry:
        """Make a kept generation current; see `spire_hw.pkcs11.keyring.keyring.Keyring.restore`."""
        await self._claim.settle()
        async with self.turn:
            kept = self._kept(key_id, generation)
            inventory = await self._stock.take()
            await self._claim.check(inventory)
            if key_id in inventory.existing:
                raise self._shadowed(key_id)
            pair = inventory.pair(kept.known.cka_id)
            if pair is None:
                raise self._vanished(kept)
            entry = await self._proving.adopt(key_id, pair)
            if spki_der(entry.public_key) != kept.known.spki:
                raise self._vanished(kept)
            before, old = inventory.choices.get(key_id), self._ledger.entries.get(key_id)
            choice = Choice(
                generation,
                max(
                    inventory.top.get(key_name(key_id), 0),
                    old.generation if old is not None else 0,
                    before.over if before is not None else 0,
                    above,
                ),
                1 + (before.revision if before is not None else 0),
            )
            await self._make_current(entry, choice)
            self._log.info(
                "hsm.key_restored", key_id=key_id, label=pair.label, fp=entry.fingerprint
            )
            try:
                await self._claim.mark()
            except SpireHwError as e:
                # The note decides; the copy on the token is written again with the next mark.
                self._log.warning("hsm.manifest_late", error=e.message)
        return entry

    async def adopt_copy(self, key_id: str, fingerprint: str) -> bool:
        """Make a copy of another token's key current; see `spire_hw.pkcs11.keyring.keyring.Keyring`."""
        await self._claim.settle()
        async with self.turn:
            inventory = await self._stock.take()
            pair = inventory.current.get(key_name(key_id))
            current = self._ledger.entries.get(key_id)
            if pair is None or pair.material is None:
                return False
            if current is not None and current.cka_id == pair.cka_id:
                return current.fingerprint == fingerprint
            if KeyInfo.of(key_id, *_key_of(pair.material)).fingerprint != fingerprint:
                return False
            await self._claim.check(inventory)
            await self._make_current(await self._proving.adopt(key_id, pair), None)
            await self._claim.add(inventory, key_id)
        self._log.info("hsm.key_copied", key_id=key_id, label=pair.label, fp=fingerprint)
        return True

    async def drop(self, key_id: str, fingerprint: str) -> None:
        """Give a key up; see `spire_hw.pkcs11.keyring.keyring.Keyring.drop`."""
        await self._claim.settle()
        async with self.turn:
            old = self._ledger.entries.get(key_id)
            if old is None or old.is_existing or old.fingerprint != fingerprint:
                return
            inventory = await self._stock.take()
            await self._claim.check(inventory)
            # The manifest first: what it names and the token does not show would be a loss.
            await self._claim.remove(key_id)
            is_kept, now = self._keep_s > 0, self._now

            def change(state: State) -> State:
                state = state.without(key_id)
                return state.retaining(old, now) if is_kept else state

            await self._ledger.save(change)
            del self._ledger.entries[key_id]
            if not is_kept:
                self._disposal.add([(old.cka_id, old.label)])
        self._log.info("hsm.key_given_up", key_id=key_id, label=old.label, fp=old.fingerprint)

    async def destroy(self, key_id: str, generation: int) -> None:
        """Destroy a kept generation now; see `spire_hw.plugin.keymanager.KeyRetention`."""
        await self._claim.settle()
        async with self.turn:
            kept = self._kept(key_id, generation)
            await self._claim.check(await self._stock.take())
            label = self._ledger.owner.key_label(key_id, generation)
            place = {"id": pack_bytes(kept.known.cka_id), "label": label}
            try:
                await self._pool.ask(Kind.DESTROY, place, what="destroy key pair")
            except TokenError as e:
                raise e.about_key(key_id, self._pool.facts.device) from e
            await self._forget({kept.known.cka_id.hex()})
            self._log.info("hsm.key_destroyed", label=label)

    def _kept(self, key_id: str, generation: int) -> Retained:
        for kept in self._ledger.state.retained.values():
            if kept.key_id == key_id and kept.known.generation == generation:
                return kept
        raise NotFoundError(f'generation {generation} of key "{key_id}" is not retained')

    def _shadowed(self, key_id: str) -> TokenError:
        return TokenError(
            f'an existing key is used as "{key_id}"; take its import out of the configuration first',
            reason="hsm.key_imported",
            operation="restore key",
            device=self._pool.facts.device,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    def _vanished(self, kept: Retained) -> TokenError:
        return TokenError(
            f'generation {kept.known.generation} of key "{kept.key_id}" is no longer on token '
            f"{self._pool.facts.device}: nothing was changed",
            reason="hsm.key_vanished",
            operation="restore key",
            device=self._pool.facts.device,
        )


def _key_of(material: PublicMaterial) -> tuple[KeyType, PublicKey]:
    public_key = public_key_of(material)
    return key_type_of(public_key), public_key


def _info_of(kept: Retained) -> KeyInfo:
    public_key = parse_spki(kept.known.spki)
    return KeyInfo.of(kept.key_id, key_type_of(public_key), public_key)
