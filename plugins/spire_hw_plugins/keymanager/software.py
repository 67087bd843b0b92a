"""Keys in this process's memory, with a hook for whoever wants to keep them.

What `memory` and `disk` have in common; no plugin by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.errors import InvalidInputError, NotFoundError, NotReadyError
from spire_hw.key import (
    KeyType,
    PrivateKey,
    SignOptions,
    generate_private_key,
    key_type_of,
    sign_digest,
)
from spire_hw.plugin.custody import Custody
from spire_hw.plugin.keymanager import KeyEvidence, KeyInfo, KeySignature


@dataclass(frozen=True, slots=True)
class SoftwareKey:
    """One key instance: the private key and its public face."""

    private_key: PrivateKey
    info: KeyInfo

    @classmethod
    def of(cls, key_id: str, private_key: PrivateKey) -> SoftwareKey:
        """Build from a private key.

        Raises:
            InvalidInputError: a type the KeyManager contract has no name for.
        """
        public_key = private_key.public_key()
        return cls(private_key, KeyInfo.of(key_id, key_type_of(public_key), public_key))


# Makes a set of keys durable before any caller sees it; raises when it cannot.
Persist = Callable[[Mapping[str, SoftwareKey]], None]


class SoftwareKeys:
    """The four calls of the KeyManager contract over software keys; also `KeyEvidenceSource`."""

    # Nothing stands between a signature and us, so nobody needs to verify it again.
    in_process = True
    # Where the keys are, for an operator's eyes.
    place = "memory of this process"

    def __init__(self, persist: Persist | None = None) -> None:
        self._persist = persist
        self._keys: dict[str, SoftwareKey] | None = None
        self._generating = asyncio.Lock()

    @property
    def is_loaded(self) -> bool:
        """Tell whether `load` was called."""
        return self._keys is not None

    def load(self, keys: Mapping[str, SoftwareKey]) -> None:
        """Take keys over, oldest first, and become usable."""
        self._keys = dict(keys)

    async def generate_key(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Make a key; see `spire_hw.plugin.keymanager.KeyManager.generate_key`."""
        if self._keys is None:
            raise NotReadyError("failed to generate key: not configured")
        check_key_id(key_id)
        async with self._generating:
            private_key = await asyncio.to_thread(generate_private_key, key_type)
            made = SoftwareKey.of(key_id, private_key)
            # A replaced key moves to the end: the list is ordered by age.
            keys = {k: v for k, v in self._keys.items() if k != key_id}
            keys[key_id] = made
            if self._persist is not None:
                await asyncio.to_thread(self._persist, keys)
            self._keys = keys
        return made.info

    async def get_public_key(self, key_id: str) -> KeyInfo:
        """Return one key; see `KeyManager.get_public_key`."""
        return self._find(key_id).info

    async def get_public_keys(self) -> list[KeyInfo]:
        """Return all keys, oldest first."""
        if self._keys is None:
            raise NotReadyError("not configured")
        return [key.info for key in self._keys.values()]

    async def sign_data(self, key_id: str, digest: bytes, options: SignOptions) -> KeySignature:
        """Sign a digest; see `KeyManager.sign_data`."""
        key = self._find(key_id)
        if _is_quick(key.private_key):
            signature = sign_digest(key.private_key, digest, options)
        else:
            signature = await asyncio.to_thread(sign_digest, key.private_key, digest, options)
        return KeySignature(signature, key.info.fingerprint)

    async def key_evidence(self, key_id: str) -> KeyEvidence:
        """Return where a key lives; see `KeyEvidenceSource`."""
        self._find(key_id)
        return KeyEvidence(self.place, {"exportable": "yes: by whoever reads it"}, Custody.SOFTWARE)

    def _find(self, key_id: str) -> SoftwareKey:
        check_key_id(key_id)
        if self._keys is None:
            raise NotReadyError("not configured")
        key = self._keys.get(key_id)
        if key is None:
            raise NotFoundError(f'key "{key_id}" not found')
        return key


def check_key_id(key_id: str) -> None:
    """Refuse an empty key id.

    Raises:
        InvalidInputError: `key id is required`.
    """
    if not key_id:
        raise InvalidInputError("key id is required")


def _is_quick(private_key: PrivateKey) -> bool:
    # P-256 signs in less time than a thread switch takes; the others would hold up the event loop.
    return isinstance(private_key, ec.EllipticCurvePrivateKey) and private_key.key_size <= 256  # noqa: PLR2004
