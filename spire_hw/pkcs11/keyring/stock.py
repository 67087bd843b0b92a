"""Taking stock: what the token shows of this owner's keys now."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spire_hw.pkcs11.inventory.inventory import Inventory, Pair, listed_halves, read_listing
from spire_hw.pkcs11.keyring.losses import find_moved, losses_of
from spire_hw.pkcs11.memory import Memory
from spire_hw.pkcs11.wire import Kind

if TYPE_CHECKING:
    from collections.abc import Collection

    from spire_hw.log import Logger
    from spire_hw.pkcs11.errors import TokenError
    from spire_hw.pkcs11.keyring.ledger import Ledger
    from spire_hw.pkcs11.keyring.policy import Policy
    from spire_hw.pkcs11.pool.pool import Pool


class Stock:
    """Asks a pool what is on its token."""

    def __init__(self, pool: Pool, ledger: Ledger, policy: Policy, log: Logger) -> None:
        self._pool = pool
        self._ledger = ledger
        self._policy = policy
        self._log = log
        self._is_short = False

    async def take(self) -> Inventory:
        """Return what the token shows, be it all there is or not.

        Raises:
            TokenError: the token is away, or what it shows contradicts itself.
        """
        owner, imports = self._ledger.owner, self._policy.imports
        listing = await self._list("" if imports else owner.prefix)
        self._tell(Memory.read(listing.get("memory")))
        known, choices = self._ledger.known_ids(), self._ledger.state.choices
        inventory = read_listing(owner, listing, known, choices)
        halves, facts = listed_halves(listing), self._pool.facts
        existing = {wanted.key_id: wanted.find(halves, facts) for wanted in imports}
        return replace(inventory, existing={k: p for k, p in existing.items() if p is not None})

    async def take_full(self, gone: Collection[str] = ()) -> Inventory:
        """Return an inventory that shows every key there has to be, asking a fresh worker too.

        Args:
            gone: key ids that are known to have vanished: no others are missing because of them.

        Raises:
            TokenError: as `take`, or keys are missing.
        """
        inventory = await self.take()
        error = self._losses(inventory, gone)
        if error is None:
            return inventory
        self._log.warning(error.reason, error=error.message)
        self._pool.recycle_admin()
        inventory = await self.take()
        error = self._losses(inventory, gone)
        if error is not None:
            raise await self._moved(inventory) or error
        return inventory

    async def _list(self, prefix: str) -> dict[str, Any]:
        return await self._pool.ask(Kind.LIST, {"prefix": prefix}, what="list objects")

    def _tell(self, memory: Memory) -> None:
        """Tell how much room there is, and once when it becomes little."""
        pool, hsm = self._pool, self._pool.facts.device
        for name, free in memory.fields.items():
            pool.metrics.gauge(("hsm", "free_memory"), free, {"hsm": hsm, "memory": name})
        was_short, self._is_short = self._is_short, memory.is_short(self._policy.key_types)
        if self._is_short and not was_short:
            self._log.warning(
                "hsm.nearly_full",
                hsm=hsm,
                left=memory.words,
                remedy="make room on it; when it is full, no key can be replaced",
            )

    def orphans(self, inventory: Inventory) -> list[Pair]:
        """Return pairs that a crash left before the manifest could name them."""
        ids = self._ledger.ids(inventory)
        orphans = [p for n, p in inventory.current.items() if n not in ids]
        if orphans and inventory.manifest is None:
            labels = [p.label for p in orphans]
            self._log.warning("hsm.unknown_keys", labels=labels, kept="no manifest names them")
            return []
        return orphans

    def _losses(self, inventory: Inventory, gone: Collection[str]) -> TokenError | None:
        facts = self._pool.facts
        for wanted in self._policy.imports:
            if wanted.key_id not in inventory.existing:
                was_there = wanted.key_id in self._ledger.state.existing
                return wanted.missing(facts, was_there=was_there)
        if self._policy.accept_key_loss:
            return None
        return losses_of(inventory, self._ledger).without(gone).error(facts.device)

    async def _moved(self, inventory: Inventory) -> TokenError | None:
        missing = losses_of(inventory, self._ledger).missing
        halves = listed_halves(await self._list(""))
        return find_moved(missing, self._ledger, halves, self._pool.facts.device)
