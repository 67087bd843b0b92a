"""What is done to a token now and then.

Halves of pairs that a crash left are removed, kept generations whose time is up are destroyed, and a
mark in the manifest tells other servers that this one is alive. A clock that jumped destroys nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from spire_hw.clock import Jumps
from spire_hw.errors import SpireHwError
from spire_hw.pkcs11.inventory.tenants import JUMP_S
from spire_hw.pkcs11.keyring.claim import LOOK_EVERY_S, MARK_EVERY_S

if TYPE_CHECKING:
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.pkcs11.inventory.inventory import Inventory
    from spire_hw.pkcs11.keyring.claim import Claim
    from spire_hw.pkcs11.keyring.disposal import Disposal
    from spire_hw.pkcs11.keyring.ledger import Ledger
    from spire_hw.pkcs11.keyring.retention import Retention
    from spire_hw.pkcs11.keyring.stock import Stock

_HALF_AGE_S: Final = 3600.0
_LEAST_S: Final = 1.0
# A token that could not be asked is left alone for a while.
_REST_S: Final = 60.0


class Housekeeping:
    """Keeps a token in order while its keys are in use."""

    def __init__(
        self,
        stock: Stock,
        ledger: Ledger,
        claim: Claim,
        retention: Retention,
        disposal: Disposal,
        *,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._stock = stock
        self._ledger = ledger
        self._claim = claim
        self._retention = retention
        self._disposal = disposal
        self._clock = clock
        self._log = log
        self._jumps = Jumps(clock)

    async def run(self) -> None:
        """Keep house until cancelled."""
        while True:
            due = None
            try:
                if await self.sweep():
                    due = self._retention.next_s()
            except SpireHwError as e:
                self._log.warning("hsm.housekeeping_failed", error=e.message)
            pause = MARK_EVERY_S if due is None else min(MARK_EVERY_S, max(_LEAST_S, due))
            await self._clock.sleep(pause)

    async def watch(self) -> None:
        """Look whether another instance is at work, until cancelled or given way."""
        pause = LOOK_EVERY_S
        while self._claim.conflict is None:
            await self._clock.sleep(pause)
            try:
                await self._claim.look()
                pause = LOOK_EVERY_S
            except SpireHwError as e:
                self._log.debug("hsm.look_failed", error=e.message)
                pause = _REST_S

    async def sweep(self) -> bool:
        """Do all of it once; False when nothing was done, because the clock cannot be trusted.

        Raises:
            SpireHwError: it could not be done now.
        """
        await self._claim.settle()
        inventory = await self._stock.take()
        await self._claim.check(inventory)
        jump = self._jumps.seconds
        if jump > JUMP_S:
            self._log.warning("hsm.clock_jumped", seconds=round(jump), kept="nothing is destroyed")
            return False
        await self._sweep_halves(inventory)
        await self._retention.expire(inventory)
        await self._claim.mark()
        return True

    async def _sweep_halves(self, inventory: Inventory) -> None:
        now = self._clock.now().timestamp()
        noted = self._ledger.state.halves
        current = {known.cka_id for known in self._ledger.state.keys.values()}
        halves = [
            p
            for p in inventory.halves
            if p.cka_id not in current and not self._retention.is_kept(p)
        ]
        seen = {p.cka_id.hex(): noted.get(p.cka_id.hex(), now) for p in halves}
        if seen != noted:
            await self._ledger.save(lambda state: replace(state, halves=seen))
        self._disposal.add(
            (p.cka_id, p.label) for p in halves if now - seen[p.cka_id.hex()] >= _HALF_AGE_S
        )
