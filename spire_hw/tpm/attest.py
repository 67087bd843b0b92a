"""What a TPM proves about itself: attestation key, activation, certify and quote statements.

All functions are parts of a job: they take a `Connection`, run in the device's thread and give
plain bytes back. Nothing is stored in the TPM; both keys come from the endorsement seed each time.

Spec: TPM 2.0 Library, Part 3.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tpm2_pytss import TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE, TPMA_SESSION
from tpm2_pytss.types import (
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPML_PCR_SELECTION,
    TPMT_SIG_SCHEME,
    TPMT_SYM_DEF,
    TPMT_TK_CREATION,
)

from spire_hw.errors import InvalidInputError, SpireHwError, UnavailableError
from spire_hw.tpm import wire
from spire_hw.tpm.connection import Hierarchy
from spire_hw.tpm.endorsement import Endorsement, endorsement_key
from spire_hw.tpm.errors import STALE, Rc, TpmError
from spire_hw.tpm.keys import CreationProof, KeyBlob, KeyUse, loaded_key
from spire_hw.tpm.public import (
    USER_WITH_AUTH,
)
from spire_hw.tpm.storage import create_primary, name_of_handle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.tpm.connection import Connection
    from spire_hw.tpm.wire import PcrSelection

T = TypeVar("T")

_NULL: Final = struct.pack(">H", wire.ALG_NULL)
_EMPTY: Final = struct.pack(">H", 0)

# restricted sign, fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA.
_AK_ATTRIBUTES: Final = 0x00050472
# In `unique`: keeps this key apart from other software's key of the same template.
_AK_SEPARATION: Final = hashlib.sha256(b"spire-hw attestation key").digest()
_AK_TEMPLATE: Final = (
    struct.pack(">HHI", wire.ALG_ECC, wire.ALG_SHA256, _AK_ATTRIBUTES)
    + _EMPTY
    + _NULL
    + struct.pack(">HH", wire.ALG_ECDSA, wire.ALG_SHA256)
    + (struct.pack(">H", wire.CURVE_P256) + _NULL)
    + (wire.sized(_AK_SEPARATION) + wire.sized(bytes(32)))
)
_AK_LABEL: Final = b"attestation key"
_RSA_AK_TEMPLATE: Final = (
    struct.pack(">HHI", wire.ALG_RSA, wire.ALG_SHA256, _AK_ATTRIBUTES)
    + _EMPTY
    + _NULL
    + struct.pack(">HH", wire.ALG_RSASSA, wire.ALG_SHA256)
    + struct.pack(">HI", 2048, 0)
    + wire.sized(_AK_SEPARATION.ljust(256, b"\x00"))
)

_MAX_QUALIFIER: Final = 64
_QUOTE_ATTEMPTS: Final = 5
# What a TPM says to a credential that is not for it; libtpms says FAILURE to a damaged RSA secret.
_REFUSED: Final = STALE | {Rc.FAILURE, Rc.INSUFFICIENT, Rc.ECC_POINT}


class AkKind(Enum):
    """Attestation keys by type; the value is what saved contexts are called by, and the template.

    RSA is for verifiers that know nothing else: P-256 is made and used many times faster.
    """

    ECC = (_AK_LABEL, _AK_TEMPLATE)
    RSA = (_AK_LABEL + b" RSA", _RSA_AK_TEMPLATE)


@dataclass(frozen=True, slots=True)
class AttestationKey:
    """The attestation key and its proof of creation.

    Attributes:
        public: TPMT_PUBLIC.
        name: its Name.
        creation_data: TPMS_CREATION_DATA.
        creation_attest: TPMS_ATTEST, signed by the key itself.
        creation_signature: TPMT_SIGNATURE.
    """

    public: bytes
    name: bytes
    creation_data: bytes
    creation_attest: bytes
    creation_signature: bytes


@dataclass(frozen=True, slots=True)
class SignedAttest:
    """TPMS_ATTEST and TPMT_SIGNATURE."""

    attest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class QuotedPcrs:
    """A quote and the PCR values it covers."""

    signed: SignedAttest
    values: dict[int, bytes]


def create_attestation_key(connection: Connection) -> AttestationKey:
    """Make the attestation key and have it vouch for its creation.

    It is a primary key of the endorsement hierarchy: the same on every call and after TPM2_Clear,
    so nothing has to be kept, and the TPM does not scramble its counters in the key's statements.

    Raises:
        TpmError: the TPM refused, for one because it has no P-256.
    """
    esys = connection.esys
    connection.forget(_AK_LABEL)
    made: list[AttestationKey] = []

    def make() -> Any:
        handle, public, data, digest, ticket = create_primary(
            connection, Hierarchy.ENDORSEMENT, _AK_TEMPLATE
        )
        try:
            attest, signature = connection.call(
                esys.certify_creation, handle, handle, b"", digest, _key_scheme(), ticket
            )
            made.append(
                AttestationKey(
                    public=bytes(public.marshal())[2:],
                    name=name_of_handle(connection, handle),
                    creation_data=bytes(data.marshal())[2:],
                    creation_attest=bytes(attest),
                    creation_signature=bytes(signature.marshal()),
                )
            )
        except BaseException:
            with connection.loaded(handle):
                raise
        return handle

    with connection.cached(_AK_LABEL, make):
        connection.remember(made[0].name)
    return made[0]


def _key_scheme() -> Any:
    """Return the scheme that means: the key's own."""
    return TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)


@contextlib.contextmanager
def _attestation_key(connection: Connection, kind: AkKind = AkKind.ECC) -> Iterator[Any]:
    label, template = kind.value

    def make() -> Any:
        return create_primary(connection, Hierarchy.ENDORSEMENT, template)[0]

    with connection.cached(label, make) as handle:
        yield handle


def read_attestation_key(connection: Connection, kind: AkKind) -> bytes:
    """Return the TPMT_PUBLIC of the attestation key, which is loaded or made for it.

    Raises:
        TpmError: the TPM refused.
    """
    with _attestation_key(connection, kind) as handle:
        connection.remember(name_of_handle(connection, handle))
        public, _, _ = connection.call(connection.esys.read_public, handle)
        return bytes(public.marshal())[2:]


def attestation_key_name(connection: Connection) -> bytes:
    """Return the Name of the attestation key, which is loaded or made for it.

    Raises:
        TpmError: the TPM refused.
    """
    with _attestation_key(connection) as handle:
        name = name_of_handle(connection, handle)
        connection.remember(name)
        return name


def activate(
    connection: Connection,
    ek: Endorsement,
    credential: bytes,
    secret: bytes,
    ak: AkKind = AkKind.ECC,
) -> bytes:
    """Open a credential that was sealed for this TPM's endorsement and attestation key.

    The answer crosses the bus encrypted, under a session salted to the endorsement key.

    Args:
        connection: the TPM.
        ek: the endorsement key the credential is for.
        credential: TPM2B_ID_OBJECT.
        secret: TPM2B_ENCRYPTED_SECRET.
        ak: the attestation key it is for.

    Raises:
        InvalidInputError: the credential is malformed or not for these keys.
        TpmError: the TPM refused for another reason.

    Spec: TPM 2.0 Library, Part 3 "TPM2_ActivateCredential".
    """
    esys = connection.esys
    sealed = _unmarshal(TPM2B_ID_OBJECT, credential, "credential")
    wrapped = _unmarshal(TPM2B_ENCRYPTED_SECRET, secret, "secret")
    with (
        endorsement_key(connection, ek) as ek_handle,
        _attestation_key(connection, ak) as ak_handle,
        _session(connection, TPM2_SE.HMAC, salt=ek_handle) as salted,
        _ek_authorisation(connection, ek, salted) as authority,
    ):
        esys.trsess_set_attributes(salted, TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.ENCRYPT)
        try:
            opened = connection.call(
                esys.activate_credential,
                ak_handle,
                ek_handle,
                sealed,
                wrapped,
                session1=salted,
                session2=authority,
            )
        except TpmError as e:
            if not e.is_any(_REFUSED):
                raise
            raise InvalidInputError(
                f"challenge: TPM refused the credential ({e.decoded.name})"
            ) from e
        return bytes(opened)


@contextlib.contextmanager
def _session(connection: Connection, kind: int, salt: Any = ESYS_TR.NONE) -> Iterator[Any]:
    cipher = TPMT_SYM_DEF.parse("aes128cfb") if salt != ESYS_TR.NONE else None
    if cipher is None:
        cipher = TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL)
    handle = connection.call(
        connection.esys.start_auth_session, salt, ESYS_TR.NONE, kind, cipher, TPM2_ALG.SHA256
    )
    with connection.loaded(handle):
        connection.esys.trsess_set_attributes(handle, TPMA_SESSION.CONTINUESESSION)
        yield handle


@contextlib.contextmanager
def _ek_authorisation(connection: Connection, ek: Endorsement, salted: Any) -> Iterator[Any]:
    """Give the session that authorises use of the endorsement key."""
    if ek.parsed.has(USER_WITH_AUTH):
        yield ESYS_TR.PASSWORD  # high range: the key's own, empty password
        return
    with (
        _session(connection, TPM2_SE.POLICY) as policy,
        connection.proving(Hierarchy.ENDORSEMENT),
    ):
        # By HMAC: a hierarchy password is proved, never sent.
        connection.call(connection.esys.policy_secret, ESYS_TR.ENDORSEMENT, policy, session1=salted)
        yield policy


def _unmarshal(kind: Any, data: bytes, what: str) -> Any:
    try:
        value, used = kind.unmarshal(data)
    except TSS2_Exception as e:
        raise InvalidInputError(f"challenge: {what} is malformed") from e
    if used != len(data):
        raise InvalidInputError(f"challenge: {what} is malformed")
    return value


def certify(connection: Connection, blob: KeyBlob, qualifier: bytes) -> SignedAttest:
    """Have the attestation key vouch that a key is in this TPM.

    Args:
        connection: the TPM.
        blob: a key made by `keys.create_key`.
        qualifier: up to 64 bytes.

    Raises:
        TpmError: the TPM refused.
        NotReadyError: the key does not load.

    Spec: TPM 2.0 Library, Part 3 "TPM2_Certify".
    """
    with loaded_key(connection, blob) as key:
        return certify_loaded(connection, key, qualifier)


def certify_loaded(
    connection: Connection,
    key: Any,
    qualifier: bytes,
    ak: AkKind = AkKind.ECC,
    session: Any = ESYS_TR.PASSWORD,
) -> SignedAttest:
    """Have an attestation key vouch for a key that is loaded.

    Args:
        connection: the TPM.
        key: its handle.
        qualifier: up to 64 bytes.
        ak: which attestation key.
        session: authorises use of the key.

    Raises:
        TpmError: the TPM refused.
    """
    _check_qualifier(qualifier)
    with _attestation_key(connection, ak) as signer:
        attest, signature = connection.call(
            connection.esys.certify, key, signer, qualifier, _key_scheme(), session1=session
        )
        return SignedAttest(bytes(attest), bytes(signature.marshal()))


def certify_creation(
    connection: Connection, blob: KeyBlob, proof: CreationProof, qualifier: bytes, use: KeyUse
) -> SignedAttest:
    """Have the attestation key vouch that this TPM made a key, when and under which parent.

    Args:
        connection: the TPM.
        blob: the key.
        proof: what the TPM gave when it made the key.
        qualifier: up to 64 bytes.
        use: where the key may be persistent, and what it was made under.

    Raises:
        TpmError: the TPM refused; the ticket is of before TPM2_Clear, say.
        KeyLostError: the key does not load.

    Spec: TPM 2.0 Library, Part 3 "TPM2_CertifyCreation".
    """
    _check_qualifier(qualifier)
    ticket, _ = TPMT_TK_CREATION.unmarshal(proof.ticket)
    with loaded_key(connection, blob, use) as key, _attestation_key(connection) as signer:
        attest, signature = connection.call(
            connection.esys.certify_creation,
            signer,
            key,
            qualifier,
            proof.digest,
            _key_scheme(),
            ticket,
        )
        return SignedAttest(bytes(attest), bytes(signature.marshal()))


def quote(connection: Connection, selection: PcrSelection, qualifier: bytes) -> QuotedPcrs:
    """Have the attestation key sign the values of PCRs; return both.

    Args:
        connection: the TPM.
        selection: PCRs of one bank, at least one.
        qualifier: up to 64 bytes.

    Raises:
        InvalidInputError: no PCR, or the bank is not active.
        UnavailableError: the PCRs kept changing between reading and quoting.
        TpmError: the TPM refused.

    Spec: TPM 2.0 Library, Part 3 "TPM2_Quote".
    """
    _check_qualifier(qualifier)
    chosen = _library_selection(selection)
    with _attestation_key(connection) as ak:
        for _ in range(_QUOTE_ATTEMPTS):
            values = read_pcrs(connection, selection)
            attest, signature = connection.call(
                connection.esys.quote, ak, chosen, qualifier, _key_scheme()
            )
            raw = bytes(attest)
            body = wire.parse_quote_body(wire.parse_attest(raw).body)
            joined = b"".join(values[n] for n in sorted(values))
            if body.pcr_digest == hashlib.sha256(joined).digest():
                return QuotedPcrs(SignedAttest(raw, bytes(signature.marshal())), values)
    raise UnavailableError("PCRs changed during each of several quotes; try again")


def read_pcrs(connection: Connection, selection: PcrSelection) -> dict[int, bytes]:
    """Return the values of PCRs of one bank.

    Raises:
        InvalidInputError: no PCR, or the bank is not active.
        TpmError: the TPM refused.
    """
    left = set(selection.pcrs)
    if not left:
        raise InvalidInputError("PCR selection is empty")
    values: dict[int, bytes] = {}
    while left:
        part = wire.PcrSelection(selection.bank, tuple(sorted(left)))
        _, got, digests = connection.call(connection.esys.pcr_read, _library_selection(part))
        numbers = _selected(bytes(got.marshal()), selection.bank)
        contents = _digests(bytes(digests.marshal()))
        if not numbers or len(numbers) != len(contents):
            active = [bank for bank, pcrs in connection.pcr_banks().items() if pcrs]
            raise InvalidInputError(
                f"PCR bank {selection.bank} is not active on this TPM; active are "
                + ", ".join(active)
            )
        values.update(zip(numbers, contents, strict=True))
        left -= set(numbers)
    return values


def _check_qualifier(qualifier: bytes) -> None:
    if len(qualifier) > _MAX_QUALIFIER:
        raise SpireHwError(f"qualifying data is longer than {_MAX_QUALIFIER} bytes")


def _library_selection(selection: PcrSelection) -> Any:
    chosen, _ = TPML_PCR_SELECTION.unmarshal(wire.encode_selections([selection]))
    return chosen


def _selected(raw: bytes, bank: str) -> list[int]:
    """Return the PCR numbers of one bank in a TPML_PCR_SELECTION."""
    reader = wire.Reader(raw, "PCR selection of the TPM")
    for _ in range(reader.u32()):
        algorithm = reader.u16()
        bitmap = int.from_bytes(reader.take(reader.u8()), "little")
        if algorithm == wire.BANKS[bank]:
            return [n for n in range(wire.PCR_COUNT) if bitmap >> n & 1]
    return []


def _digests(raw: bytes) -> list[bytes]:
    """Return the members of a TPML_DIGEST."""
    reader = wire.Reader(raw, "PCR values of the TPM")
    return [reader.sized(_MAX_QUALIFIER) for _ in range(reader.u32())]
