"""Public keys parsed once: they verify what a token signed before it leaves us."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import SpireHwError
from spire_hw.key import KeyType, PublicKey, key_type_of, parse_spki, verify_digest, verify_digests
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.keys import signature_of, signatures_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.key import SignOptions
    from spire_hw.pkcs11.wire import SignRun

_MAX_KEYS: Final = 32


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A public key that signatures are verified with.

    Attributes:
        public_key: the key itself.
        key_type: its type.
    """

    public_key: PublicKey
    key_type: KeyType

    def checked(self, digest: bytes, raw: bytes, options: SignOptions) -> bytes | TokenError:
        """Return what may leave: the signature in the contract's format if it holds, else an error.

        Args:
            digest: what was to be signed.
            raw: the token's output, as `spire_hw.pkcs11.keys.signature_of` takes it.
            options: how it was to be signed.
        """
        try:
            signature = signature_of(self.key_type, raw)
            verify_digest(self.public_key, digest, signature, options)
        except SpireHwError as e:
            return TokenError(
                f"sign failed: {e.message}; see to the device: it signs wrongly, or the public half "
                "there is another key's",
                reason="hsm.bad_signature",
                operation="sign",
            )
        return signature

    def all_checked(
        self, digests: Sequence[bytes], raws: Sequence[bytes | TokenError], options: SignOptions
    ) -> list[bytes | TokenError]:
        """Return what may leave of a run; an error stays what it is.

        Args:
            digests: what was to be signed.
            raws: the token's output or an error for each digest.
            options: how all were to be signed.

        Raises:
            ValueError: there are not as many outputs as digests.
        """
        with suppress(SpireHwError):
            # As a rule all hold. Step by step, for all of them: that is quicker than one by one.
            outputs = [raw for raw in raws if isinstance(raw, bytes)]
            if len(outputs) == len(raws):
                signatures = signatures_of(self.key_type, outputs)
                verify_digests(self.public_key, digests, signatures, options)
                return list(signatures)
        return [
            raw if isinstance(raw, TokenError) else self.checked(digest, raw, options)
            for digest, raw in zip(digests, raws, strict=True)
        ]


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
            public_key = parse_spki(spki)
            known = KnownKey(public_key, key_type_of(public_key))
            if len(self._keys) >= _MAX_KEYS:
                self._keys.clear()
            self._keys[spki] = known
        return known


def verified(
    keys: KnownKeys, runs: Sequence[SignRun], raws: Sequence[bytes | TokenError]
) -> list[bytes | TokenError]:
    """Return what may leave: signatures that hold, and errors, in the order of the digests.

    Args:
        keys: where parsed keys are kept.
        runs: what was to be signed.
        raws: a token's output or an error for each digest of the runs.

    Raises:
        InvalidInputError: a key is none of ours.
        ValueError: there are not as many outputs as digests.
    """
    if len(raws) != sum(len(run.digests) for run in runs):
        raise ValueError("not as many outputs as digests")
    results: list[bytes | TokenError] = []
    for run in runs:
        key, begin = keys.get(run.key.spki), len(results)
        some = raws[begin : begin + len(run.digests)]
        results += key.all_checked(run.digests, some, run.options)
    return results
