"""YubiHSM 2 attestation certificates: what the device says about one of its keys (pure).

The device signs an X.509 certificate for a key with its attestation key, whose certificate hangs
from the maker's root. What it says of the object stands in extensions of its own. No such device
was at hand: this follows the documentation alone, and refuses what is not as it says.

Source: Yubico, "YubiHSM 2 User Guide": Attestation, Origin, Capabilities.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from spire_hw.errors import AttestationError, EncodingError, Finding
from spire_hw.key import spki_der
from spire_hw.tpm import der
from spire_hw.x509.certificate import encode_der, load_certificate, public_key_of

if TYPE_CHECKING:
    from collections.abc import Sequence

KIND: Final = "yubihsm-attestation"
_WHAT: Final = "YubiHSM attestation"
_ARC: Final = "1.3.6.1.4.1.41482.4"
_FIRMWARE, _SERIAL, _ORIGIN, _CAPABILITIES, _OBJECT_ID = (f"{_ARC}.{n}" for n in (1, 2, 3, 5, 6))
_GENERATED: Final = 0x01
_EXPORTABLE: Final = 1 << 0x10  # exportable-under-wrap
_MAX_CHAIN: Final = 4
_VERSION_BYTES: Final = 3


@dataclass(frozen=True, slots=True)
class YubiHsmKey:
    """What a device says about a key.

    Attributes:
        serial: of the device.
        firmware: its version.
        object_id: number of the key in the device.
        is_exportable: whether it can leave the device under a wrapping key.
    """

    serial: int
    firmware: str
    object_id: int
    is_exportable: bool


def verify_attestation(
    chain: Sequence[bytes], spki: bytes, roots: Sequence[x509.Certificate]
) -> tuple[YubiHsmKey, bool]:
    """Check that a device says that it generated a key.

    Args:
        chain: DER certificates: that of the key, that of the attestation key, and those above.
        spki: DER of the key it should be about.
        roots: the maker's, as the reader has them; may be empty.

    Returns:
        What it says, and whether the chain leads to one of the roots.

    Raises:
        AttestationError: codes `statement_malformed`, `statement_key`, `statement_chain`,
            `not_generated`.
    """
    if not 1 < len(chain) <= _MAX_CHAIN:
        text = f"{_WHAT}: has a chain of {len(chain)} certificates"
        raise AttestationError([Finding("statement_malformed", text)])
    try:
        certificates = [load_certificate(one) for one in chain]
        leaf = certificates[0]
        said = YubiHsmKey(
            serial=der.integer(_extension(leaf, _SERIAL)),
            firmware=_firmware(_extension(leaf, _FIRMWARE)),
            object_id=der.integer(_extension(leaf, _OBJECT_ID)),
            is_exportable=bool(_flags(leaf, _CAPABILITIES) & _EXPORTABLE),
        )
        origin = _flags(leaf, _ORIGIN)
    except EncodingError as e:
        raise AttestationError([Finding("statement_malformed", e.message)]) from e
    found = []
    if spki_der(public_key_of(leaf)) != spki:
        found.append(Finding("statement_key", "attestation certificate is for another key"))
    for subject, issuer in itertools.pairwise(certificates):
        if not _is_issued_by(subject, issuer):
            found.append(Finding("statement_chain", "attestation certificates do not follow"))
    if origin != _GENERATED:
        found.append(Finding("not_generated", "the device did not generate the key: imported"))
    if found:
        raise AttestationError(found)
    last = certificates[-1]
    trusted = any(encode_der(last) == encode_der(r) or _is_issued_by(last, r) for r in roots)
    if roots and not trusted:
        text = "attestation certificates do not lead to a root that was given"
        raise AttestationError([Finding("statement_chain", text)])
    return said, trusted


def _is_issued_by(subject: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        subject.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _extension(certificate: x509.Certificate, oid: str) -> der.Value:
    try:
        found = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(oid)).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as e:
        raise EncodingError(_WHAT, f"has no extension {oid}") from e
    if not isinstance(found, x509.UnrecognizedExtension):
        raise EncodingError(_WHAT, f"has an odd extension {oid}")
    return der.read(found.value, _WHAT)


def _flags(certificate: x509.Certificate, oid: str) -> int:
    return int.from_bytes(der.bit_string(_extension(certificate, oid)))


def _firmware(value: der.Value) -> str:
    if value.tag != der.OCTET_STRING or len(value.content) != _VERSION_BYTES:
        raise EncodingError(_WHAT, "has an odd firmware version")
    return ".".join(str(number) for number in value.content)
