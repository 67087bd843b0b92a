"""May a key that was found on the token be used? Its attributes are judged, and it has to sign."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

from spire_hw.errors import ErrorKind, InvalidInputError
from spire_hw.key import KeyType, PublicKey, SignOptions, default_hash, key_type_of, parse_spki
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.evidence import check_evidence
from spire_hw.pkcs11.inventory.entry import Entry
from spire_hw.pkcs11.keys import OtherKeyTypeError, public_key_of
from spire_hw.pkcs11.wire import SignItem
from spire_hw.plugin.keymanager import KeyInfo

if TYPE_CHECKING:
    from spire_hw.log import Logger
    from spire_hw.pkcs11.inventory.inventory import Pair
    from spire_hw.pkcs11.keyring.ledger import Ledger
    from spire_hw.pkcs11.keyring.policy import Policy
    from spire_hw.pkcs11.pool.pool import Pool

OTHER_TYPE: Final = "hsm.key_type"
MISMATCH: Final = "hsm.public_key_mismatch"
_CHECK: Final = b"spire-hw key possession check\0"


class Proving:
    """Makes entries of pairs that proved themselves."""

    def __init__(self, pool: Pool, ledger: Ledger, policy: Policy, log: Logger) -> None:
        self._pool = pool
        self._ledger = ledger
        self._policy = policy
        self._log = log

    async def adopt(self, key_id: str, pair: Pair) -> Entry:
        """Return the entry of a pair that is fit to be used.

        Raises:
            TokenError: it is not, or the token failed; reason `hsm.public_key_mismatch` when the
                public half there is not this key's.
        """
        try:
            public_key, key_type = self._public_key(key_id, pair)
        except InvalidInputError as e:
            raise TokenError(
                f'key "{key_id}" on token {self._pool.facts.device}: {e.message}',
                reason=OTHER_TYPE if isinstance(e, OtherKeyTypeError) else "hsm.key_unreadable",
                operation="read public key",
                cure=Cure.OPERATOR,
                kind=ErrorKind.FAILED_PRECONDITION,
            ) from e
        self._check_evidence(key_id, pair, key_type)
        info = KeyInfo.of(key_id, key_type, public_key)
        entry = Entry.of(info, pair.cka_id, pair.label, pair.generation)
        try:
            await self.prove(entry)
        except TokenError as e:
            if e.reason != "hsm.bad_signature":
                raise
            raise self._mismatch(entry, e) from e
        return entry

    def _mismatch(self, entry: Entry, cause: TokenError) -> TokenError:
        device, cka_id = self._pool.facts.device, entry.cka_id.hex()
        self._log.error(
            MISMATCH, key_id=entry.key_id, label=entry.label, cka_id=cka_id, fp=entry.fingerprint
        )
        return TokenError(
            f'key "{entry.key_id}" on token {device}: public key mismatch: what it signs does not '
            f'verify with the public half known of it (label "{entry.label}", CKA_ID {cka_id}, '
            f"{entry.fingerprint}); give back the public object that belongs to it, or take the "
            "device out of service if it signs wrongly",
            reason=MISMATCH,
            operation="prove key",
            device=device,
            code=cause.code,
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    def _check_evidence(self, key_id: str, pair: Pair, key_type: KeyType) -> None:
        try:
            check_evidence(f'key "{key_id}"', pair.evidence, key_type, self._pool.facts.profile)
        except TokenError as e:
            if key_id not in self._policy.accept_weak_keys:
                raise
            self._log.warning("hsm.key_weak", key_id=key_id, label=pair.label, error=e.message)

    def _public_key(self, key_id: str, pair: Pair) -> tuple[PublicKey, KeyType]:
        state = self._ledger.state
        known, existing = state.keys.get(key_id), state.existing.get(key_id)
        if pair.material is not None:
            public_key = public_key_of(pair.material)
        elif pair.generation == 0 and existing is not None:
            self._log.warning("hsm.public_half_missing", key_id=key_id)
            public_key = parse_spki(existing.spki)
        elif known is not None and known.cka_id == pair.cka_id:
            self._log.warning("hsm.public_half_missing", key_id=key_id)
            public_key = parse_spki(known.spki)
        else:
            raise InvalidInputError("no public key is known for it")
        return public_key, key_type_of(public_key)

    async def prove(self, entry: Entry) -> None:
        """Have the key sign something that can be nothing else, and verify it.

        Raises:
            TokenError: it did not.
        """
        options = SignOptions(default_hash(entry.public_key))
        digest = options.hash.digest(_CHECK + secrets.token_bytes(32))
        item = SignItem(entry.sign_key, digest, options)
        try:
            await self._sign(entry, item)
        except TokenError as e:
            if e.reason != "hsm.key_gone":
                raise
            # A new object may be invisible to workers that were started before it was made.
            self._pool.recycle()
            await self._sign(entry, item)

    async def _sign(self, entry: Entry, item: SignItem) -> None:
        try:
            await self._pool.sign(item)
        except TokenError as e:
            raise e.about_key(entry.key_id, self._pool.facts.device) from e
