"""Public keys as a worker knows them: they verify what the token signed before it leaves.

A key that signs much gets a table that verifies faster, see `spire_hw.pkcs11.p256`.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.errors import NotReadyError, SpireHwError
from spire_hw.key import KeyType, PublicKey, key_type_of, parse_spki, verify_digest
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.keys import signature_of
from spire_hw.pkcs11.p256 import P256Verifier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.pkcs11.wire import SignRun

_MAX_KEYS: Final = 32
# The price of a table in verifications: waiting this long costs at most twice the best choice.
_TABLE_AFTER: Final = 500


class KnownKey:
    """A public key that signatures are verified with.

    Attributes:
        public_key: the key itself.
        key_type: its type.
    """

    def __init__(self, public_key: PublicKey) -> None:
        self.key_type: KeyType = key_type_of(public_key)
        self.public_key = public_key
        self._quick: P256Verifier | None = None
        self._until_quick = _TABLE_AFTER

    @property
    def is_quick(self) -> bool:
        """Tell whether verifying takes less than handing it to another thread."""
        return self._quick is not None

    def verified(
        self, run: SignRun, raws: Sequence[bytes | TokenError], *, quickly: bool
    ) -> list[bytes | TokenError]:
        """Return what may leave: signatures that hold, in the contract's format, and errors.

        Args:
            run: what was asked for.
            raws: the token's outputs, in the same order.
            quickly: use the table if there is one; for one thread only.
        """
        held = [False] * len(raws)
        if quickly and self._quick is not None:
            outputs = [raw if isinstance(raw, bytes) else b"" for raw in raws]
            held = self._quick.holds(run.digests, outputs)
        return [
            raw if isinstance(raw, TokenError) else self._checked(run, digest, raw, holds=holds)
            for digest, raw, holds in zip(run.digests, raws, held, strict=True)
        ]

    def _checked(
        self, run: SignRun, digest: bytes, raw: bytes, *, holds: bool
    ) -> bytes | TokenError:
        try:
            signature = signature_of(self.key_type, raw)
            if not holds:
                # The quick way can only say yes; what it does not accept is judged here.
                self._until_quick -= 1
                verify_digest(self.public_key, digest, signature, run.options)
        except SpireHwError as e:
            return TokenError(e.message, reason="hsm.bad_signature", operation="sign")
        return signature

    def speed_up(self) -> None:
        """Make a table once the key has signed so much that it pays."""
        if self._until_quick > 0 or self._quick is not None:
            return
        self._until_quick = _TABLE_AFTER
        key = self.public_key
        if self.key_type is KeyType.EC_P256 and isinstance(key, ec.EllipticCurvePublicKey):
            with suppress(NotReadyError):
                self._quick = P256Verifier(key)


class KnownKeys:
    """Public keys parsed once."""

    def __init__(self) -> None:
        self._keys: dict[bytes, KnownKey] = {}

    def get(self, spki: bytes) -> KnownKey:
        """Return a key.

        Raises:
            InvalidInputError: it is none of ours.
        """
        known = self._keys.get(spki)
        if known is None:
            known = KnownKey(parse_spki(spki))
            if len(self._keys) >= _MAX_KEYS:
                self._keys.clear()
            self._keys[spki] = known
        return known


@dataclass(frozen=True, slots=True)
class Signed:
    """What the token made of one run.

    Attributes:
        run: what was asked for.
        key: the key to verify it with, None when the token was not asked.
        raws: the token's output or an error for each digest.
    """

    run: SignRun
    key: KnownKey | None
    raws: list[bytes | TokenError]

    @classmethod
    def refused(cls, run: SignRun, error: TokenError) -> Signed:
        """Return a run of which nothing was signed."""
        return cls(run, None, [error] * len(run.digests))

    @property
    def is_quick(self) -> bool:
        """Tell whether `results` takes next to no time when it is got quickly."""
        return self.key is None or self.key.is_quick

    def results(self, *, quickly: bool) -> list[bytes | TokenError]:
        """Return what may leave, see `KnownKey.verified`."""
        if self.key is None:
            return self.raws
        return self.key.verified(self.run, self.raws, quickly=quickly)

    def afterwards(self) -> None:
        """Do what makes the next run faster; may take a while."""
        if self.key is not None:
            self.key.speed_up()
