"""Clearing a token of keys that servers left behind which are no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from spire_hw.errors import NotReadyError
from spire_hw.pkcs11.inventory.tenants import Tenancy, Tenant, read_tenancy
from spire_hw.pkcs11.wire import Kind, pack_bytes

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from spire_hw.clock import Clock
    from spire_hw.config.hcl import Body
    from spire_hw.log import Logger
    from spire_hw.pkcs11.inventory.labels import Owner
    from spire_hw.pkcs11.pool.pool import Pool


class SharedToken:
    """A token that several servers may use, seen by one of them; its own keys are left alone.

    Attributes:
        owner: that one.
    """

    def __init__(self, pool: Pool, owner: Owner, clock: Clock, log: Logger) -> None:
        self._pool = pool
        self.owner = owner
        self._clock = clock
        self._log = log

    @property
    def device(self) -> str:
        """Return label and serial number of the token."""
        return self._pool.facts.device

    @property
    def now(self) -> float:
        """Return this machine's time, Unix seconds."""
        return self._clock.now().timestamp()

    async def tenancy(self) -> Tenancy:
        """Return who has keys on the token.

        Raises:
            TokenError: it cannot be listed.
        """
        listing = await self._pool.ask(Kind.LIST, {"prefix": ""}, what="list objects")
        return read_tenancy(listing, self.owner)

    async def reap(self, tenant: Tenant, older_than_s: float) -> int:
        """Destroy a tenant's keys, then its manifest; return how many keys there were.

        The token is looked at again first, so that a server that came back meanwhile keeps its keys.

        Raises:
            NotReadyError: it may not be reaped, or the clock cannot be trusted.
            TokenError: the token refused; keys that are left are reaped by another try.
        """
        tenancy = await self.tenancy()
        tenancy.check_clock(self.now)
        again = next((t for t in tenancy.tenants if t.prefix == tenant.prefix), None)
        if again is None:
            return 0
        why = again.why_kept(self.owner, self.now, older_than_s)
        if why or again.marked != tenant.marked:
            raise NotReadyError(f"{tenant.prefix} is kept: {why or 'it was marked again just now'}")
        for cka_id, label in again.pairs:
            place = {"id": pack_bytes(cka_id), "label": label}
            await self._pool.ask(Kind.DESTROY, place, what="destroy key pair")
            self._log.info("hsm.key_reaped", label=label)
        if again.owner is not None:
            place = {"id": "", "label": again.owner.manifest_label}
            await self._pool.ask(Kind.DESTROY, place, what="destroy manifest")
        return len(again.pairs)


@runtime_checkable
class SharedTokenSource(Protocol):
    """Optional: a KeyManager that keeps its keys on a token which others may use, too."""

    def shared_token(
        self, config: Body, name: str = ""
    ) -> AbstractAsyncContextManager[SharedToken]:
        """Open a token for a look at everything on it; no claim is laid to any key.

        Args:
            config: the key manager's configuration.
            name: which of several tokens; the only one when empty.

        Raises:
            ConfigError: the configuration has faults.
            NotReadyError: this host has no identity on the token yet.
            TokenError: the token cannot be opened.
        """
        ...
