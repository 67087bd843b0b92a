"""What the operator allows a keyring to do."""

from __future__ import annotations

from dataclasses import dataclass

from spire_hw.key import KeyType


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
