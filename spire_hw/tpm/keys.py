"""Signing keys of a TPM: create under a storage primary, load, sign digests.

All functions are parts of a job: they take a `Connection` and run in the device's thread. A key is
kept as two blobs only this TPM can use; what is loaded is flushed at the end of each block.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric import utils
from tpm2_pytss.types import (
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMT_PUBLIC_PARMS,
    TPMT_SIG_SCHEME,
)

from spire_hw.errors import EncodingError, InvalidInputError, NotReadyError, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, check_digest, verify_digest
from spire_hw.tpm import wire
from spire_hw.tpm.device import PERSISTENT_HANDLES, Capability, Hierarchy
from spire_hw.tpm.errors import STALE, TpmError
from spire_hw.tpm.public import TpmPublic, parse_public

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.tpm.device import Connection

# restricted decrypt, fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA: the TCG
# storage root key on P-256 with an empty `unique`.
_STORAGE_ATTRIBUTES: Final = 0x00030472
# sign, fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA. adminWithPolicy is clear,
# so that an attestation key may certify it.
_SIGNING_ATTRIBUTES: Final = 0x00040472

_NULL: Final = struct.pack(">H", wire.ALG_NULL)
_AES_128_CFB: Final = struct.pack(">HHH", wire.ALG_AES, 128, wire.ALG_CFB)
_EMPTY: Final = struct.pack(">H", 0)
_P256: Final = struct.pack(">H", wire.CURVE_P256)
_STORAGE_TEMPLATE: Final = (
    struct.pack(">HHI", wire.ALG_ECC, wire.ALG_SHA256, _STORAGE_ATTRIBUTES)
    + _EMPTY  # no policy
    + (_AES_128_CFB + _NULL + _P256 + _NULL)
    + (_EMPTY + _EMPTY)
)
_STORAGE_LABEL: Final = b"storage primary"
_STORAGE_HANDLES: Final = (0x81000001, 0x81000002)

_CURVES: Final = {KeyType.EC_P256: wire.CURVE_P256, KeyType.EC_P384: wire.CURVE_P384}
_RSA_BITS: Final = {KeyType.RSA_2048: 2048, KeyType.RSA_4096: 4096}
_HASH_IDS: Final = {
    HashAlgorithm.SHA256: wire.ALG_SHA256,
    HashAlgorithm.SHA384: wire.ALG_SHA384,
    HashAlgorithm.SHA512: wire.ALG_SHA512,
}


@dataclass(frozen=True, slots=True)
class KeyBlob:
    """A key outside its TPM: useless to anybody without that TPM.

    Attributes:
        public: TPM2B_PUBLIC bytes.
        private: TPM2B_PRIVATE bytes, wrapped by the storage primary.
        parsed: the public area.
    """

    public: bytes
    private: bytes
    parsed: TpmPublic

    @classmethod
    def parse(cls, public: bytes, private: bytes) -> KeyBlob:
        """Check both parts' shape.

        Raises:
            InvalidInputError: a size prefix is wrong or the public area does not parse.
        """
        for what, data in (("public", public), ("private", private)):
            if len(data) <= 2 or int.from_bytes(data[:2], "big") != len(data) - 2:  # noqa: PLR2004
                raise EncodingError(f"{what} part of a TPM key", "size does not fit")
        return cls(public, private, parse_public(public[2:], "public part of a TPM key"))


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a TPM can do for us."""

    key_types: frozenset[KeyType]
    hashes: frozenset[HashAlgorithm]


def read_abilities(connection: Connection) -> Abilities:
    """Ask the TPM which key types and hashes it has."""
    esys = connection.esys
    types = set()
    curves = {curve for (curve,) in connection.capability(Capability.CURVES)}
    types |= {key_type for key_type, curve in _CURVES.items() if curve in curves}
    for key_type in _RSA_BITS:
        parameters, _ = TPMT_PUBLIC_PARMS.unmarshal(
            struct.pack(">H", wire.ALG_RSA) + _parameters(key_type)
        )
        with contextlib.suppress(TpmError):
            connection.call(esys.test_parms, parameters)
            types.add(key_type)
    algorithms = {number for number, _ in connection.capability(Capability.ALGORITHMS)}
    hashes = frozenset(h for h, number in _HASH_IDS.items() if number in algorithms)
    return Abilities(frozenset(types), hashes)


def public_from(template: bytes) -> Any:
    """Return TPMT_PUBLIC bytes as the library's TPM2B_PUBLIC."""
    public, _ = TPM2B_PUBLIC.unmarshal(wire.sized(template))
    return public


def name_of_handle(connection: Connection, handle: Any) -> bytes:
    """Return the Name of a loaded object."""
    name = connection.esys.tr_get_name(handle)
    return bytes(name)


@contextlib.contextmanager
def storage(connection: Connection, wanted: bytes | None = None) -> Iterator[tuple[Any, bytes]]:
    """Make the storage primary usable for the block; give its handle and Name.

    Args:
        connection: the TPM.
        wanted: Name of the primary that keys at hand were made under; a persistent one of that
            Name saves making it again.

    Raises:
        NotReadyError: the TPM has no primary of the wanted Name any more.
    """
    found = _find_persistent(connection, wanted) if wanted is not None else None
    if found is not None and wanted is not None:
        yield found, wanted
        return
    with connection.cached(_STORAGE_LABEL, lambda: _create_storage(connection)) as handle:
        name = name_of_handle(connection, handle)
        if wanted is not None and name != wanted:
            raise NotReadyError(
                "TPM was cleared or replaced: its storage key is not the one the keys were made "
                "under; they are lost and must be regenerated"
            )
        yield handle, name


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


def _create_storage(connection: Connection) -> Any:
    return create_primary(connection, Hierarchy.OWNER, _STORAGE_TEMPLATE)[0]


def _find_persistent(connection: Connection, name: bytes) -> Any:
    present = set(connection.handles(PERSISTENT_HANDLES))
    for number in _STORAGE_HANDLES:
        if number in present:
            handle = connection.call(connection.esys.tr_from_tpmpublic, number)
            if name_of_handle(connection, handle) == name:
                return handle
            connection.esys.tr_close(handle)
    return None


def create_key(connection: Connection, key_type: KeyType) -> tuple[KeyBlob, bytes]:
    """Make a signing key.

    Returns:
        The key and the Name of the storage primary it was made under.

    Raises:
        TpmError: the TPM refused.
    """
    template = (
        struct.pack(
            ">HHI",
            wire.ALG_ECC if key_type in _CURVES else wire.ALG_RSA,
            wire.ALG_SHA256,
            _SIGNING_ATTRIBUTES,
        )
        + _EMPTY
        + _parameters(key_type)
        + (_EMPTY + _EMPTY if key_type in _CURVES else _EMPTY)
    )
    with storage(connection) as (parent, parent_name):
        made = connection.call(
            connection.esys.create, parent, TPM2B_SENSITIVE_CREATE(), public_from(template)
        )
        private, public = bytes(made[0].marshal()), bytes(made[1].marshal())
    blob = KeyBlob.parse(public, private)
    connection.remember(blob.parsed.name)
    return blob, parent_name


def _parameters(key_type: KeyType) -> bytes:
    """Return TPMS_ECC_PARMS or TPMS_RSA_PARMS: no child cipher, no fixed scheme."""
    if key_type in _CURVES:
        return _NULL + _NULL + struct.pack(">H", _CURVES[key_type]) + _NULL
    return _NULL + _NULL + struct.pack(">HI", _RSA_BITS[key_type], 0)


@contextlib.contextmanager
def loaded_key(
    connection: Connection, blob: KeyBlob, storage_name: bytes | None = None
) -> Iterator[Any]:
    """Load a key for the block and give its handle.

    Args:
        connection: the TPM.
        blob: from `create_key`.
        storage_name: the primary it was made under, where that is known.

    Raises:
        NotReadyError: the TPM was cleared or is another one; the key is lost.
        TpmError: the TPM refused.
    """
    name = blob.parsed.name
    with connection.cached(name, lambda: _load(connection, blob, storage_name)) as handle:
        connection.remember(name)
        yield handle


def _load(connection: Connection, blob: KeyBlob, storage_name: bytes | None) -> Any:
    public, _ = TPM2B_PUBLIC.unmarshal(blob.public)
    private, _ = TPM2B_PRIVATE.unmarshal(blob.private)
    with storage(connection, storage_name) as (parent, _name):
        try:
            return connection.call(connection.esys.load, parent, private, public)
        except TpmError as e:
            if not e.is_any(STALE):
                raise
            raise NotReadyError(
                "TPM was cleared or replaced, or the key's file was damaged: the key does not "
                f"load and must be regenerated ({e.decoded.name})"
            ) from e


def check_sign_options(blob: KeyBlob, digest: bytes, options: SignOptions) -> None:
    """Refuse what a TPM cannot sign.

    Raises:
        InvalidInputError: digest length, PSS for an EC key, or a PSS salt that is not as long as
            the hash (a TPM takes no salt length).
    """
    check_digest(digest, options)
    if not options.pss:
        return
    if blob.parsed.type == wire.ALG_ECC:
        raise InvalidInputError("PSS options do not fit an EC key")
    if options.salt_bytes != options.hash.digest_size:
        raise InvalidInputError(
            f"PSS salt of {options.salt_bytes} bytes is not possible with a TPM; use the length "
            f"of the hash, {options.hash.digest_size}"
        )


def sign(
    connection: Connection,
    blob: KeyBlob,
    digest: bytes,
    options: SignOptions,
    storage_name: bytes | None = None,
) -> bytes:
    """Sign a digest and check the signature.

    Args:
        connection: the TPM.
        blob: the key.
        digest: made with `options.hash`.
        options: hash and padding.
        storage_name: the primary the key was made under.

    Returns:
        DER ECDSA-Sig-Value, or the RSA signature at modulus length.

    Raises:
        InvalidInputError: see `check_sign_options`.
        NotReadyError: the key is lost.
        TpmError: the TPM refused.
        SpireHwError: the TPM gave a signature that does not verify.
    """
    check_sign_options(blob, digest, options)
    if blob.parsed.type == wire.ALG_ECC:
        scheme_id = wire.ALG_ECDSA
    else:
        scheme_id = wire.ALG_RSAPSS if options.pss else wire.ALG_RSASSA
    scheme, _ = TPMT_SIG_SCHEME.unmarshal(struct.pack(">HH", scheme_id, _HASH_IDS[options.hash]))
    with loaded_key(connection, blob, storage_name) as handle:
        made = connection.call(connection.esys.sign, handle, digest, scheme)
        signature = _plain_signature(bytes(made.marshal()), blob)
    _verify(blob, digest, signature, options)
    return signature


def _plain_signature(raw: bytes, blob: KeyBlob) -> bytes:
    parts = wire.parse_signature(raw, "signature of the TPM").parts
    if blob.parsed.type == wire.ALG_ECC:
        r, s = (int.from_bytes(part, "big") for part in parts)
        return utils.encode_dss_signature(r, s)
    return parts[0]


def _verify(blob: KeyBlob, digest: bytes, signature: bytes, options: SignOptions) -> None:
    try:
        verify_digest(blob.parsed.key, digest, signature, options)
    except SpireHwError as e:
        salt = " or pads PSS with a salt that others refuse; use an EC key" if options.pss else ""
        raise SpireHwError(f"the TPM gave a signature that does not verify{salt}") from e
