"""Device identity keys: made under a standard storage key, so that any program can load them.

A key is kept as its bare TPMT_PUBLIC and the bare private buffer, the form upstream's agent reads;
files with a size in front, as tpm2-tools write them, are read too. All functions are parts of a
job.

Spec: TCG TPM 2.0 Keys for Device Identity and Attestation.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric import utils
from tpm2_pytss.constants import ESYS_TR
from tpm2_pytss.types import (
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMS_SENSITIVE_CREATE,
    TPMT_SIG_SCHEME,
)

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw.tpm import attest, wire
from spire_hw.tpm.errors import STALE, TpmError
from spire_hw.tpm.keys import KeyBlob
from spire_hw.tpm.public import NO_DA, SIGN
from spire_hw.tpm.storage import KeyLostError, StorageKey, public_from, salted_session, storage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.tpm.attest import AkKind, SignedAttest
    from spire_hw.tpm.connection import Connection

KEY_TYPES: Final = (KeyType.EC_P256, KeyType.RSA_2048)
# sign, fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth.
_ATTRIBUTES: Final = 0x00040072
_NULL: Final = struct.pack(">H", wire.ALG_NULL)
_EMPTY: Final = struct.pack(">H", 0)
_OPTIONS: Final = SignOptions(HashAlgorithm.SHA256)
_MAX_PASSWORD_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class DevIdKey:
    """A device identity key and its password, empty for none."""

    blob: KeyBlob
    password: bytes = field(default=b"", repr=False)

    @property
    def storage_kind(self) -> StorageKey:
        """Return which storage key it is under: the one of its own type."""
        return StorageKey.ECC if self.blob.parsed.type == wire.ALG_ECC else StorageKey.RSA


def parse_files(public: bytes, private: bytes) -> KeyBlob:
    """Read both files of a key, with or without their sizes.

    Raises:
        InvalidInputError: they do not parse, or the key cannot sign with SHA-256.
    """
    blob = KeyBlob.parse(_with_size(public, "public"), _with_size(private, "private"))
    parsed = blob.parsed
    if not parsed.has(SIGN):
        raise InvalidInputError("DevID key is not a signing key")
    own = wire.ALG_ECDSA if parsed.type == wire.ALG_ECC else wire.ALG_RSASSA
    if parsed.scheme not in {wire.ALG_NULL, own} or parsed.scheme_hash not in {0, wire.ALG_SHA256}:
        raise InvalidInputError(
            "DevID key is bound to a scheme other than PKCS#1 v1.5 or ECDSA with SHA-256"
        )
    return blob


def _with_size(data: bytes, what: str) -> bytes:
    if len(data) > 2 and int.from_bytes(data[:2], "big") == len(data) - 2:  # noqa: PLR2004
        return data
    if not 2 < len(data) <= 0xFFFF:  # noqa: PLR2004
        raise EncodingError(f"{what} part of a DevID key", "is not of a TPM key's size")
    return wire.sized(data)


def create_devid(connection: Connection, key_type: KeyType, password: bytes = b"") -> KeyBlob:
    """Make a device identity key.

    Its password, if it has one, crosses the bus encrypted; wrong ones are counted by the TPM.

    Args:
        connection: the TPM.
        key_type: one of `KEY_TYPES`.
        password: of the key, at most 32 bytes.

    Raises:
        InvalidInputError: another type, or a longer password.
        TpmError: the TPM refused.
    """
    if key_type not in KEY_TYPES or len(password) > _MAX_PASSWORD_BYTES:
        raise InvalidInputError("DevID keys are EC P-256 or RSA-2048, passwords up to 32 bytes")
    is_ecc = key_type is KeyType.EC_P256
    attributes = _ATTRIBUTES | (0 if password else NO_DA)
    scheme = wire.ALG_ECDSA if is_ecc else wire.ALG_RSASSA
    head = struct.pack(
        ">HHI", wire.ALG_ECC if is_ecc else wire.ALG_RSA, wire.ALG_SHA256, attributes
    )
    head += _EMPTY + _NULL + struct.pack(">HH", scheme, wire.ALG_SHA256)
    if is_ecc:
        template = head + struct.pack(">H", wire.CURVE_P256) + _NULL + _EMPTY + _EMPTY
    else:
        template = head + struct.pack(">HI", 2048, 0) + _EMPTY
    sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(userAuth=password))
    kind = StorageKey.ECC if is_ecc else StorageKey.RSA
    with (
        salted_session(connection) as session,
        storage(connection, kind=kind) as (parent, _),
    ):
        made = connection.call(
            connection.esys.create, parent, sensitive, public_from(template), session1=session
        )
        return KeyBlob.parse(bytes(made[1].marshal()), bytes(made[0].marshal()))


@contextlib.contextmanager
def _loaded(connection: Connection, key: DevIdKey) -> Iterator[tuple[Any, Any]]:
    """Give the key's handle and the session that authorises its use."""
    public, _ = TPM2B_PUBLIC.unmarshal(key.blob.public)
    private, _ = TPM2B_PRIVATE.unmarshal(key.blob.private)

    def load() -> Any:
        with storage(connection, kind=key.storage_kind) as (parent, _name):
            try:
                return connection.call(connection.esys.load, parent, private, public)
            except TpmError as e:
                if not e.is_any(STALE):
                    raise
                raise KeyLostError(
                    "the DevID key does not load: it is of another TPM, of before TPM2_Clear, or "
                    f"was not made under the TCG's storage key template H ({e.decoded.name})"
                ) from e

    with contextlib.ExitStack() as stack:
        session: Any = ESYS_TR.PASSWORD
        if key.password:  # proved by HMAC, never sent
            session = stack.enter_context(salted_session(connection))
        handle = stack.enter_context(connection.cached(key.blob.parsed.name, load))
        connection.esys.tr_set_auth(handle, key.password)
        yield handle, session


def certify_devid(
    connection: Connection, key: DevIdKey, qualifier: bytes, ak: AkKind
) -> SignedAttest:
    """Have an attestation key vouch that the key is in this TPM.

    Raises:
        KeyLostError: the key does not load.
        TpmError: the TPM refused, for one because the password is wrong.
    """
    with _loaded(connection, key) as (handle, session):
        return attest.certify_loaded(connection, handle, qualifier, ak, session)


def sign_devid(connection: Connection, key: DevIdKey, digest: bytes) -> bytes:
    """Sign a SHA-256 digest and check the signature.

    Returns:
        DER ECDSA-Sig-Value, or a PKCS#1 v1.5 signature.

    Raises:
        KeyLostError: the key does not load.
        TpmError: the TPM refused, for one because the password is wrong.
        SpireHwError: the TPM gave a signature that does not verify.
    """
    parsed = key.blob.parsed
    is_ecc = parsed.type == wire.ALG_ECC
    number = wire.ALG_ECDSA if is_ecc else wire.ALG_RSASSA
    scheme, _ = TPMT_SIG_SCHEME.unmarshal(struct.pack(">HH", number, wire.ALG_SHA256))
    with _loaded(connection, key) as (handle, session):
        made = connection.call(connection.esys.sign, handle, digest, scheme, session1=session)
        raw = bytes(made.marshal())
    parts = wire.parse_signature(raw, "signature of the TPM").parts
    signature = parts[0]
    if is_ecc:
        r, s = (int.from_bytes(part, "big") for part in parts)
        signature = utils.encode_dss_signature(r, s)
    verify_digest(parsed.key, digest, signature, _OPTIONS)
    return signature
