"""KeyManager `tpm`: keys are made in a TPM and never leave it.

Each key is a pair of blobs that only this TPM can load, kept in a directory; on request it is kept
under a persistent handle as well, bound to PCR values, and used under protected sessions, and kept
for a while when it was replaced. After TPM2_Clear, with another TPM, or where a key is bound to values
the PCRs do not have any more, the key is lost: it is reported and left out, so that the host makes a
new one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import InvalidInputError, NotFoundError, NotReadyError, SpireHwError
from spire_hw.plugin.custody import Custody, DeviceStatement
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.keymanager import KeyEvidence, KeyInfo, KeySignature
from spire_hw.tpm import keys, persistent
from spire_hw.tpm.connection import Hierarchy
from spire_hw.tpm.device import TpmDevice, load_password, shared
from spire_hw.tpm.info import read_identity
from spire_hw.tpm.storage import KeyLostError
from spire_hw_plugins.keymanager import tpm_jobs
from spire_hw_plugins.keymanager.tpm_config import (
    PERSISTENT_COUNT,
    Settings,
    build_settings,
    find_faults,
    load_approvals,
    read_config,
)
from spire_hw_plugins.keymanager.tpm_retention import TpmRetention, info_of
from spire_hw_plugins.keymanager.tpm_store import KeyFile, StoredKey, TpmKeyStore

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault
    from spire_hw.key import KeyType, SignOptions
    from spire_hw.plugin.keymanager import RetainedKey
    from spire_hw.tpm.connection import Connection
    from spire_hw.tpm.pcrpolicy import Approval

NAME: Final = "tpm"
# RSA keys take a slow TPM a minute to make, and other jobs may stand in front.
_GENERATE_TIMEOUT_S: Final = 180.0


@dataclass(frozen=True, slots=True)
class _Ready:
    """What a configured plugin works with."""

    settings: Settings
    device: TpmDevice
    kept: TpmRetention
    abilities: keys.Abilities
    tasks: Tasks

    async def close(self) -> None:
        """Give the TPM back."""
        await self.tasks.close()
        await self.device.close()


@dataclass(frozen=True, slots=True)
class _Held:
    """A key in use."""

    stored: StoredKey
    info: KeyInfo

    @classmethod
    def of(cls, stored: StoredKey) -> _Held:
        return cls(stored, info_of(stored))


class TpmKeyManager:
    """The KeyManager contract over a TPM.

    Also offers `TpmKeys`, `KeyEvidenceSource`, `KeyStatementSource` and `KeyRetention`.
    """

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._ready: _Ready | None = None
        self._keys: dict[str, _Held] = {}
        self._turn = asyncio.Lock()
        self._complaints: set[str] = set()

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching the TPM."""
        return find_faults(config)

    async def configure(self, config: Body) -> None:
        """Open the TPM and read the keys.

        Raises:
            ConfigError: the configuration has faults.
            NotReadyError: no TPM, a file cannot be read, or the key directory cannot be used.
            InvalidInputError: a file holds something else, or a PCR bank is not active.
            UnavailableError: the TPM does not answer.
        """
        raw = read_config(config)
        settings = await asyncio.to_thread(build_settings, raw, self._host.data_dir)
        password = await asyncio.to_thread(load_password, raw.owner_auth_path)
        await self.open(settings, password)

    async def open(self, settings: Settings, owner_password: bytes = b"") -> None:
        """Open the TPM and read the keys; what `configure` does with its settings.

        Args:
            settings: which TPM, which directory, how keys are made and used.
            owner_password: password of the owner hierarchy.
        """
        device = shared(settings.tcti)
        try:
            if owner_password:
                device.set_password(Hierarchy.OWNER, owner_password)
            store = await asyncio.to_thread(TpmKeyStore, settings.directory)
            abilities = await device.run("read what the TPM can do", keys.read_abilities)
            binding = settings.binding
            if binding is not None:
                await device.run("try the policy", lambda c: keys.check_binding(c, binding))
            async with self._turn:
                files, held = await self._load(device, store)
                kept = TpmRetention(
                    store,
                    files,
                    keep_s=settings.keep_s,
                    turn=self._turn,
                    clock=self._host.clock,
                    log=self._host.log,
                )
                await self._warn_of_leftovers(settings, device, (f.current for f in files))
                ready = _Ready(settings, device, kept, abilities, Tasks(self._on_task_failure))
                before, self._ready = self._ready, ready
                self._keys = held
                if before is not None:
                    # What it knows of the files is old from now on.
                    await before.tasks.close()
        except BaseException:
            await device.close()
            raise
        ready.tasks.start("remove replaced TPM keys", kept.run())
        if before is not None:
            await before.close()
        if self._host.side is Side.SERVER:
            self._host.log.warning(
                "CA keys are in a TPM: a discrete one gives 5 to 60 signatures a second, which "
                "caps how many SVIDs this server can issue"
            )

    async def close(self) -> None:
        """Give the TPM back; the keys stay where they are."""
        ready, self._ready = self._ready, None
        if ready is not None:
            await ready.close()

    async def generate_key(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Make a key; see `KeyManager.generate_key`."""
        self._require("failed to generate key: not configured")
        _check_key_id(key_id)
        async with self._turn:
            ready = self._require("failed to generate key: not configured")
            if key_type not in ready.abilities.key_types:
                raise InvalidInputError(f"key type {key_type.name} is not supported by this TPM")
            stored = await self._make(ready, key_id, key_type)
            await self._replace(ready, stored)
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
        use = await self._use(ready, stored)

        def job(connection: Connection) -> bytes:
            return keys.sign(connection, stored.blob, digest, options, use)

        try:
            signature = await ready.device.run(f'sign with key "{key_id}"', job)
        except KeyLostError as e:
            self._drop(held, e)
            raise NotReadyError(f'key "{key_id}": {e.message}') from e
        return KeySignature(signature, held.info.fingerprint)

    def tpm_key_blob(self, key_id: str) -> tuple[bytes, bytes]:
        """Return TPM2B_PUBLIC and TPM2B_PRIVATE bytes; see `TpmKeys`."""
        blob = self._find(key_id).stored.blob
        return blob.public, blob.private

    async def key_evidence(self, key_id: str) -> KeyEvidence:
        """Return where a key lives; see `KeyEvidenceSource`."""
        stored = self._find(key_id).stored
        ready = self._require("not configured")
        about = await ready.device.run("identify the TPM", read_identity)
        attributes = {
            "name": stored.name.hex(),
            "attributes": f"0x{stored.blob.parsed.attributes:08x}",
            "storage_name": stored.storage_name.hex(),
            "firmware": about.firmware,
            "created_at": stored.created_at,
            "exportable": "no: fixedTPM, fixedParent, sensitiveDataOrigin",
        }
        if stored.handle is not None:
            attributes["handle"] = f"0x{stored.handle:08x}"
        if stored.binding is not None:
            attributes["policy"] = stored.blob.parsed.auth_policy.hex()
        where = f"TPM {about.manufacturer} {about.vendor} at {ready.device.tcti}"
        return KeyEvidence(
            location=where,
            attributes=attributes,
            custody=Custody.TPM_CERTIFIED,
            device=f"{about.manufacturer} {about.vendor} {about.firmware}",
            token=ready.device.tcti,
            generation=stored.generation,
            created=datetime.fromisoformat(stored.created_at),
        )

    async def key_statement(self, key_id: str, challenge: bytes) -> DeviceStatement:
        """Have the TPM vouch for a key; see `KeyStatementSource`.

        Parts: `ak_public`, `ak_creation_data`, `ak_attest`, `ak_signature`, `key_public`, `attest`,
        `signature`; with proof of creation `creation_data` besides.
        """
        stored = self._find(key_id).stored
        ready = self._require("not configured")
        proof = stored.blob.creation
        use = keys.KeyUse(stored.storage_name, stored.handle, salted=ready.settings.salted)

        ak, signed = await ready.device.run(
            f'vouch for key "{key_id}"', lambda c: tpm_jobs.vouch(c, stored, challenge, use)
        )
        parts = {
            "ak_public": ak.public,
            "ak_creation_data": ak.creation_data,
            "ak_attest": ak.creation_attest,
            "ak_signature": ak.creation_signature,
            "key_public": stored.blob.public[2:],
            "attest": signed.attest,
            "signature": signed.signature,
        }
        if proof is None:
            return DeviceStatement("tpm2-certify", parts)
        return DeviceStatement("tpm2-certify-creation", {**parts, "creation_data": proof.data})

    async def retained_keys(self) -> list[RetainedKey]:
        """Return the replaced keys that are kept, oldest first."""
        return self._require("not configured").kept.list()

    async def restore_key(self, key_id: str, generation: int) -> KeyInfo:
        """Make a replaced key current again; see `KeyRetention.restore_key`.

        Raises:
            NotReadyError: the key signs nothing any more, or not as the PCRs are now.
        """
        self._require("not configured")
        _check_key_id(key_id)
        async with self._turn:
            ready = self._require("not configured")
            stored = ready.kept.find(key_id, generation).key
            use = await self._use(ready, stored)
            try:
                handle = await ready.device.run(
                    f'take back key "{key_id}"',
                    lambda c: tpm_jobs.take_back(c, stored, use, ready.settings),
                )
            except KeyLostError as e:
                raise NotReadyError(
                    f'generation {generation} of key "{key_id}": {e.message}'
                ) from e
            stored = replace(stored, handle=handle)
            await self._replace(ready, stored)
            held = _Held.of(stored)
            found = {**self._keys, key_id: held}
            self._keys = dict(sorted(found.items(), key=lambda item: item[1].stored.serial))
        self._host.log.info(
            "A replaced TPM key was taken back",
            key_id=key_id,
            generation=generation,
            fp=held.info.fingerprint,
        )
        return held.info

    async def destroy_retained(self, key_id: str, generation: int) -> None:
        """Remove a replaced key before its time; see `KeyRetention.destroy_retained`."""
        async with self._turn:
            await self._require("not configured").kept.destroy(key_id, generation)

    async def _make(self, ready: _Ready, key_id: str, key_type: KeyType) -> StoredKey:
        generation = ready.kept.next_generation(key_id)
        made = await ready.device.run(
            f"make {key_type.name} key",
            lambda c: tpm_jobs.make(c, key_type, ready.settings),
            timeout_s=_GENERATE_TIMEOUT_S,
        )
        return StoredKey(
            key_id=key_id,
            serial=ready.kept.next_serial,
            blob=made.blob,
            storage_name=made.storage_name,
            created_at=self._host.clock.now().isoformat(timespec="seconds"),
            generation=generation,
            handle=made.handle,
            binding=ready.settings.binding,
        )

    async def _replace(self, ready: _Ready, stored: StoredKey) -> None:
        """Have a key stand in its file; what took a persistent handle for nothing gives it back."""
        try:
            old = await ready.kept.replace(stored)
        except BaseException:
            if stored.handle is not None:
                await self._evict(ready, stored, stored.handle)
            raise
        if old is not None and old.handle is not None:
            await self._evict(ready, old, old.handle)

    async def _evict(self, ready: _Ready, stored: StoredKey, handle: int) -> None:
        """Free a persistent handle; a key that stays is told at the next start."""
        try:
            await ready.device.run(
                "remove a replaced key", lambda c: persistent.evict(c, handle, stored.name)
            )
        except SpireHwError as e:
            self._host.log.warning(
                "A key that is not needed any more stays in the TPM",
                handle=f"0x{handle:08x}",
                error=e.message,
            )

    async def _use(self, ready: _Ready, stored: StoredKey) -> keys.KeyUse:
        return keys.KeyUse(
            stored.storage_name,
            stored.handle,
            stored.binding,
            await self._approvals(ready, stored),
            ready.settings.salted,
        )

    async def _approvals(self, ready: _Ready, stored: StoredKey) -> tuple[Approval, ...]:
        """Return the approvals there are now for a key that needs one."""
        if stored.binding is None or stored.binding.authority is None:
            return ()
        found, complaints = await asyncio.to_thread(load_approvals, ready.settings.approvals)
        for complaint in complaints:
            if complaint not in self._complaints:
                self._host.log.warning("Approval is not usable", reason=complaint)
        self._complaints = set(complaints)
        return tuple(found)

    async def _load(
        self, device: TpmDevice, store: TpmKeyStore
    ) -> tuple[list[KeyFile], dict[str, _Held]]:
        """Read the directory; return what there is, and the keys that can be used."""
        files, complaints = await asyncio.to_thread(store.load)
        for complaint in complaints:
            self._host.log.warning("TPM key file is not usable", reason=complaint)
        found = [file.current for file in files]
        lost = await device.run("find storage primary", lambda c: tpm_jobs.find_lost(c, found))
        for key_id, reason in lost.items():
            self._host.log.error(reason, key_id=key_id)
        return files, {k.key_id: _Held.of(k) for k in found if k.key_id not in lost}

    async def _warn_of_leftovers(
        self, settings: Settings, device: TpmDevice, stored: Iterable[StoredKey]
    ) -> None:
        first = settings.first_handle
        if first is None:
            return
        present = await device.run(
            "list persistent keys",
            lambda c: persistent.persistent_names(c, first, PERSISTENT_COUNT),
        )
        ours = {key.handle: key.name for key in stored}
        for handle, name in present.items():
            if ours.get(handle) != name:
                self._host.log.warning(
                    "A persistent handle of our range holds a key of no file: another program's, "
                    "or left by a crash; if nobody needs it, free it with tpm2_evictcontrol",
                    handle=f"0x{handle:08x}",
                )

    def _on_task_failure(self, name: str, error: BaseException) -> None:
        self._host.log.error("A task of KeyManager tpm failed", task=name, error=repr(error))

    def _drop(self, held: _Held, error: KeyLostError) -> None:
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


def _check_key_id(key_id: str) -> None:
    if not key_id:
        raise InvalidInputError("key id is required")


def build(host: HostInfo) -> TpmKeyManager:
    """Make the plugin."""
    return TpmKeyManager(host)
