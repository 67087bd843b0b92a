"""What the operator allows a keyring to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spire_hw.key import KeyType
from spire_hw.pkcs11.keyring.budget import DEFAULT_ALLOWANCE, Allowance

if TYPE_CHECKING:
    from spire_hw.pkcs11.keyring.importing import Import


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator allows.

    Attributes:
        key_types: types that may be generated.
        accept_token: serial number of a token that may take the place of the one known so far.
        accept_key_loss: go on without keys that are gone.
        accept_weak_keys: key ids whose attributes need not prove where they were made.
        retain_replaced_s: seconds that replaced generations are kept; 0 destroys them at once.
        imports: keys made elsewhere that are used as they are.
        allowance: how often a key may be made anew.
        max_keys: how many key ids may have a key.
    """

    key_types: frozenset[KeyType] = frozenset(KeyType)
    accept_token: str = ""
    accept_key_loss: bool = False
    accept_weak_keys: frozenset[str] = frozenset()
    retain_replaced_s: float = 0.0
    imports: tuple[Import, ...] = ()
    allowance: Allowance = DEFAULT_ALLOWANCE
    max_keys: int = 64
