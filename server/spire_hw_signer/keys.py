"""The keys of each owner: one KeyManager instance and its notes for each, and one for the log key.

Policy decides whose keys a client uses; no name that a client sends reaches a device but a key id
that was checked. How a KeyManager is made is told by the composition root.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from spire_hw.errors import ErrorKind, NotFoundError, SpireHwError, UnavailableError
from spire_hw.key import KeyType, SignOptions, spki_der, verify_digest
from spire_hw.plugin.keymanager import DeviceHealth, KeyHealth, KeyHealthSource
from spire_hw.spiffeid import TrustDomain
from spire_hw_signer.notes import FILE_NAME, Notes
from spire_hw_signer.policy import Custody, Owner
from spire_hw_signer.policyfile import OWN_TRUST_DOMAIN
from spire_hw_signer.purpose import SigningKey
from spire_hw_signer.tokenpurpose import KeyIds

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.key import PublicKey
    from spire_hw.plugin.keymanager import KeyInfo, KeyManager, KeySignature

LOG_KEY_ID: Final = "audit-log"
_WELL: Final = DeviceHealth(KeyHealth.GOOD)


class Opened(Protocol):
    """A KeyManager that was made ready."""

    @property
    def manager(self) -> KeyManager:
        """Return it."""
        ...

    async def use(self, custody: Custody) -> None:
        """Have it go by this from now on."""
        ...

    async def close(self) -> None:
        """Close it."""
        ...


class Opener(Protocol):
    """Makes KeyManagers."""

    async def __call__(self, owner: Owner, directory: Path, custody: Custody) -> Opened:
        """Make the KeyManager of an owner ready.

        Args:
            owner: whose keys.
            directory: for their state alone.
            custody: what policy says of them.

        Raises:
            SpireHwError: it cannot be made ready.
        """
        ...


@dataclass(frozen=True, slots=True)
class HeldKey:
    """A current key.

    Attributes:
        info: as its KeyManager has it.
        signing: the same for what it signs.
        generation: how many were made under its id, 0 when that is not known.
    """

    info: KeyInfo
    signing: SigningKey
    generation: int


class OwnerKeys:
    """The keys of one owner."""

    def __init__(self, owner: Owner, opened: Opened, notes: Notes) -> None:
        self.owner = owner
        self.notes = notes
        self.kids = KeyIds()
        self.changing = asyncio.Lock()
        self._opened = opened
        self._verifies = bool(getattr(opened.manager, "verifies", False))
        self._held: dict[str, HeldKey] = {}
        self._changes = 0

    @property
    def manager(self) -> KeyManager:
        """Return the KeyManager, for the operator's commands."""
        return self._opened.manager

    def find(self, key_id: str) -> HeldKey | None:
        """Return a current key, None when there is none under the id."""
        return self._held.get(key_id)

    async def refresh(self) -> list[HeldKey]:
        """Ask the device which keys there are, oldest first.

        Raises:
            SpireHwError: it is away, or shows fewer than there have to be.
        """
        while True:
            changes = self._changes
            infos = await self.manager.get_public_keys()
            if changes == self._changes:
                break
            # A key was made while the device was asked: what it answered may be from before.
        self._held = {info.key_id: self._hold(info) for info in infos}
        return list(self._held.values())

    async def generate(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Have a key made, or the next generation of one; `take` makes it the one that is used.

        Raises:
            SpireHwError: what the device says.
        """
        info = await self.manager.generate_key(key_id, key_type)
        if info.key_id != key_id or info.key_type is not key_type:
            raise SpireHwError(f'asked for key "{key_id}", got "{info.key_id}"')
        return info

    def take(self, info: KeyInfo) -> HeldKey:
        """Use this key for its id from now on."""
        self._changes += 1
        held = self._held[info.key_id] = self._hold(info)
        return held

    async def sign(self, held: HeldKey, digest: bytes, options: SignOptions) -> KeySignature:
        """Sign with a key that was found; its signature is verified.

        Raises:
            SpireHwError: what the device says; FAILED_PRECONDITION when the key was replaced.
        """
        made = await self.manager.sign_data(held.info.key_id, digest, options)
        if made.fingerprint != held.info.fingerprint:
            raise SpireHwError(
                f'key "{held.info.key_id}" was replaced while it was to sign',
                kind=ErrorKind.FAILED_PRECONDITION,
            )
        if not self._verifies:
            verify_digest(held.info.public_key, digest, made.signature, options)
        return made

    async def use(self, custody: Custody) -> None:
        """Go by this custody from now on.

        Raises:
            SpireHwError: the device does not take it; what was set before stays.
        """
        async with self.changing:
            await self._opened.use(custody)
            await self.refresh()

    def health(self) -> DeviceHealth:
        """Return how the device was when it was last seen."""
        manager = self.manager
        return manager.key_health() if isinstance(manager, KeyHealthSource) else _WELL

    async def close(self) -> None:
        """Let go of the device."""
        await self._opened.close()

    def _hold(self, info: KeyInfo) -> HeldKey:
        known = self._held.get(info.key_id)
        if known is not None and known.info.fingerprint == info.fingerprint:
            signing = known.signing
        else:
            signing = SigningKey.of(info.key_type, spki_der(info.public_key))
        return HeldKey(info, signing, self.notes.generation(info.key_id, info.fingerprint))


class HeldSigner:
    """A `Signer` over a key that is there; its signatures are verified.

    Raises:
        NotFoundError: it is not.
    """

    def __init__(self, keys: OwnerKeys, key_id: str) -> None:
        held = keys.find(key_id)
        if held is None:
            raise NotFoundError(f'{keys.owner} has no key "{key_id}"')
        self._keys = keys
        self._held = held

    @property
    def public_key(self) -> PublicKey:
        """Return the public half."""
        return self._held.info.public_key

    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        """Sign a digest; see `spire_hw.key.Signer.sign`."""
        return (await self._keys.sign(self._held, digest, options)).signature


def own_owner(name: str) -> Owner:
    """Return the owner of a signer's own keys, such as that of its audit log."""
    return Owner(TrustDomain(OWN_TRUST_DOMAIN), name)


def owner_directory(data_dir: Path, owner: Owner) -> Path:
    """Return where the state of an owner's keys is kept."""
    return data_dir / "owners" / f"{owner.trust_domain.name}@{owner.server}"


async def open_owner(
    owner: Owner,
    data_dir: Path,
    custody: Custody,
    opener: Opener,
) -> OwnerKeys:
    """Open the keys of an owner.

    Args:
        owner: whose keys.
        data_dir: of the signer.
        custody: what policy says of them.
        opener: makes the KeyManager ready, with a directory of its own.

    Raises:
        SpireHwError: the device or the notes cannot be used.
    """
    directory = owner_directory(data_dir, owner)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise UnavailableError(f"directory {directory} cannot be made: {e.strerror}") from e
    notes = Notes(directory / FILE_NAME)
    await notes.load()
    keys = OwnerKeys(owner, await opener(owner, directory, custody), notes)
    try:
        await keys.refresh()
    except BaseException:
        await keys.close()
        raise
    return keys
