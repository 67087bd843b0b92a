"""What KeyManager `tpm` has a TPM do: whole jobs, run by the device's worker one after the other."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, NamedTuple

from spire_hw.errors import NotReadyError
from spire_hw.key import HashAlgorithm, SignOptions
from spire_hw.tpm import attest, keys, persistent
from spire_hw.tpm.storage import KeyLostError, storage
from spire_hw_plugins.keymanager.tpm_config import PERSISTENT_COUNT, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.key import KeyType
    from spire_hw.tpm.connection import Connection
    from spire_hw_plugins.keymanager.tpm_store import StoredKey


class Made(NamedTuple):
    """A new key, the Name of the storage primary it is under, its persistent handle."""

    blob: keys.KeyBlob
    storage_name: bytes
    handle: int | None


def make(connection: Connection, key_type: KeyType, settings: Settings) -> Made:
    """Make a key, and keep it in the TPM too where that is wanted.

    Raises:
        NotReadyError: no persistent handle is free.
        TpmError: the TPM refused.
    """
    blob, name = keys.create_key(
        connection, key_type, binding=settings.binding, salted=settings.salted
    )
    return Made(blob, name, _persist(connection, blob, name, settings))


def take_back(
    connection: Connection, stored: StoredKey, use: keys.KeyUse, settings: Settings
) -> int | None:
    """Show that a key that was kept still signs; return its new persistent handle.

    Raises:
        KeyLostError: this TPM cannot load it.
        NotReadyError: the PCRs keep it from signing, or no persistent handle is free.
        SpireHwError: what it signs does not verify, or the TPM refused.
    """
    connection.remember(stored.name)
    digest, options = secrets.token_bytes(32), SignOptions(HashAlgorithm.SHA256)
    keys.sign(connection, stored.blob, digest, options, use)
    return _persist(connection, stored.blob, stored.storage_name, settings)


def vouch(
    connection: Connection, stored: StoredKey, challenge: bytes, use: keys.KeyUse
) -> tuple[attest.AttestationKey, attest.SignedAttest]:
    """Have the attestation key certify a key, its creation too where the proof of that was kept."""
    ak = attest.create_attestation_key(connection)
    proof = stored.blob.creation
    if proof is None:
        return ak, attest.certify(connection, stored.blob, challenge)
    return ak, attest.certify_creation(connection, stored.blob, proof, challenge, use)


def find_lost(connection: Connection, found: Sequence[StoredKey]) -> dict[str, str]:
    """Return ids of the keys this TPM cannot use any more, and why."""
    gone = set()
    for key in found:
        connection.remember(key.name)
    for name in {key.storage_name for key in found}:
        try:
            with storage(connection, name):
                pass
        except KeyLostError:
            gone.add(name)
    lost = {}
    for key in found:
        if key.storage_name in gone:
            lost[key.key_id] = "TPM was cleared or replaced: key is lost and must be regenerated"
        elif _is_out_of_policy(connection, key):
            lost[key.key_id] = (
                "PCRs have other values than those the key is bound to: it must be regenerated"
            )
    return lost


def _is_out_of_policy(connection: Connection, key: StoredKey) -> bool:
    binding = key.binding
    if binding is None or binding.authority is not None:
        return False
    return keys.present_policy(connection, binding) != key.blob.parsed.auth_policy


def _persist(
    connection: Connection, blob: keys.KeyBlob, storage_name: bytes, settings: Settings
) -> int | None:
    if settings.first_handle is None:
        return None
    handle = _free_handle(connection, settings.first_handle)
    use = keys.KeyUse(storage_name, salted=settings.salted)
    with keys.loaded_key(connection, blob, use) as key:
        persistent.persist(connection, key, handle)
    return handle


def _free_handle(connection: Connection, first: int) -> int:
    taken = persistent.persistent_names(connection, first, PERSISTENT_COUNT)
    for handle in range(first, first + PERSISTENT_COUNT):
        if handle not in taken:
            return handle
    raise NotReadyError(
        f"all persistent handles from 0x{first:08x} to 0x{first + PERSISTENT_COUNT - 1:08x} are "
        "taken: free what nobody needs with tpm2_evictcontrol, or choose another range"
    )
