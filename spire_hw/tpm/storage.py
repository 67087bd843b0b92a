"""Primary keys, and the storage key that other keys are wrapped by.

All functions are parts of a job: they take a `Connection` and run in the device's thread. Nothing
is stored in the TPM: the storage key comes from the owner's seed each time, unless the platform
keeps the same one under a persistent handle.

Spec: TCG TPM v2.0 Provisioning Guidance, "Storage Root Key"; TCG EK Credential Profile, Annex B.
"""

from __future__ import annotations

import contextlib
import struct
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE, TPMA_SESSION
from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMT_SYM_DEF

from spire_hw.errors import NotReadyError
from spire_hw.tpm import wire
from spire_hw.tpm.connection import PERSISTENT_HANDLES, Hierarchy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.tpm.connection import Connection

# restricted decrypt, fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA.
_ATTRIBUTES: Final = 0x00030472
_NULL: Final = struct.pack(">H", wire.ALG_NULL)
_AES_128_CFB: Final = struct.pack(">HHH", wire.ALG_AES, 128, wire.ALG_CFB)
_EMPTY: Final = struct.pack(">H", 0)
_HANDLES: Final = (0x81000001, 0x81000002)


def _template(kind: int, parameters: bytes, unique: bytes) -> bytes:
    head = struct.pack(">HHI", kind, wire.ALG_SHA256, _ATTRIBUTES) + _EMPTY
    return head + _AES_128_CFB + _NULL + parameters + unique


class StorageKey(Enum):
    """The TCG's storage keys with an empty `unique`; the value is the TPMT_PUBLIC template."""

    ECC = _template(
        wire.ALG_ECC, struct.pack(">H", wire.CURVE_P256) + _NULL, unique=_EMPTY + _EMPTY
    )
    RSA = _template(wire.ALG_RSA, struct.pack(">HI", 2048, 0), unique=_EMPTY)


class KeyLostError(NotReadyError):
    """A key cannot be used in this TPM any more and has to be made anew."""


def public_from(template: bytes) -> Any:
    """Return TPMT_PUBLIC bytes as the library's TPM2B_PUBLIC."""
    public, _ = TPM2B_PUBLIC.unmarshal(wire.sized(template))
    return public


def name_of_handle(connection: Connection, handle: Any) -> bytes:
    """Return the Name of a loaded object."""
    name = connection.esys.tr_get_name(handle)
    return bytes(name)


def create_primary(connection: Connection, hierarchy: Hierarchy, template: bytes) -> Any:
    """Make a primary key; the caller unloads it.

    Args:
        connection: the TPM.
        hierarchy: whose seed it comes from.
        template: TPMT_PUBLIC.

    Returns:
        Handle, public area, creation data, its hash and ticket, as the library's types.

    Raises:
        TpmError: the TPM refused.
    """
    with connection.authorised(hierarchy) as (handle, session):
        return connection.call(
            connection.esys.create_primary,
            TPM2B_SENSITIVE_CREATE(),
            public_from(template),
            handle,
            session1=session,
        )


@contextlib.contextmanager
def storage(
    connection: Connection, wanted: bytes | None = None, kind: StorageKey = StorageKey.ECC
) -> Iterator[tuple[Any, bytes]]:
    """Make the storage key usable for the block; give its handle and Name.

    Args:
        connection: the TPM.
        wanted: Name of the storage key that keys at hand were made under; a persistent one of
            that Name saves making it again.
        kind: which one.

    Raises:
        KeyLostError: the TPM has no storage key of the wanted Name any more.
    """
    found = _find_persistent(connection, wanted) if wanted is not None else None
    if found is not None and wanted is not None:
        yield found, wanted
        return

    def make() -> Any:
        return create_primary(connection, Hierarchy.OWNER, kind.value)[0]

    with connection.cached(b"storage primary " + kind.name.encode(), make) as handle:
        name = name_of_handle(connection, handle)
        if wanted is not None and name != wanted:
            raise KeyLostError(
                "TPM was cleared or replaced: its storage key is not the one the keys were made "
                "under; they are lost and must be regenerated"
            )
        yield handle, name


def _find_persistent(connection: Connection, name: bytes) -> Any:
    present = set(connection.handles(PERSISTENT_HANDLES))
    for number in _HANDLES:
        if number in present:
            handle = connection.call(connection.esys.tr_from_tpmpublic, number)
            if name_of_handle(connection, handle) == name:
                return handle
            connection.esys.tr_close(handle)
    return None


@contextlib.contextmanager
def salted_session(
    connection: Connection, kind: int = TPM2_SE.HMAC, storage_name: bytes | None = None
) -> Iterator[Any]:
    """Open a session whose key nobody on the bus knows.

    It is salted to the storage key: with the Name that key is known by, an interposer cannot put
    one of its own in its place. What a command sends under it can be neither read nor changed;
    `encrypting` says what of an answer is protected.

    Args:
        connection: the TPM.
        kind: HMAC or policy session.
        storage_name: Name of the storage key; None trusts the one the TPM shows.

    Raises:
        KeyLostError: the TPM has no storage key of that Name.

    Spec: TPM 2.0 Library, Part 1 "Salted Session Key Generation", "Session-Based Encryption".
    """
    with storage(connection, storage_name) as (parent, _):
        session = _start(connection, kind, parent, TPMT_SYM_DEF.parse("aes128cfb"))
    with connection.loaded(session):
        # The command's first parameter is encrypted; not every answer has one that could be.
        attributes = TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.DECRYPT
        connection.esys.trsess_set_attributes(session, attributes)
        yield session


@contextlib.contextmanager
def plain_policy_session(connection: Connection, kind: int = TPM2_SE.POLICY) -> Iterator[Any]:
    """Open a policy session without protection, or a trial session."""
    session = _start(connection, kind, ESYS_TR.NONE, TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL))
    with connection.loaded(session):
        connection.esys.trsess_set_attributes(session, TPMA_SESSION.CONTINUESESSION)
        yield session


def _start(connection: Connection, kind: int, salt: Any, cipher: Any) -> Any:
    return connection.call(
        connection.esys.start_auth_session, salt, ESYS_TR.NONE, kind, cipher, TPM2_ALG.SHA256
    )


def encrypting(connection: Connection, session: Any) -> Any:
    """Have the first parameter of the next answers encrypted too; return the session."""
    attributes = TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT
    connection.esys.trsess_set_attributes(session, attributes)
    return session
