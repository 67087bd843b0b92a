"""The endorsement key: which one a TPM has, by certificate, persistent handle and template.

All functions are parts of a job, as in `attest`. Nothing is stored in the TPM: a key that is not
persistent is made from its template each time.

Spec: TCG EK Credential Profile for TPM 2.0, section 2 and Annex B.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.tpm import wire
from spire_hw.tpm.connection import NV_HANDLES, PERSISTENT_HANDLES, Capability, Hierarchy
from spire_hw.tpm.public import (
    EK_TEMPLATES,
    USER_WITH_AUTH,
    EkTemplate,
    TpmPublic,
    ek_hash,
    key_label,
    parse_public,
)
from spire_hw.tpm.storage import create_primary, name_of_handle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.key import PublicKey
    from spire_hw.tpm.connection import Connection

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
# What replaces the defaults: nonces of the low range, and whole templates.
_NONCES: Final = {"L-1": 0x01C00003, "L-2": 0x01C0000B}
_OWN_TEMPLATES: Final = {"L-1": 0x01C00004, "L-2": 0x01C0000C} | {
    label: index + 1 for label, index in _CERTIFICATES.items() if label.startswith("H")
}
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

_NV_OWNER_READ, _NV_AUTH_READ = 1 << 17, 1 << 18
_NV_CHUNK: Final = 512
_MAX_NV_BYTES: Final = 64 * 1024
_NV_WRAPPER: Final = b"\x10\x01\x00"
_PADDING: Final = b"\x00\xff"
_DER_SEQUENCE: Final = 0x30


class EkType(Enum):
    """Which endorsement key an operator wants; the value is used in configuration files."""

    AUTO = "auto"
    EC_P256 = "ec-p256"
    EC_P384 = "ec-p384"
    RSA_2048 = "rsa-2048"
    RSA_3072 = "rsa-3072"

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the templates that fit, best first."""
        return _LABELS.get(self, tuple(_CERTIFICATES))

    @property
    def uncertified_labels(self) -> tuple[str, ...]:
        """Return the templates to use in a TPM without certificates, best first."""
        return ("L-2", "L-1") if self is EkType.AUTO else self.labels[:1]


_LABELS: Final = {
    EkType.EC_P256: ("L-2", "H-2"),
    EkType.EC_P384: ("H-3",),
    EkType.RSA_2048: ("L-1", "H-1"),
    EkType.RSA_3072: ("H-6",),
}


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


def certified_types(connection: Connection) -> tuple[EkType, ...]:
    """Return the types of endorsement keys a TPM has certificates of, besides `AUTO`."""
    indices = set(connection.handles(NV_HANDLES))
    return tuple(
        kind for kind, labels in _LABELS.items() if any(_CERTIFICATES[n] in indices for n in labels)
    )


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
    label = next((one for one in wanted.uncertified_labels if _is_possible(one, curves)), None)
    if label is None:
        raise NotReadyError(f"this TPM has no endorsement key of type {wanted.value}")
    template = default_template(_TEMPLATES[label])
    for handle, parsed in persistent.items():
        if _is_of(parsed, _TEMPLATES[label]):
            return Endorsement(label, template, parsed, None, (), handle)
    return Endorsement(label, template, _make_endorsement(connection, template), None, (), None)


def _is_possible(label: str, curves: set[int]) -> bool:
    curve = _EC_CURVES.get(_TEMPLATES[label].key_type)
    return curve is None or curve[0] in curves


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
    with _loaded(connection, template) as handle:
        return _read_public(connection, handle)


def _ek_label(template: bytes) -> bytes:
    return b"endorsement key " + hashlib.sha256(template).digest()


@contextlib.contextmanager
def _loaded(connection: Connection, template: bytes) -> Iterator[Any]:
    def make() -> Any:
        return create_primary(connection, Hierarchy.ENDORSEMENT, template)[0]

    with connection.cached(_ek_label(template), make) as handle:
        yield handle


@contextlib.contextmanager
def endorsement_key(connection: Connection, ek: Endorsement) -> Iterator[Any]:
    """Make an endorsement key usable for the block; give its handle.

    Raises:
        NotReadyError: its persistent handle holds another key by now.
        TpmError: the TPM refused.
    """
    if ek.handle is None:
        with _loaded(connection, ek.template) as handle:
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
    """Return certificates that lie one behind the other, with padding or not; stops at what is none."""
    found = []
    while (length := _der_length(data)) is not None:
        found.append(data[:length])
        data = data[length:].lstrip(_PADDING)
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
            with connection.authorised(Hierarchy.OWNER) as (owner, session):
                return _read_chunks(connection, handle, size, auth_handle=owner, session1=session)
        return _read_chunks(connection, handle, size, auth_handle=handle)
    finally:
        if not connection.is_lost:
            esys.tr_close(handle)


def _read_chunks(connection: Connection, index: Any, size: int, **authority: Any) -> bytes:
    content = b""
    while len(content) < size:
        count = min(_NV_CHUNK, size - len(content))
        part = connection.call(
            connection.esys.nv_read, index, count, offset=len(content), **authority
        )
        content += bytes(part)
    return content
