"""The keys of one host on one token: found, proved, replaced, signed with.

A replacement is a new generation beside the old one. It becomes current only once its attributes
were read back, a signature of it was verified and the host's note is on disk; then the old
generation is destroyed. A crash anywhere leaves one complete, signing pair.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import (
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    SpireHwError,
)
from spire_hw.key import (
    KeyType,
    PublicKey,
    SignOptions,
    default_hash,
    key_type_of,
    parse_spki,
)
from spire_hw.pkcs11.disposal import Disposal
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.generation import Generation, Making
from spire_hw.pkcs11.inventory import (
    Entry,
    Inventory,
    Manifest,
    Pair,
    check_evidence,
    evidence_texts,
    read_listing,
)
from spire_hw.pkcs11.keys import (
    CKM_RSA_PKCS_PSS,
    MECHANISM_NAMES,
    check_request,
    mechanisms_for,
    public_key_of,
)
from spire_hw.pkcs11.labels import APPLICATION, Owner, key_name
from spire_hw.pkcs11.state import State, StateFile
from spire_hw.pkcs11.wire import Kind, SignItem, pack_bytes
from spire_hw.plugin.keymanager import KeyEvidence, KeyInfo, KeySignature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.pkcs11.pool import Pool

_HALF_AGE_S: Final = 3600.0
_HOUSEKEEPING_S: Final = 1800.0
_VANISHED_S: Final = 30.0
_QUARANTINE_AFTER: Final = 2
_MAX_ID: Final = 255
_CHECK: Final = b"spire-hw key possession check\0"


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator allows.

    Attributes:
        key_types: types that may be generated.
        accept_token: serial number of a token that may take the place of the one known so far.
        accept_key_loss: go on without keys that are gone.
        accept_weak_keys: key ids whose attributes need not prove where they were made.
    """

    key_types: frozenset[KeyType] = frozenset(KeyType)
    accept_token: str = ""
    accept_key_loss: bool = False
    accept_weak_keys: frozenset[str] = frozenset()


class Keyring:
    """The KeyManager contract over a pool of workers."""

    def __init__(
        self,
        pool: Pool,
        owner: Owner,
        file: StateFile,
        *,
        policy: Policy,
        instance: str,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._pool = pool
        self._owner = owner
        self._file = file
        self._policy = policy
        self._clock = clock
        self._log = log
        self._nonce = instance
        self._entries: dict[str, Entry] = {}
        self._state = State(owner)
        self._saving = asyncio.Lock()
        self._token_manifest: Manifest | None = None
        self._manifest_on_token = True
        self._bad_signatures: dict[bytes, int] = {}
        self._vanished: dict[bytes, float] = {}
        self._tasks = Tasks(self._on_task_failure)
        self.disposal = Disposal(pool, log)
        self._generation = Generation(self._tasks, self._make, self._abandon)

    async def open(self) -> None:
        """Take stock of the token and prove every key that is to be used.

        Raises:
            TokenError: the token, or a key on it, is not what it has to be; nothing was changed.
        """
        self._check_mechanisms()
        self._state = await asyncio.to_thread(self._file.load)
        self._check_token()
        inventory = await self._full_inventory()
        ids = self._ids(inventory)
        entries = {}
        for name, pair in inventory.current.items():
            key_id = ids.get(name)
            entry = None if key_id is None else await self._adopt(key_id, pair)
            if entry is not None:
                entries[entry.key_id] = entry
        order = {key_id: n for n, key_id in enumerate(self._state.keys)}
        self._entries = dict(
            sorted(entries.items(), key=lambda item: order.get(item[0], len(order)))
        )
        await self._claim(inventory)
        await self._save_opened()
        self._dispose((*inventory.retired, *self._orphans(inventory, ids)))
        self._tasks.start("hsm-disposal", self.disposal.run())
        self._tasks.start("hsm-housekeeping", self._keep_house())

    async def close(self) -> None:
        """Stop what runs in the background; the pool is closed by its owner."""
        await self._tasks.close()

    async def generate(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Make a key; see `spire_hw.plugin.keymanager.KeyManager.generate_key`."""
        _check_id(key_id)
        if key_type not in self._policy.key_types:
            raise InvalidInputError(f"key type {key_type.config_name} is not allowed by policy")
        self._check_type(key_type)
        if not self._pool.facts.can_write:
            raise TokenError(
                "token is read-only: keys cannot be generated",
                reason="hsm.read_only",
                operation="generate key pair",
                device=self._pool.facts.device,
                kind=ErrorKind.FAILED_PRECONDITION,
            )
        return await self._generation.run(key_id, key_type, self._commit)

    def get(self, key_id: str) -> Entry:
        """Return the current key of an id.

        Raises:
            InvalidInputError: `key id is required`.
            NotFoundError: there is none.
        """
        entry = self._entries.get(key_id)
        if entry is None:
            _check_id(key_id)
            raise NotFoundError(f'key "{key_id}" not found')
        return entry

    async def all(self) -> list[Entry]:
        """Return every key after asking the token that they are still there.

        Raises:
            TokenError: the token is away, or shows fewer keys than there have to be.
        """
        await self._full_inventory()
        return list(self._entries.values())

    async def sign(self, key_id: str, digest: bytes, options: SignOptions) -> KeySignature:
        """Sign a digest; see `spire_hw.plugin.keymanager.KeyManager.sign_data`."""
        entry = self.get(key_id)
        try:
            return await self._sign_with(entry, digest, options)
        except TokenError as e:
            if e.reason != "hsm.key_gone":
                raise
            current = self.get(key_id)
            if current is entry:
                await self._look_for(entry)
        # Replaced while the signature was under way, or invisible to a worker: the fingerprint of
        # whatever signs now tells the caller which.
        return await self._sign_with(current, digest, options)

    async def evidence(self, key_id: str) -> KeyEvidence:
        """Return what the token says about a key now."""
        entry = self.get(key_id)
        pair = (await self._inventory()).pair(entry.cka_id)
        if pair is None:
            raise self._gone(entry)
        facts = self._pool.facts
        location = f'PKCS#11 token "{facts.label}" serial {facts.serial}, object {entry.label}'
        attributes = evidence_texts(pair.evidence)
        return KeyEvidence(location, {"CKA_ID": pair.cka_id.hex(), **attributes})

    async def _sign_with(self, entry: Entry, digest: bytes, options: SignOptions) -> KeySignature:
        self._check_health(entry)
        check_request(entry.key_type, digest, options)
        if options.pss and CKM_RSA_PKCS_PSS not in self._pool.facts.mechanisms:
            raise InvalidInputError("token lacks CKM_RSA_PKCS_PSS")
        try:
            signature = await self._pool.sign(SignItem(entry.sign_key, digest, options))
        except TokenError as e:
            if options.pss and e.reason == "hsm.mechanism_param_invalid":
                raise InvalidInputError(
                    f"salt length {options.salt_length} not supported by token"
                ) from e
            if e.reason == "hsm.bad_signature":
                self._bad_signatures[entry.cka_id] = self._bad_signatures.get(entry.cka_id, 0) + 1
                self._log.error("hsm.bad_signature", key_id=entry.key_id, fp=entry.fingerprint)
            raise
        return KeySignature(signature, entry.fingerprint)

    def _check_health(self, entry: Entry) -> None:
        if not self._bad_signatures and not self._vanished:
            return
        if self._bad_signatures.get(entry.cka_id, 0) >= _QUARANTINE_AFTER:
            raise TokenError(
                f'key "{entry.key_id}" is quarantined: its signatures did not verify',
                reason="hsm.key_quarantined",
                operation="sign",
                device=self._pool.facts.device,
            )
        if self._vanished.get(entry.cka_id, 0.0) > self._clock.monotonic():
            raise self._gone(entry)

    async def _look_for(self, entry: Entry) -> None:
        if (await self._inventory()).pair(entry.cka_id) is None:
            self._vanished[entry.cka_id] = self._clock.monotonic() + _VANISHED_S
            self._log.error("hsm.key_vanished", key_id=entry.key_id, fp=entry.fingerprint)
            raise self._gone(entry)
        self._pool.recycle()

    def _gone(self, entry: Entry) -> TokenError:
        return TokenError(
            f'key "{entry.key_id}" ({entry.fingerprint}) vanished from token '
            f"{self._pool.facts.device}",
            reason="hsm.key_vanished",
            operation="find key",
            device=self._pool.facts.device,
        )

    def _check_mechanisms(self) -> None:
        wanted = self._policy.key_types
        usable = [t for t in wanted if not self._lacking(t)]
        if not usable or (wanted != frozenset(KeyType) and len(usable) < len(wanted)):
            for key_type in sorted(wanted, key=lambda t: t.value):
                self._check_type(key_type)
        if CKM_RSA_PKCS_PSS not in self._pool.facts.mechanisms:
            self._log.warning("hsm.no_pss", hsm=self._pool.facts.device)

    def _lacking(self, key_type: KeyType) -> list[int]:
        return [m for m in mechanisms_for(key_type) if m not in self._pool.facts.mechanisms]

    def _check_type(self, key_type: KeyType) -> None:
        lacking = self._lacking(key_type)
        if lacking:
            raise TokenError(
                f"token lacks {mechanism_text(lacking)} needed for {key_type.config_name}",
                reason="hsm.mechanism_missing",
                operation="check mechanisms",
                device=self._pool.facts.device,
                cure=Cure.OPERATOR,
                kind=ErrorKind.FAILED_PRECONDITION,
            )

    def _check_token(self) -> None:
        known, facts = self._state.token_serial, self._pool.facts
        if known in {"", facts.serial} or self._policy.accept_token == facts.serial:
            return
        raise TokenError(
            f"token serial changed: found {facts.serial}, expected {known}; "
            f'set accept_token = "{facts.serial}" if that is meant',
            reason="hsm.token_changed",
            operation="open token",
            device=facts.device,
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    def _orphans(self, inventory: Inventory, ids: dict[str, str]) -> list[Pair]:
        """Return pairs that a crash left before the manifest could name them."""
        orphans = [p for n, p in inventory.current.items() if n not in ids]
        if orphans and inventory.manifest is None:
            labels = [p.label for p in orphans]
            self._log.warning("hsm.unknown_keys", labels=labels, kept="no manifest names them")
            return []
        return orphans

    async def _inventory(self) -> Inventory:
        listing = await self._pool.ask(
            Kind.LIST, {"prefix": self._owner.prefix}, what="list objects"
        )
        known = {key_name(key_id): k.cka_id for key_id, k in self._state.keys.items()}
        return read_listing(self._owner, listing, known)

    async def _full_inventory(self) -> Inventory:
        """Return an inventory that shows every key there has to be, asking a fresh worker too."""
        inventory = await self._inventory()
        try:
            self._check_losses(inventory, self._ids(inventory))
        except TokenError as e:
            self._log.warning(e.reason, error=e.message)
        else:
            return inventory
        self._pool.recycle_admin()
        inventory = await self._inventory()
        self._check_losses(inventory, self._ids(inventory))
        return inventory

    def _ids(self, inventory: Inventory) -> dict[str, str]:
        """Return key ids by the key part of their labels."""
        ids = {name: name for name in inventory.current if not name.startswith("~")}
        if inventory.manifest is not None:
            ids |= inventory.manifest.keys
        for key_id in (*self._state.keys, *self._entries):
            ids[key_name(key_id)] = key_id
        return ids

    def _check_losses(self, inventory: Inventory, ids: dict[str, str]) -> None:
        """Refuse to take a short listing for the truth."""
        shown = {ids[name]: pair for name, pair in inventory.current.items() if name in ids}
        expected = {key_name(k): k for k in (*self._state.keys, *self._entries)}
        if inventory.manifest is not None:
            expected = {**inventory.manifest.keys, **expected}
        missing = sorted(key_id for key_id in expected.values() if key_id not in shown)
        older = sorted(
            key_id
            for key_id, known in self._state.keys.items()
            if key_id in shown and shown[key_id].generation < known.generation
        )
        if self._policy.accept_key_loss or not (missing or older):
            return
        facts = self._pool.facts
        if missing:
            message = (
                f"manifest names {len(expected)} keys, token {facts.device} shows {len(shown)}; "
                f"missing: {', '.join(missing)}"
            )
            kind = ErrorKind.UNAVAILABLE
        else:
            message = f"token {facts.device} shows older generations of {', '.join(older)}"
            kind = ErrorKind.FAILED_PRECONDITION
        raise TokenError(
            f"{message}; set accept_key_loss to go on without them",
            reason="hsm.keys_missing",
            operation="list objects",
            device=facts.device,
            kind=kind,
        )

    async def _adopt(self, key_id: str, pair: Pair) -> Entry | None:
        try:
            public_key, key_type = self._public_key(key_id, pair)
        except InvalidInputError as e:
            raise TokenError(
                f'key "{key_id}" on token {self._pool.facts.device}: {e.message}',
                reason="hsm.key_unreadable",
                operation="read public key",
                cure=Cure.OPERATOR,
                kind=ErrorKind.FAILED_PRECONDITION,
            ) from e
        if key_id not in self._policy.accept_weak_keys:
            check_evidence(f'key "{key_id}"', pair.evidence, key_type)
        info = KeyInfo.of(key_id, key_type, public_key)
        entry = Entry.of(info, pair.cka_id, pair.label, pair.generation)
        await self._prove(entry)
        return entry

    def _public_key(self, key_id: str, pair: Pair) -> tuple[PublicKey, KeyType]:
        known = self._state.keys.get(key_id)
        if pair.material is not None:
            public_key = public_key_of(pair.material)
        elif known is not None and known.cka_id == pair.cka_id:
            self._log.warning("hsm.public_half_missing", key_id=key_id)
            public_key = parse_spki(known.spki)
        else:
            raise InvalidInputError("no public key is known for it")
        return public_key, key_type_of(public_key)

    async def _prove(self, entry: Entry) -> None:
        """Have the key sign something that can be nothing else, and verify it."""
        options = SignOptions(default_hash(entry.public_key))
        digest = options.hash.digest(_CHECK + secrets.token_bytes(32))
        item = SignItem(entry.sign_key, digest, options)
        try:
            await self._pool.sign(item)
        except TokenError as e:
            if e.reason != "hsm.key_gone":
                raise
            # A new object may be invisible to workers that were started before it was made.
            self._pool.recycle()
            await self._pool.sign(item)

    async def _claim(self, inventory: Inventory) -> None:
        """Say on the token which instance uses these keys from now on."""
        if not self._pool.facts.can_write:
            self._log.warning("hsm.read_only", hsm=self._pool.facts.device)
            self._manifest_on_token = False
            return
        kept = {} if inventory.manifest is None else dict(inventory.manifest.keys)
        if self._policy.accept_key_loss:
            kept = {name: key_id for name, key_id in kept.items() if key_id in self._entries}
        await self._put_manifest({**kept, **{key_name(k): k for k in self._entries}})

    async def _put_manifest(self, keys: dict[str, str]) -> None:
        manifest = Manifest(self._owner, self._nonce, keys)
        fields = {
            "label": self._owner.manifest_label,
            "application": APPLICATION,
            "value": pack_bytes(manifest.encode()),
        }
        try:
            await self._pool.ask(Kind.PUT_DATA, fields, what="write manifest")
        except TokenError as e:
            if e.cure is Cure.RESTART or self._token_manifest is not None:
                raise
            # Some tokens hold no data objects: the host's own note has to do.
            self._log.warning("hsm.no_manifest_on_token", error=e.message)
            self._manifest_on_token = False
            return
        self._token_manifest = manifest

    async def _save_opened(self) -> None:
        facts = self._pool.facts

        def opened(state: State) -> State:
            state = replace(state, token_label=facts.label, token_serial=facts.serial, keys={})
            for entry in self._entries.values():
                state = state.with_entry(entry)
            return state

        await self._save(opened)

    async def _save(self, change: Callable[[State], State]) -> None:
        async with self._saving:
            state = change(self._state)
            await asyncio.to_thread(self._file.save, state)
            self._state = state

    def _dispose(self, pairs: Iterable[Pair]) -> None:
        self.disposal.add((p.cka_id, p.label) for p in pairs)

    async def _make(self, key_id: str, key_type: KeyType) -> Entry:
        """Generate and prove the next generation; it is not current yet."""
        inventory = await self._inventory()
        self._check_instance(inventory)
        name = key_name(key_id)
        current = self._entries.get(key_id)
        generation = max(inventory.top.get(name, 0), current.generation if current else 0) + 1
        cka_id, label = secrets.token_bytes(16), self._owner.key_label(key_id, generation)
        making = Making(self._pool, key_type, cka_id, label)
        try:
            described = await making.generate(self.disposal)
            public_key = described.public_key
            check_evidence(f'generated key "{key_id}"', described.evidence, key_type)
            info = KeyInfo.of(key_id, key_type, public_key)
            entry = Entry.of(info, cka_id, label, generation)
            await self._prove(entry)
            keys = {} if inventory.manifest is None else dict(inventory.manifest.keys)
            if self._manifest_on_token and keys.get(name) != key_id:
                await self._put_manifest({**keys, name: key_id})
        except BaseException:
            self.disposal.add([(cka_id, label)])
            raise
        return entry

    def _check_instance(self, inventory: Inventory) -> None:
        manifest = inventory.manifest
        if not self._manifest_on_token or manifest is None or manifest.nonce == self._nonce:
            return
        raise TokenError(
            f'server id "{self._owner.server}" is in use by another instance; '
            "it was started after this one",
            reason="hsm.owner_conflict",
            operation="generate key pair",
            device=self._pool.facts.device,
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    async def _commit(self, entry: Entry) -> KeyInfo:
        """Make a proved generation current and retire the one before."""
        try:
            await self._save(lambda state: state.with_entry(entry))
        except TokenError:
            self._abandon(entry)
            raise
        old = self._entries.pop(entry.key_id, None)
        self._entries[entry.key_id] = entry
        if old is not None:
            self.disposal.add([(old.cka_id, old.label)])
        self._log.info(
            "hsm.key_generated", key_id=entry.key_id, label=entry.label, fp=entry.fingerprint
        )
        return info_of(entry)

    def _abandon(self, entry: Entry) -> None:
        self.disposal.add([(entry.cka_id, entry.label)])

    async def _keep_house(self) -> None:
        """Remove halves of pairs that a crash left, once they are too old to be in the making."""
        while True:
            try:
                await self._sweep()
            except SpireHwError as e:
                self._log.warning("hsm.housekeeping_failed", error=e.message)
            await self._clock.sleep(_HOUSEKEEPING_S)

    async def _sweep(self) -> None:
        inventory = await self._inventory()
        self._check_instance(inventory)
        now = self._clock.now().timestamp()
        seen = {
            p.cka_id.hex(): self._state.halves.get(p.cka_id.hex(), now) for p in inventory.halves
        }
        old = [p for p in inventory.halves if now - seen[p.cka_id.hex()] >= _HALF_AGE_S]
        if seen != self._state.halves:
            await self._save(lambda state: replace(state, halves=seen))
        self._dispose(old)

    def _on_task_failure(self, name: str, error: BaseException) -> None:
        message = error.message if isinstance(error, SpireHwError) else type(error).__name__
        self._log.error("hsm.task_failed", task=name, error=message)


def mechanism_text(mechanisms: Iterable[int]) -> str:
    """Return mechanism names for a message."""
    return ", ".join(MECHANISM_NAMES.get(m, f"0x{m:x}") for m in mechanisms)


def _check_id(key_id: str) -> None:
    if not key_id:
        raise InvalidInputError("key id is required")
    if len(key_id) > _MAX_ID or not key_id.isprintable():
        raise InvalidInputError(f"key id must be printable and at most {_MAX_ID} characters")


def info_of(entry: Entry) -> KeyInfo:
    """Return the contract's view of a key."""
    return KeyInfo(entry.key_id, entry.key_type, entry.public_key, entry.fingerprint)
