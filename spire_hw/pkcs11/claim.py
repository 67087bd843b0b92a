"""The manifest on the token: which instance uses these keys, and how they are called in full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.inventory import Inventory, Manifest
from spire_hw.pkcs11.labels import APPLICATION, key_name
from spire_hw.pkcs11.wire import Kind, pack_bytes

if TYPE_CHECKING:
    from spire_hw.log import Logger
    from spire_hw.pkcs11.ledger import Ledger
    from spire_hw.pkcs11.policy import Policy
    from spire_hw.pkcs11.pool import Pool


class Claim:
    """One instance's claim on its owner's keys.

    Args:
        nonce: tells this instance from others that use the same server id.
    """

    def __init__(self, pool: Pool, ledger: Ledger, policy: Policy, nonce: str, log: Logger) -> None:
        self._pool = pool
        self._ledger = ledger
        self._policy = policy
        self._nonce = nonce
        self._log = log
        self._written: Manifest | None = None
        self._on_token = True

    async def stake(self, inventory: Inventory) -> None:
        """Say on the token which instance uses these keys from now on.

        Raises:
            TokenError: the token failed.
        """
        if not self._pool.facts.can_write:
            self._log.warning("hsm.read_only", hsm=self._pool.facts.device)
            self._on_token = False
            return
        if not self._pool.facts.profile.data_objects:
            self._on_token = False
            return
        entries = self._ledger.entries
        kept = {} if inventory.manifest is None else dict(inventory.manifest.keys)
        if self._policy.accept_key_loss:
            kept = {name: key_id for name, key_id in kept.items() if key_id in entries}
        await self._put({**kept, **{key_name(k): k for k in entries}})

    async def add(self, inventory: Inventory, key_id: str) -> None:
        """Have the manifest name a key, if it does not.

        Raises:
            TokenError: the token failed.
        """
        name = key_name(key_id)
        keys = {} if inventory.manifest is None else dict(inventory.manifest.keys)
        if self._on_token and keys.get(name) != key_id:
            await self._put({**keys, name: key_id})

    def check(self, inventory: Inventory) -> None:
        """Refuse to go on beside another instance that was started later.

        Raises:
            TokenError: FAILED_PRECONDITION.
        """
        manifest = inventory.manifest
        if not self._on_token or manifest is None or manifest.nonce == self._nonce:
            return
        raise TokenError(
            f'server id "{self._ledger.owner.server}" is in use by another instance; '
            "it was started after this one",
            reason="hsm.owner_conflict",
            operation="generate key pair",
            device=self._pool.facts.device,
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    async def _put(self, keys: dict[str, str]) -> None:
        owner = self._ledger.owner
        manifest = Manifest(owner, self._nonce, keys)
        fields = {
            "label": owner.manifest_label,
            "application": APPLICATION,
            "value": pack_bytes(manifest.encode()),
        }
        try:
            await self._pool.ask(Kind.PUT_DATA, fields, what="write manifest")
        except TokenError as e:
            if e.cure is Cure.RESTART or self._written is not None:
                raise
            # Some tokens hold no data objects: the host's own note has to do.
            self._log.warning("hsm.no_manifest_on_token", error=e.message)
            self._on_token = False
            return
        self._written = manifest
