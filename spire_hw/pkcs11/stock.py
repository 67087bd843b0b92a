"""Taking stock: what the token shows of this owner's keys now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.inventory import Inventory, Pair, read_listing
from spire_hw.pkcs11.losses import check_losses
from spire_hw.pkcs11.wire import Kind

if TYPE_CHECKING:
    from spire_hw.log import Logger
    from spire_hw.pkcs11.ledger import Ledger
    from spire_hw.pkcs11.policy import Policy
    from spire_hw.pkcs11.pool import Pool


class Stock:
    """Asks a pool what is on its token."""

    def __init__(self, pool: Pool, ledger: Ledger, policy: Policy, log: Logger) -> None:
        self._pool = pool
        self._ledger = ledger
        self._policy = policy
        self._log = log

    async def take(self) -> Inventory:
        """Return what the token shows, be it all there is or not.

        Raises:
            TokenError: the token is away, or what it shows contradicts itself.
        """
        owner = self._ledger.owner
        listing = await self._pool.ask(Kind.LIST, {"prefix": owner.prefix}, what="list objects")
        return read_listing(owner, listing, self._ledger.known_ids())

    async def take_full(self) -> Inventory:
        """Return an inventory that shows every key there has to be, asking a fresh worker too.

        Raises:
            TokenError: as `take`, or keys are missing.
        """
        inventory = await self.take()
        try:
            self._check_losses(inventory)
        except TokenError as e:
            self._log.warning(e.reason, error=e.message)
        else:
            return inventory
        self._pool.recycle_admin()
        inventory = await self.take()
        self._check_losses(inventory)
        return inventory

    def orphans(self, inventory: Inventory) -> list[Pair]:
        """Return pairs that a crash left before the manifest could name them."""
        ids = self._ledger.ids(inventory)
        orphans = [p for n, p in inventory.current.items() if n not in ids]
        if orphans and inventory.manifest is None:
            labels = [p.label for p in orphans]
            self._log.warning("hsm.unknown_keys", labels=labels, kept="no manifest names them")
            return []
        return orphans

    def _check_losses(self, inventory: Inventory) -> None:
        if not self._policy.accept_key_loss:
            check_losses(inventory, self._ledger, self._pool.facts.device)
