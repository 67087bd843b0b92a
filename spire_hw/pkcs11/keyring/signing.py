"""Signing with the key that is current under an id, and noticing keys that went wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.keyring.fitness import check_pss, mechanism_text
from spire_hw.pkcs11.keys import check_request, sign_scheme
from spire_hw.pkcs11.remedies import SIGN
from spire_hw.pkcs11.wire import SignItem
from spire_hw.plugin.keymanager import KeySignature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from spire_hw.clock import Clock
    from spire_hw.key import SignOptions
    from spire_hw.log import Logger
    from spire_hw.pkcs11.inventory.entry import Entry
    from spire_hw.pkcs11.keyring.refusals import Refusals
    from spire_hw.pkcs11.keyring.stock import Stock
    from spire_hw.pkcs11.pool.pool import Pool

# What a token says of a key that it will not sign with, and what there is to do.
_UNFIT: Final = {
    "hsm.mechanism_invalid": "CKR_MECHANISM_INVALID (0x70); see to its configuration or firmware",
    "hsm.key_type_inconsistent": "CKR_KEY_TYPE_INCONSISTENT (0x63); it is another kind of key there: "
    "look at it with the token's own tool",
    "hsm.key_function_not_permitted": "CKR_KEY_FUNCTION_NOT_PERMITTED (0x68), key no longer permits "
    "signing; somebody changed CKA_SIGN: give it back",
    "hsm.key_not_permitted": "key no longer permits signing; somebody changed CKA_SIGN: give it back",
}
_GONE: Final = "hsm.key_gone"
_VANISHED_S: Final = 30.0
_REPLACED: Final = 4  # times a key may be replaced under one signature
_QUARANTINE_AFTER: Final = 2


class Signing:
    """Signs over a pool.

    Args:
        get: the entry that is current under a key id.
        refusals: told of signatures that the token refuses.
    """

    def __init__(
        self,
        pool: Pool,
        stock: Stock,
        get: Callable[[str], Entry],
        refusals: Refusals,
        *,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._pool = pool
        self._stock = stock
        self._get = get
        self._refusals = refusals
        self._clock = clock
        self._log = log
        self._bad_signatures: dict[bytes, int] = {}
        self._vanished: dict[bytes, float] = {}

    async def sign(self, key_id: str, digest: bytes, options: SignOptions) -> KeySignature:
        """Sign a digest; see `spire_hw.plugin.keymanager.KeyManager.sign_data`."""
        entry = self._get(key_id)
        for _ in range(_REPLACED):
            try:
                return await self._sign_with(entry, digest, options)
            except TokenError as e:
                if e.reason != _GONE:
                    raise
            # Replaced while the signature was under way, or invisible to a worker: the fingerprint
            # of whatever signs now tells the caller which.
            current = self._get(key_id)
            if current is entry:
                await self._look_for(entry)
            entry = current
        return await self._sign_with(entry, digest, options)

    def unusable(self, entries: Iterable[Entry]) -> list[TokenError]:
        """Return what is wrong with those keys of which it is known that they do not sign."""
        wrong = []
        for entry in entries:
            try:
                self._check_health(entry)
            except TokenError as e:
                wrong.append(e)
            else:
                # It is asked all the same: the first signature that it makes ends this.
                refusal = self._refusals.of(entry)
                wrong += [] if refusal is None else [refusal]
        return wrong

    def is_gone(self, entry: Entry) -> bool:
        """Tell whether a key that was to sign was looked for and not found on the token."""
        return entry.cka_id in self._vanished

    def gone(self, entry: Entry) -> TokenError:
        """Return the error that says a key is no longer on the token."""
        return TokenError(
            f'key "{entry.key_id}" ({entry.fingerprint}) vanished from token '
            f"{self._pool.facts.device}; bring it back, or set accept_key_loss to start without it",
            reason="hsm.key_vanished",
            operation="find key",
            device=self._pool.facts.device,
        )

    async def _sign_with(self, entry: Entry, digest: bytes, options: SignOptions) -> KeySignature:
        self._check_health(entry)
        check_request(entry.key_type, digest, options)
        if options.pss:
            check_pss(options, self._pool.facts)
        try:
            signature = await self._pool.sign(SignItem(entry.sign_key, digest, options))
        except TokenError as e:
            raise self._failed(entry, options, e) from e
        if self._refusals.standing:
            self._refusals.standing.pop(entry.cka_id, None)
        return KeySignature(signature, entry.fingerprint)

    def _failed(self, entry: Entry, options: SignOptions, cause: TokenError) -> SpireHwError:
        """Return what the caller is told; the log is, too, unless the pool did or it is no fault."""
        if options.pss and cause.reason == "hsm.mechanism_param_invalid":
            return InvalidInputError(f"salt length {options.salt_length} not supported by token")
        if cause.reason in _UNFIT:
            error = self._unfit(entry, options, cause)
        else:
            error = cause.about_key(entry.key_id, self._pool.facts.device)
        if cause.reason == "hsm.bad_signature":
            self._bad_signatures[entry.cka_id] = self._bad_signatures.get(entry.cka_id, 0) + 1
            self._refusals.tell(entry.key_id, SIGN, error, fp=entry.fingerprint)
        elif not cause.retryable and cause.reason != _GONE:
            self._refusals.add(entry, error)
        return error

    def _unfit(self, entry: Entry, options: SignOptions, cause: TokenError) -> TokenError:
        mechanism = mechanism_text([sign_scheme(entry.key_type, options).mechanism])
        message = (
            f'token {self._pool.facts.device} refuses {mechanism} for key "{entry.key_id}": '
            f"{_UNFIT[cause.reason]}"
        )
        return TokenError(
            message,
            reason=cause.reason,
            operation="sign",
            device=self._pool.facts.device,
            code=cause.code,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    def _check_health(self, entry: Entry) -> None:
        if not self._bad_signatures and not self._vanished:
            return
        if self._bad_signatures.get(entry.cka_id, 0) >= _QUARANTINE_AFTER:
            raise TokenError(
                f'key "{entry.key_id}" is quarantined: its signatures did not verify; see to the '
                "device, then restart or have the configuration read again",
                reason="hsm.key_quarantined",
                operation="sign",
                device=self._pool.facts.device,
            )
        if self._vanished.get(entry.cka_id, 0.0) > self._clock.monotonic():
            raise self.gone(entry)

    async def _look_for(self, entry: Entry) -> None:
        if (await self._stock.take()).pair(entry.cka_id) is None:
            self._vanished[entry.cka_id] = self._clock.monotonic() + _VANISHED_S
            self._log.error("hsm.key_vanished", key_id=entry.key_id, fp=entry.fingerprint)
            raise self.gone(entry)
        self._pool.recycle()
