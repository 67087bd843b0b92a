"""What is done to a token now and then: halves of pairs that a crash left are removed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from spire_hw.errors import SpireHwError

if TYPE_CHECKING:
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.pkcs11.claim import Claim
    from spire_hw.pkcs11.disposal import Disposal
    from spire_hw.pkcs11.ledger import Ledger
    from spire_hw.pkcs11.stock import Stock

_HALF_AGE_S: Final = 3600.0
_EVERY_S: Final = 1800.0


class Housekeeping:
    """Removes what is left over, once it is too old to be in the making."""

    def __init__(
        self,
        stock: Stock,
        ledger: Ledger,
        claim: Claim,
        disposal: Disposal,
        *,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._stock = stock
        self._ledger = ledger
        self._claim = claim
        self._disposal = disposal
        self._clock = clock
        self._log = log

    async def run(self) -> None:
        """Keep house until cancelled."""
        while True:
            try:
                await self.sweep()
            except SpireHwError as e:
                self._log.warning("hsm.housekeeping_failed", error=e.message)
            await self._clock.sleep(_EVERY_S)

    async def sweep(self) -> None:
        """Do all of it once.

        Raises:
            SpireHwError: it could not be done now.
        """
        inventory = await self._stock.take()
        self._claim.check(inventory)
        now = self._clock.now().timestamp()
        noted = self._ledger.state.halves
        seen = {p.cka_id.hex(): noted.get(p.cka_id.hex(), now) for p in inventory.halves}
        if seen != noted:
            await self._ledger.save(lambda state: replace(state, halves=seen))
        self._disposal.add(
            (p.cka_id, p.label)
            for p in inventory.halves
            if now - seen[p.cka_id.hex()] >= _HALF_AGE_S
        )
