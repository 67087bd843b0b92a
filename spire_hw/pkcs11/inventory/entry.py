"""A key in use: the caller's name for it, and its place on the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spire_hw.key import spki_der
from spire_hw.pkcs11.wire import SignKey

if TYPE_CHECKING:
    from spire_hw.key import KeyType, PublicKey
    from spire_hw.plugin.keymanager import KeyInfo


@dataclass(frozen=True, slots=True)
class Entry:
    """A key in use.

    Attributes:
        key_id: the caller's id.
        key_type: its type.
        public_key: its public half.
        fingerprint: fingerprint of this instance.
        sign_key: CKA_ID and public key, as workers need them.
        label: CKA_LABEL on the token.
        generation: its generation; 0 for a key made elsewhere.
    """

    key_id: str
    key_type: KeyType
    public_key: PublicKey
    fingerprint: str
    sign_key: SignKey
    label: str
    generation: int

    @property
    def is_existing(self) -> bool:
        """Tell whether somebody else made it: it is used, never replaced nor destroyed."""
        return self.generation == 0

    @classmethod
    def of(cls, info: KeyInfo, cka_id: bytes, label: str, generation: int) -> Entry:
        """Build from the contract's view of a key and its place on the token."""
        sign_key = SignKey(cka_id, spki_der(info.public_key))
        return cls(
            info.key_id,
            info.key_type,
            info.public_key,
            info.fingerprint,
            sign_key,
            label,
            generation,
        )

    @property
    def cka_id(self) -> bytes:
        """Return the CKA_ID on the token."""
        return self.sign_key.cka_id
