"""The manifest on the token: which instance uses these keys, since when, how they are called in full."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.inventory.inventory import read_listing
from spire_hw.pkcs11.inventory.labels import APPLICATION, key_name
from spire_hw.pkcs11.inventory.manifest import Manifest
from spire_hw.pkcs11.keyring.fitness import check_writable
from spire_hw.pkcs11.wire import Kind, pack_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.pkcs11.inventory.choice import Choice
    from spire_hw.pkcs11.inventory.inventory import Inventory
    from spire_hw.pkcs11.keyring.ledger import Ledger
    from spire_hw.pkcs11.keyring.policy import Policy
    from spire_hw.pkcs11.pool.pool import Pool

_PROTECTED: Final = frozenset({"hsm.session_read_only", "hsm.token_write_protected"})
# How often an instance says that it lives, and looks whether another one says so.
MARK_EVERY_S: Final = 1800.0
LOOK_EVERY_S: Final = 10.0
# So long an instance that was started later waits for what an earlier one has to say.
_SETTLE_S: Final = 2 * LOOK_EVERY_S
# A write that fails without saying why costs a worker: it is not tried for every caller.
_LOOK_AGAIN_S: Final = 30.0
# How SoftHSM says that its store cannot be written to; also how tokens say that they are away.
_MAYBE_PROTECTED: Final = frozenset({"hsm.general_error", "hsm.function_failed"})


class Claim:
    """One instance's claim on its owner's keys.

    Whoever starts writes its own mark over that of the one before, which may be dead. If that one lives
    it writes its own again, as soon as it looks, and the later one gives way for good: what stands there
    did not write over its mark. Until the one before has had time to look, nothing is made or destroyed.

    Args:
        nonce: tells this instance from others that use the same server id.
        place: where it runs, such that an earlier instance there is dead; "" when that is not known.

    Attributes:
        refusal: why the token takes no writing, None while it does.
        conflict: that another instance was started earlier and lives, None as long as none is known.
    """

    def __init__(
        self,
        pool: Pool,
        ledger: Ledger,
        policy: Policy,
        *,
        nonce: str,
        place: str,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._pool = pool
        self._ledger = ledger
        self._policy = policy
        self._nonce = nonce
        self._place = place
        self._clock = clock
        self._log = log
        self._written: Manifest | None = None
        self._before: tuple[str, ...] = ()
        self._holds_none = False
        self._look_again = 0.0
        self._is_settled = True
        self._settled_at = 0.0
        self._writing = asyncio.Lock()
        self.refusal: TokenError | None = None
        self.conflict: TokenError | None = None

    async def stake(self, inventory: Inventory) -> None:
        """Say on the token which instance uses these keys from now on.

        A token that can be read and signs but takes no writing is left as it is.

        Raises:
            TokenError: the token failed.
        """
        facts = self._pool.facts
        self._holds_none = not facts.profile.data_objects
        try:
            check_writable(facts)
        except TokenError as e:
            self._refused(e)
            return
        if self._holds_none:
            return
        found = inventory.manifest
        if found is not None:
            self._before = tuple(n for n in (*found.before, found.nonce) if n != self._nonce)
            if self._may_live(found):
                self._is_settled = False
                self._settled_at = self._clock.monotonic() + _SETTLE_S
                self._log.warning(
                    "hsm.owner_unsettled", wait_s=_SETTLE_S, kept="nothing is made yet"
                )
        entries = self._ledger.entries
        kept = {} if inventory.manifest is None else dict(inventory.manifest.keys)
        if self._policy.accept_key_loss:
            kept = {name: key_id for name, key_id in kept.items() if key_id in entries}
        keys = {**kept, **{key_name(k): k for k, e in entries.items() if not e.is_existing}}
        try:
            async with self._writing:
                await self._put(keys, inventory.choices)
        except TokenError as e:
            if e.reason not in _MAYBE_PROTECTED | _PROTECTED:
                raise
            if e.reason in _MAYBE_PROTECTED:
                # A token that is away lists nothing either; one that lists is there, and read-only.
                prefix = {"prefix": self._ledger.owner.prefix}
                await self._pool.ask(Kind.LIST, prefix, what="list objects")
                self._look_again = self._clock.monotonic() + _LOOK_AGAIN_S
            self._refused(e)

    def _may_live(self, found: Manifest) -> bool:
        """Tell whether the instance of a manifest may still be running."""
        if found.place == self._place and (self._place or found.nonce == self._nonce):
            return False
        return abs(self._clock.now().timestamp() - found.time) < MARK_EVERY_S + _SETTLE_S

    async def settle(self) -> None:
        """Return once an earlier instance that lives would have said so; as a rule at once.

        Raises:
            TokenError: ABORTED, it lives; or the token failed.
        """
        if self._is_settled:
            return
        left = self._settled_at - self._clock.monotonic()
        if left > 0.0:
            await self._clock.sleep(left)
        await self.look()
        self._is_settled = True

    def _refused(self, error: TokenError) -> None:
        self.refusal = TokenError(
            f"token {self._pool.facts.device} is read-only: keys cannot be generated, rotation is "
            "impossible; lift the write protection or give its store back its rights, or, where "
            "login_as is crypto-user, make keys as its user",
            reason="hsm.read_only",
            operation="generate key pair",
            device=self._pool.facts.device,
            code=error.code,
            kind=ErrorKind.FAILED_PRECONDITION,
        )
        self._log.warning("hsm.read_only", error=self.refusal.message, cause=error.message)

    async def check_writable(self, inventory: Inventory) -> None:
        """Refuse to generate on a token that takes no writing; look again whether it does now.

        Raises:
            TokenError: FAILED_PRECONDITION.
        """
        if self.refusal is None:
            return
        if self._clock.monotonic() < self._look_again:
            raise self.refusal.with_traceback(None)
        self.refusal = None
        await self.stake(inventory)
        if self.refusal is not None:
            raise self.refusal
        await self.settle()

    async def add(self, inventory: Inventory, key_id: str) -> None:
        """Have the manifest name a key, if it does not.

        Raises:
            TokenError: the token failed.
        """
        name = key_name(key_id)
        keys = {} if inventory.manifest is None else inventory.manifest.keys
        if self._written is None or keys.get(name) == key_id:
            return
        async with self._writing:
            now = await self._now()
            await self._put({**self._named(now), name: key_id}, now.choices)

    async def remove(self, key_id: str) -> None:
        """Have the manifest no longer name a key.

        Raises:
            TokenError: the token failed.
        """
        if self._written is None:
            return
        name = key_name(key_id)
        async with self._writing:
            now = await self._now()
            before = self._named(now)
            keys = {n: k for n, k in before.items() if n != name}
            choices = {k: choice for k, choice in now.choices.items() if k != key_id}
            if len(keys) < len(before):
                await self._put(keys, choices)

    async def mark(self) -> None:
        """Write down that this instance is alive, and which generations were taken back.

        Raises:
            TokenError: the token failed.
        """
        if self._written is None:
            return
        async with self._writing:
            now = await self._now()
            await self._put(self._named(now), self._ledger.state.choices)

    def is_lost(self, inventory: Inventory) -> bool:
        """Tell whether the mark on the token is another instance's."""
        manifest = inventory.manifest
        if self._written is None or manifest is None:
            return False
        return manifest.nonce != self._nonce

    async def check(self, inventory: Inventory) -> None:
        """Give way to an instance that was started earlier; tell one that was started later.

        Raises:
            TokenError: ABORTED, an earlier one lives; or the token failed.
        """
        self._give_way(inventory)
        if self.is_lost(inventory):
            async with self._writing:
                await self._answer(await self._now())

    async def look(self) -> None:
        """Do the same as `check` with the manifest as it is now; that is all that is read.

        Raises:
            TokenError: as `check`.
        """
        if self.conflict is not None:
            raise self.conflict
        if self._written is not None:
            async with self._writing:
                await self._answer(await self._now())

    async def _answer(self, now: Inventory) -> None:
        if self.is_lost(now):
            server = self._ledger.owner.server
            self._log.error("hsm.owner_challenged", server=server, kept="the later one has to stop")
            await self._put(self._named(now), now.choices)

    def _give_way(self, inventory: Inventory) -> None:
        manifest = inventory.manifest
        if self.conflict is None and manifest is not None and self.is_lost(inventory):
            # Who was started later has written over this one's mark, and says so.
            if manifest.nonce not in self._before and self._nonce in manifest.before:
                return
            self.conflict = TokenError(
                f'server id "{self._ledger.owner.server}" is in use by another instance, which was '
                "started before this one: stop one of them, or give one an id of its own; when the "
                "other is gone, restart this one",
                reason="hsm.owner_conflict",
                operation="generate key pair",
                device=self._pool.facts.device,
                cure=Cure.OPERATOR,
                kind=ErrorKind.ABORTED,
            )
            self._log.error("hsm.owner_conflict", error=self.conflict.message)
        if self.conflict is not None:
            raise self.conflict

    async def _now(self) -> Inventory:
        """Return what the token tells now, which is written over: keys may have been named since.

        Raises:
            TokenError: the token failed, or another instance was started earlier.
        """
        owner = self._ledger.owner
        wanted = {"prefix": owner.manifest_label, "data_only": True}
        listing = await self._pool.ask(Kind.LIST, wanted, what="read manifest")
        found = read_listing(owner, listing, choices=self._ledger.state.choices)
        self._give_way(found)
        return found

    def _named(self, now: Inventory) -> dict[str, str]:
        manifest = now.manifest or self._written
        return {} if manifest is None else dict(manifest.keys)

    async def _put(self, keys: dict[str, str], choices: Mapping[str, Choice]) -> None:
        if self._holds_none:
            return
        owner, now = self._ledger.owner, self._clock.now().timestamp()
        # Who is not settled yet says no place: the next one there must not take it for the only one.
        place = self._place if self._is_settled else ""
        manifest = Manifest(owner, self._nonce, keys, now, choices, self._before, place)
        fields = {
            "label": owner.manifest_label,
            "application": APPLICATION,
            "value": pack_bytes(manifest.encode()),
        }
        try:
            await self._pool.ask(Kind.PUT_DATA, fields, what="write manifest")
        except TokenError as e:
            if e.cure is Cure.RESTART or e.reason in _PROTECTED or self._written is not None:
                raise
            # Some tokens hold no data objects: the host's own note has to do.
            self._log.warning("hsm.no_manifest_on_token", error=e.message)
            self._holds_none = True
            return
        self._written = manifest
