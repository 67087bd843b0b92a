"""KeyManager `tpm`: keys are made in a TPM and never leave it.

Each key is a pair of blobs that only this TPM can load, kept in a directory; nothing is stored in
the TPM itself. After TPM2_Clear, or with another TPM, the keys are lost: they are reported and
left out, so that the host makes new ones.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.config.schema import Model, decode, faults
from spire_hw.errors import (
    ConfigError,
    ConfigFault,
    InvalidInputError,
    NotFoundError,
    NotReadyError,
)
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.keymanager import KeyEvidence, KeyInfo, KeySignature
from spire_hw.tpm import keys
from spire_hw.tpm.device import Hierarchy, TpmDevice, load_password, shared
from spire_hw.tpm.info import read_identity
from spire_hw_plugins.keymanager.tpm_store import StoredKey, TpmKeyStore, made_now

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.config.hcl import Body
    from spire_hw.key import KeyType, SignOptions
    from spire_hw.tpm.device import Connection

NAME: Final = "tpm"
_KEYS_FOLDER: Final = "keys-tpm"
# RSA keys take a slow TPM a minute to make, and other jobs may stand in front.
_GENERATE_TIMEOUT_S: Final = 180.0


class Config(Model):
    """The plugin_data.

    Attributes:
        tpm_device_path: device node; the kernel's resource manager when unset.
        tcti: TCTI string instead of a device, such as `swtpm:host=localhost,port=2321`.
        keys_path: directory of the wrapped keys; `keys-tpm` in the data directory when unset.
        owner_auth_path: file with the password of the owner hierarchy, if one is set.
    """

    tpm_device_path: str = ""
    tcti: str = ""
    keys_path: str = ""
    owner_auth_path: str = ""


@dataclass(frozen=True, slots=True)
class _Ready:
    """What a configured plugin works with."""

    device: TpmDevice
    store: TpmKeyStore
    abilities: keys.Abilities


@dataclass(frozen=True, slots=True)
class _Held:
    """A key in use."""

    stored: StoredKey
    info: KeyInfo

    @classmethod
    def of(cls, stored: StoredKey) -> _Held:
        key = stored.blob.parsed.key
        return cls(stored, KeyInfo.of(stored.key_id, stored.key_type, key))


class TpmKeyManager:
    """The KeyManager contract over a TPM; also `TpmKeys` and `KeyEvidenceSource`."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._ready: _Ready | None = None
        self._keys: dict[str, _Held] = {}
        self._generating = asyncio.Lock()

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching the TPM."""
        found = faults(config, Config)
        if found:
            return found
        return _conflicts(decode(config, Config))

    async def configure(self, config: Body) -> None:
        """Open the TPM and read the keys.

        Raises:
            ConfigError: something unknown is set, or device and TCTI both.
            NotReadyError: no TPM, or the key directory cannot be used.
            UnavailableError: the TPM does not answer.
        """
        settings = decode(config, Config)
        if conflicts := _conflicts(settings):
            raise ConfigError(config.file or "configuration", conflicts)
        directory = Path(settings.keys_path or self._host.data_dir / _KEYS_FOLDER)
        password = await asyncio.to_thread(load_password, settings.owner_auth_path)
        await self.open(settings.tcti or settings.tpm_device_path, directory, password)

    async def open(self, tcti: str, directory: Path, owner_password: bytes = b"") -> None:
        """Open the TPM and read the keys; what `configure` does with its settings.

        Args:
            tcti: TCTI or device path; empty for the kernel's resource manager.
            directory: where the wrapped keys are; made when missing.
            owner_password: password of the owner hierarchy.
        """
        device = shared(tcti)
        try:
            if owner_password:
                device.set_password(Hierarchy.OWNER, owner_password)
            store = await asyncio.to_thread(TpmKeyStore, directory)
            abilities = await device.run("read what the TPM can do", keys.read_abilities)
            held = await self._load(device, store)
        except BaseException:
            await device.close()
            raise
        before, self._ready = self._ready, _Ready(device, store, abilities)
        self._keys = held
        if before is not None:
            await before.device.close()
        if self._host.side is Side.SERVER:
            self._host.log.warning(
                "CA keys are in a TPM: a discrete one gives 5 to 60 signatures a second, which "
                "caps how many SVIDs this server can issue"
            )

    async def close(self) -> None:
        """Give the TPM back; the keys stay in their directory."""
        ready, self._ready = self._ready, None
        if ready is not None:
            await ready.device.close()

    async def generate_key(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Make a key; see `KeyManager.generate_key`."""
        ready = self._require("failed to generate key: not configured")
        _check_key_id(key_id)
        if key_type not in ready.abilities.key_types:
            raise InvalidInputError(f"key type {key_type.name} is not supported by this TPM")
        async with self._generating:
            blob, storage_name = await ready.device.run(
                f"make {key_type.name} key",
                lambda c: keys.create_key(c, key_type),
                timeout_s=_GENERATE_TIMEOUT_S,
            )
            serial = 1 + max((k.stored.serial for k in self._keys.values()), default=0)
            stored = made_now(key_id, serial, blob, storage_name, self._host.clock.now())
            await asyncio.to_thread(ready.store.put, stored)
            made = _Held.of(stored)
            self._keys.pop(key_id, None)  # a replaced key moves to the end
            self._keys[key_id] = made
        return made.info

    async def get_public_key(self, key_id: str) -> KeyInfo:
        """Return one key; see `KeyManager.get_public_key`."""
        return self._find(key_id).info

    async def get_public_keys(self) -> list[KeyInfo]:
        """Return all keys, oldest first."""
        self._require("not configured")
        return [held.info for held in self._keys.values()]

    async def sign_data(self, key_id: str, digest: bytes, options: SignOptions) -> KeySignature:
        """Sign a digest; see `KeyManager.sign_data`."""
        held = self._find(key_id)
        ready = self._require("not configured")
        stored = held.stored
        keys.check_sign_options(stored.blob, digest, options)
        if options.hash not in ready.abilities.hashes:
            raise InvalidInputError(f"hash {options.hash.name} is not supported by this TPM")

        def job(connection: Connection) -> bytes:
            return keys.sign(connection, stored.blob, digest, options, stored.storage_name)

        try:
            signature = await ready.device.run(f'sign with key "{key_id}"', job)
        except NotReadyError as e:
            self._drop(held, e)
            raise NotReadyError(f'key "{key_id}": {e.message}') from e
        return KeySignature(signature, held.info.fingerprint)

    def tpm_key_blob(self, key_id: str) -> tuple[bytes, bytes]:
        """Return TPM2B_PUBLIC and TPM2B_PRIVATE bytes; see `TpmKeys`."""
        blob = self._find(key_id).stored.blob
        return blob.public, blob.private

    async def key_evidence(self, key_id: str) -> KeyEvidence:
        """Return where a key lives; see `KeyEvidenceSource`."""
        held = self._find(key_id)
        ready = self._require("not configured")
        about = await ready.device.run("identify the TPM", read_identity)
        parsed = held.stored.blob.parsed
        return KeyEvidence(
            location=f"TPM {about.manufacturer} {about.vendor} at {ready.device.tcti}",
            attributes={
                "name": parsed.name.hex(),
                "attributes": f"0x{parsed.attributes:08x}",
                "storage_name": held.stored.storage_name.hex(),
                "firmware": about.firmware,
                "created_at": held.stored.created_at,
                "exportable": "no: fixedTPM, fixedParent, sensitiveDataOrigin",
            },
        )

    async def _load(self, device: TpmDevice, store: TpmKeyStore) -> dict[str, _Held]:
        """Read the directory; leave out keys of another storage primary."""
        found, complaints = await asyncio.to_thread(store.load)
        for complaint in complaints:
            self._host.log.warning("TPM key file is not usable", reason=complaint)
        lost = await device.run("find storage primary", lambda c: _lost(c, found))
        for key in found:
            if key.storage_name in lost:
                self._host.log.error(
                    "TPM was cleared or replaced: key is lost and must be regenerated",
                    key_id=key.key_id,
                )
        return {key.key_id: _Held.of(key) for key in found if key.storage_name not in lost}

    def _drop(self, held: _Held, error: NotReadyError) -> None:
        key_id = held.info.key_id
        if self._keys.get(key_id) is held:
            del self._keys[key_id]
        self._host.log.error("TPM key is lost", key_id=key_id, reason=error.message)

    def _find(self, key_id: str) -> _Held:
        _check_key_id(key_id)
        self._require("not configured")
        held = self._keys.get(key_id)
        if held is None:
            raise NotFoundError(f'key "{key_id}" not found')
        return held

    def _require(self, otherwise: str) -> _Ready:
        if self._ready is None:
            raise NotReadyError(otherwise)
        return self._ready


def _lost(connection: Connection, found: Sequence[StoredKey]) -> set[bytes]:
    """Return Names of storage primaries this TPM does not have any more."""
    lost = set()
    for key in found:
        connection.remember(key.blob.parsed.name)
    for name in {key.storage_name for key in found}:
        try:
            with keys.storage(connection, name):
                pass
        except NotReadyError:
            lost.add(name)
    return lost


def _conflicts(settings: Config) -> list[ConfigFault]:
    if settings.tcti and settings.tpm_device_path:
        return [ConfigFault(settings.line("tcti"), "set tpm_device_path or tcti, not both")]
    return []


def _check_key_id(key_id: str) -> None:
    if not key_id:
        raise InvalidInputError("key id is required")


def build(host: HostInfo) -> TpmKeyManager:
    """Make the plugin."""
    return TpmKeyManager(host)
