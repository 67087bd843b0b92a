"""What a TPM proves about itself: endorsement key, attestation key, activation, statements.

All functions are parts of a job: they take a `Connection`, run in the device's thread and give
plain bytes back. Nothing is stored in the TPM; both keys come from the endorsement seed each time.

Spec: TPM 2.0 Library, Part 3; TCG EK Credential Profile for TPM 2.0.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from tpm2_pytss import TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE, TPMA_SESSION
from tpm2_pytss.types import (
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_SENSITIVE_CREATE,
    TPML_PCR_SELECTION,
    TPMT_SIG_SCHEME,
    TPMT_SYM_DEF,
)

from spire_hw.errors import InvalidInputError, NotReadyError, SpireHwError, UnavailableError
from spire_hw.tpm import wire
from spire_hw.tpm.device import NV_HANDLES, PERSISTENT_HANDLES, Capability, Hierarchy
from spire_hw.tpm.errors import STALE, Rc, TpmError
from spire_hw.tpm.keys import KeyBlob, loaded_key, name_of_handle, public_from
from spire_hw.tpm.public import (
    EK_TEMPLATES,
    USER_WITH_AUTH,
    EkTemplate,
    TpmPublic,
    ek_hash,
    key_label,
    parse_public,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.key import PublicKey
    from spire_hw.tpm.device import Connection
    from spire_hw.tpm.wire import PcrSelection

T = TypeVar("T")

# Where each template's certificate lies, in our order of preference: small and fast first.
_CERTIFICATES: Final = {
    "L-2": 0x01C0000A,
    "H-2": 0x01C00014,
    "L-1": 0x01C00002,
    "H-1": 0x01C00012,
    "H-3": 0x01C00016,
    "H-6": 0x01C0001C,
    "H-4": 0x01C00018,
    "H-7": 0x01C0001E,
}
# Low-range only: nonce and template that replace the defaults.
_NONCES: Final = {"L-1": 0x01C00003, "L-2": 0x01C0000B}
_OWN_TEMPLATES: Final = {"L-1": 0x01C00004, "L-2": 0x01C0000C}
_WITHOUT_CERTIFICATE: Final = ("L-2", "L-1")
_CHAIN_FIRST, _CHAIN_LAST = 0x01C00100, 0x01C001FF
_EK_HANDLE_FIRST, _EK_HANDLE_LAST = 0x81010000, 0x810100FF
_TEMPLATES: Final = {template.label: template for template in EK_TEMPLATES}

_RSA_BITS: Final = {"rsa2048": 2048, "rsa3072": 3072, "rsa4096": 4096}
_EC_CURVES: Final = {
    "secp256r1": (wire.CURVE_P256, 32),
    "secp384r1": (wire.CURVE_P384, 48),
    "secp521r1": (wire.CURVE_P521, 66),
}
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

_NV_OWNER_READ, _NV_AUTH_READ = 1 << 17, 1 << 18
_NV_CHUNK: Final = 512
_MAX_NV_BYTES: Final = 64 * 1024
_NV_WRAPPER: Final = b"\x10\x01\x00"
_DER_SEQUENCE: Final = 0x30

_MAX_QUALIFIER: Final = 64
_QUOTE_ATTEMPTS: Final = 5
# What a TPM says to a credential that is not for it; libtpms says FAILURE to a damaged RSA secret.
_REFUSED: Final = STALE | {Rc.FAILURE, Rc.INSUFFICIENT, Rc.ECC_POINT}


class EkType(Enum):
    """Which endorsement key an operator wants; the value is used in configuration files."""

    AUTO = "auto"
    EC_P256 = "ec-p256"
    RSA_2048 = "rsa-2048"

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the templates that fit, best first."""
        if self is EkType.EC_P256:
            return ("L-2", "H-2")
        if self is EkType.RSA_2048:
            return ("L-1", "H-1")
        return tuple(_CERTIFICATES)


@dataclass(frozen=True, slots=True)
class Endorsement:
    """An endorsement key of this TPM.

    Attributes:
        label: the TCG template it is made from, such as `L-2`.
        template: TPMT_PUBLIC that makes it again.
        parsed: its public area.
        certificate: DER from the TPM's NV, None when there is none.
        chain: DER certificates of the issuers that the TPM holds.
        handle: persistent handle, None when it has to be made.
    """

    label: str
    template: bytes
    parsed: TpmPublic
    certificate: bytes | None
    chain: tuple[bytes, ...]
    handle: int | None

    @property
    def hash(self) -> str:
        """Return the hash that names this TPM in lists and agent IDs."""
        return ek_hash(self.parsed.key)


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


def find_endorsement(connection: Connection, wanted: EkType = EkType.AUTO) -> Endorsement:
    """Return the endorsement key to attest with.

    A key with a certificate comes first, in the order P-256, RSA-2048, others; without any
    certificate it is the P-256 key of the default template, RSA-2048 where there is no P-256.

    Raises:
        NotReadyError: no key fits, or no certificate is for a key of this TPM; says why.
        TpmError: the TPM refused.
    """
    complaints: list[str] = []
    indices = set(connection.handles(NV_HANDLES))
    persistent = _persistent_keys(connection)
    for label in wanted.labels:
        index = _CERTIFICATES[label]
        if index not in indices:
            continue
        certificate = cut_certificate(read_nv(connection, index))
        if certificate is None:
            complaints.append(f"NV index 0x{index:08X} holds no certificate")
            continue
        found = _certified(connection, label, certificate, persistent, indices)
        if found is not None:
            return found
        complaints.append(
            f"the certificate at NV index 0x{index:08X} is for another key than template {label} "
            "gives: it is not a standard template, or the endorsement seed was changed"
        )
    if complaints:
        raise NotReadyError("no usable endorsement key: " + "; ".join(complaints))
    return _uncertified(connection, wanted, persistent)


def _certified(
    connection: Connection,
    label: str,
    certificate: bytes,
    persistent: dict[int, TpmPublic],
    indices: set[int],
) -> Endorsement | None:
    chain = _read_chain(connection, indices)
    for handle, parsed in persistent.items():
        if is_certificate_for(certificate, parsed.key):
            return Endorsement(label, parsed.raw, parsed, certificate, chain, handle)
    for template in _variants(connection, label, indices):
        parsed = _make_endorsement(connection, template)
        if is_certificate_for(certificate, parsed.key):
            return Endorsement(label, template, parsed, certificate, chain, None)
        connection.forget(_ek_label(template))
    return None


def _uncertified(
    connection: Connection, wanted: EkType, persistent: dict[int, TpmPublic]
) -> Endorsement:
    curves = {curve for (curve,) in connection.capability(Capability.CURVES)}
    labels = [label for label in _WITHOUT_CERTIFICATE if label in wanted.labels]
    if wire.CURVE_P256 not in curves:
        labels = [label for label in labels if label != "L-2"]
    if not labels:
        raise NotReadyError(f"this TPM has no endorsement key of type {wanted.value}")
    label = labels[0]
    template = default_template(_TEMPLATES[label])
    for handle, parsed in persistent.items():
        if _is_of(parsed, _TEMPLATES[label]):
            return Endorsement(label, template, parsed, None, (), handle)
    return Endorsement(label, template, _make_endorsement(connection, template), None, (), None)


def _persistent_keys(connection: Connection) -> dict[int, TpmPublic]:
    found = {}
    for number in connection.handles(PERSISTENT_HANDLES):
        if _EK_HANDLE_FIRST <= number <= _EK_HANDLE_LAST:
            handle = connection.call(connection.esys.tr_from_tpmpublic, number)
            with contextlib.suppress(InvalidInputError):  # a key of another kind is not ours
                found[number] = _read_public(connection, handle)
            connection.esys.tr_close(handle)
    return found


def _read_public(connection: Connection, handle: Any) -> TpmPublic:
    public, _, _ = connection.call(connection.esys.read_public, handle)
    return parse_public(bytes(public.marshal())[2:], "endorsement key")


def _is_of(parsed: TpmPublic, template: EkTemplate) -> bool:
    return (
        key_label(parsed.key) == template.key_type
        and parsed.attributes == template.attributes
        and parsed.auth_policy == template.auth_policy
    )


def _variants(connection: Connection, label: str, indices: set[int]) -> Iterator[bytes]:
    """Yield the templates a certificate may be for: default, vendor's own, default with nonce."""
    default = default_template(_TEMPLATES[label])
    yield default
    if _OWN_TEMPLATES.get(label) in indices:
        yield read_nv(connection, _OWN_TEMPLATES[label])
    if _NONCES.get(label) in indices:
        nonce = read_nv(connection, _NONCES[label])
        size = 256 if label == "L-1" else 32
        if len(nonce) <= size:
            rest = b"" if label == "L-1" else wire.sized(bytes(32))
            blank = wire.sized(bytes(size)) + rest
            filled = wire.sized(nonce.ljust(size, b"\x00")) + rest
            yield default.removesuffix(blank) + filled


def default_template(template: EkTemplate) -> bytes:
    """Return the TPMT_PUBLIC that makes a standard endorsement key.

    Spec: TCG EK Credential Profile, Annex B.
    """
    is_low = not template.attributes & USER_WITH_AUTH
    cipher = struct.pack(">HHH", wire.ALG_AES, template.aes_bits, wire.ALG_CFB)
    if template.key_type in _RSA_BITS:
        kind, bits = wire.ALG_RSA, _RSA_BITS[template.key_type]
        parameters = cipher + _NULL + struct.pack(">HI", bits, 0)
        unique = wire.sized(bytes(bits // 8)) if is_low else _EMPTY
    else:
        curve, size = _EC_CURVES[template.key_type]
        kind = wire.ALG_ECC
        parameters = cipher + _NULL + struct.pack(">H", curve) + _NULL
        unique = (wire.sized(bytes(size)) if is_low else _EMPTY) * 2
    head = struct.pack(">HHI", kind, template.name_alg, template.attributes)
    return head + wire.sized(template.auth_policy) + parameters + unique


def _make_endorsement(connection: Connection, template: bytes) -> TpmPublic:
    with _primary(connection, _ek_label(template), template) as handle:
        return _read_public(connection, handle)


def _ek_label(template: bytes) -> bytes:
    return b"endorsement key " + hashlib.sha256(template).digest()


@contextlib.contextmanager
def _primary(connection: Connection, label: bytes, template: bytes) -> Iterator[Any]:
    def make() -> Any:
        return _create_primary(connection, template)[0]

    with connection.cached(label, make) as handle:
        yield handle


def _create_primary(connection: Connection, template: bytes) -> Any:
    with connection.authorised(Hierarchy.ENDORSEMENT) as session:
        return connection.call(
            connection.esys.create_primary,
            TPM2B_SENSITIVE_CREATE(),
            public_from(template),
            ESYS_TR.ENDORSEMENT,
            session1=session,
        )


@contextlib.contextmanager
def _endorsement_key(connection: Connection, ek: Endorsement) -> Iterator[Any]:
    if ek.handle is None:
        with _primary(connection, _ek_label(ek.template), ek.template) as handle:
            yield handle
        return
    handle = connection.call(connection.esys.tr_from_tpmpublic, ek.handle)
    try:
        if name_of_handle(connection, handle) != ek.parsed.name:
            raise NotReadyError(f"handle 0x{ek.handle:08X} holds another key than before")
        yield handle
    finally:
        if not connection.is_lost:
            connection.esys.tr_close(handle)


def is_certificate_for(certificate: bytes, key: PublicKey) -> bool:
    """Tell whether a certificate names a key.

    Looks for the key's own bytes, because certificates of several vendors do not load with strict
    parsers. It helps to pick a key; whoever trusts the certificate checks it properly.
    """
    if isinstance(key, ec.EllipticCurvePublicKey):
        numbers, size = key.public_numbers(), (key.curve.key_size + 7) // 8
        return numbers.x.to_bytes(size, "big") + numbers.y.to_bytes(size, "big") in certificate
    return key.public_numbers().n.to_bytes(key.key_size // 8, "big") in certificate


def cut_certificate(data: bytes) -> bytes | None:
    """Return the certificate at the start of NV content, without wrapper and padding."""
    if data.startswith(_NV_WRAPPER):
        data = data[5:]
    length = _der_length(data)
    return data[:length] if length is not None else None


def split_certificates(data: bytes) -> tuple[bytes, ...]:
    """Return certificates that lie one behind the other; stops at what is none."""
    found = []
    while (length := _der_length(data)) is not None:
        found.append(data[:length])
        data = data[length:]
    return tuple(found)


def _der_length(data: bytes) -> int | None:
    """Return the length of the SEQUENCE data begins with, None when it does not hold one."""
    if len(data) < 4 or data[0] != _DER_SEQUENCE:  # noqa: PLR2004
        return None
    first, body = data[1], 2
    if first & 0x80:
        count = first & 0x7F
        if not 1 <= count <= 3:  # noqa: PLR2004
            return None
        body += count
        first = int.from_bytes(data[2:body], "big")
    total = body + first
    return total if first > 0 and total <= len(data) else None


def _read_chain(connection: Connection, indices: set[int]) -> tuple[bytes, ...]:
    parts = sorted(i for i in indices if _CHAIN_FIRST <= i <= _CHAIN_LAST)
    return split_certificates(b"".join(read_nv(connection, index) for index in parts))


def read_nv(connection: Connection, index: int) -> bytes:
    """Return the content of an NV index that its own empty password or the owner may read.

    Raises:
        TpmError: the TPM refused.
        NotReadyError: larger than any certificate.
    """
    esys = connection.esys
    handle = connection.call(esys.tr_from_tpmpublic, index)
    try:
        public, _ = connection.call(esys.nv_read_public, handle)
        raw = bytes(public.marshal())
        attributes, (size,) = struct.unpack_from(">I", raw, 8)[0], struct.unpack(">H", raw[-2:])
        if size > _MAX_NV_BYTES:
            raise NotReadyError(f"NV index 0x{index:08X} is too large: {size} bytes")
        if not attributes & _NV_AUTH_READ and attributes & _NV_OWNER_READ:
            with connection.authorised(Hierarchy.OWNER) as session:
                return _read_chunks(connection, handle, size, ESYS_TR.OWNER, session)
        return _read_chunks(connection, handle, size, handle, ESYS_TR.PASSWORD)
    finally:
        if not connection.is_lost:
            esys.tr_close(handle)


def _read_chunks(
    connection: Connection, index: Any, size: int, authority: Any, session: Any
) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.call(
            connection.esys.nv_read,
            index,
            min(_NV_CHUNK, size - len(content)),
            offset=len(content),
            auth_handle=authority,
            session1=session,
        )
        content += bytes(part)
    return content


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
        handle, public, data, digest, ticket = _create_primary(connection, _AK_TEMPLATE)
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
def _attestation_key(connection: Connection) -> Iterator[Any]:
    with _primary(connection, _AK_LABEL, _AK_TEMPLATE) as handle:
        yield handle


def activate(connection: Connection, ek: Endorsement, credential: bytes, secret: bytes) -> bytes:
    """Open a credential that was sealed for this TPM's endorsement and attestation key.

    The answer crosses the bus encrypted, under a session salted to the endorsement key.

    Args:
        connection: the TPM.
        ek: the endorsement key the credential is for.
        credential: TPM2B_ID_OBJECT.
        secret: TPM2B_ENCRYPTED_SECRET.

    Raises:
        InvalidInputError: the credential is malformed or not for these keys.
        TpmError: the TPM refused for another reason.

    Spec: TPM 2.0 Library, Part 3 "TPM2_ActivateCredential".
    """
    esys = connection.esys
    sealed = _unmarshal(TPM2B_ID_OBJECT, credential, "credential")
    wrapped = _unmarshal(TPM2B_ENCRYPTED_SECRET, secret, "secret")
    with (
        _endorsement_key(connection, ek) as ek_handle,
        _attestation_key(connection) as ak_handle,
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
    with _session(connection, TPM2_SE.POLICY) as policy:
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
    _check_qualifier(qualifier)
    with _attestation_key(connection) as ak, loaded_key(connection, blob) as key:
        attest, signature = connection.call(
            connection.esys.certify, key, ak, qualifier, _key_scheme()
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
