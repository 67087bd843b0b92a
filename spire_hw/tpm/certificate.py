"""Read X.509 certificates of TPM vendors as they are.

Strict where it matters for safety (lengths, dates, keys, duplicate extensions), silent about what
genuine certificates get wrong (order of sets, sign and padding of serials, key identifiers).

Spec: RFC 5280, section 4; RFC 4055 (OAEP identifiers).
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from enum import IntFlag
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric import rsa

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.key import spki_der
from spire_hw.tpm import der
from spire_hw.tpm.certsig import HASH_OIDS, MGF1, mgf_hash
from spire_hw.tpm.public import build_ecc_key, build_rsa_key

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from spire_hw.key import PublicKey

BASIC_CONSTRAINTS: Final = "2.5.29.19"
KEY_USAGE: Final = "2.5.29.15"

_RSA: Final = "1.2.840.113549.1.1.1"
_RSAES_OAEP: Final = "1.2.840.113549.1.1.7"
_PSPECIFIED: Final = "1.2.840.113549.1.1.9"
_EC: Final = "1.2.840.10045.2.1"
_CURVES: Final = {
    "1.2.840.10045.3.1.7": "secp256r1",
    "1.3.132.0.34": "secp384r1",
    "1.3.132.0.35": "secp521r1",
}
_CONTEXT: Final = (0xA0, 0xA1, 0xA2, 0xA3)
_MAX_CERTIFICATE_BYTES: Final = 16 * 1024
_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\r?\n([A-Za-z0-9+/=\r\n]+)-----END \1-----")


class KeyUsage(IntFlag):
    """Bits of the key usage extension."""

    DIGITAL_SIGNATURE = 1 << 0
    KEY_ENCIPHERMENT = 1 << 2
    KEY_AGREEMENT = 1 << 4
    KEY_CERT_SIGN = 1 << 5
    CRL_SIGN = 1 << 6


@dataclass(frozen=True, slots=True)
class Extension:
    """One extension: critical or not, and its DER value."""

    critical: bool
    value: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Certificate:
    """A parsed certificate; equal to another only when it is the same object.

    Attributes:
        der: the whole, as it came.
        tbs: the signed part, as it came.
        signature_algorithm: raw AlgorithmIdentifier.
        signature: the signature.
        serial: may be zero or negative; never an identity.
        issuer: raw name.
        subject: raw name.
        not_before: first moment of validity.
        not_after: last moment of validity.
        key: the public key, checked for strength.
        spki: the same as DER SubjectPublicKeyInfo in its one canonical form.
        extensions: by dotted OID.
        is_ca: basic constraints say so.
        path_length: limit of basic constraints, None without one.
        key_usage: None when the extension is absent.
    """

    der: bytes = field(repr=False)
    tbs: bytes = field(repr=False)
    signature_algorithm: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    serial: int
    issuer: bytes = field(repr=False)
    subject: bytes = field(repr=False)
    not_before: datetime
    not_after: datetime
    key: PublicKey = field(repr=False)
    spki: bytes = field(repr=False)
    extensions: dict[str, Extension] = field(repr=False)
    is_ca: bool
    path_length: int | None
    key_usage: KeyUsage | None

    @property
    def is_self_issued(self) -> bool:
        """Tell whether issuer and subject are the same name."""
        return self.issuer == self.subject

    @property
    def is_rsa(self) -> bool:
        """Tell whether the key is an RSA key."""
        return isinstance(self.key, rsa.RSAPublicKey)


def split_pem(blob: bytes) -> list[bytes]:
    """Return the DER of every certificate of a PEM bundle; text around blocks is allowed.

    Raises:
        InvalidInputError: a block of another kind, or not base64.
    """
    found = []
    for block in _PEM.finditer(blob):
        if block[1] != b"CERTIFICATE":
            raise InvalidInputError("unexpected PEM block beside certificates")
        try:
            found.append(base64.b64decode(b"".join(block[2].split()), validate=True))
        except binascii.Error as e:
            raise InvalidInputError("PEM block is not base64") from e
    if len(found) != blob.count(b"-----BEGIN"):
        raise InvalidInputError("PEM block is malformed")
    return found


def encode_pem(raw: bytes) -> bytes:
    """Return a DER certificate as a PEM block."""
    text = base64.b64encode(raw)
    lines = b"".join(text[i : i + 64] + b"\n" for i in range(0, len(text), 64))
    return b"-----BEGIN CERTIFICATE-----\n" + lines + b"-----END CERTIFICATE-----\n"


def parse_certificate(raw: bytes, what: str = "ek: certificate") -> Certificate:
    """Read one certificate that fills the input.

    Raises:
        EncodingError: not DER, not a certificate, malformed dates, duplicate extensions.
        InvalidInputError: its key is weak or of a type that is not accepted.
    """
    if len(raw) > _MAX_CERTIFICATE_BYTES:
        raise InvalidInputError(f"{what}: larger than {_MAX_CERTIFICATE_BYTES} bytes")
    outer = der.read_all(raw, what, der.SEQUENCE)
    parts = outer.members()
    if len(parts) != 3:  # noqa: PLR2004 - tbs, algorithm, signature
        raise outer.fail("not a certificate")
    tbs = parts[0].expect(der.SEQUENCE)
    fields = tbs.members()
    if fields and fields[0].tag == _CONTEXT[0]:
        fields = fields[1:]
    if len(fields) < 6:  # noqa: PLR2004 - serial to key
        raise tbs.fail("not a certificate")
    serial, inner, issuer, validity, subject, spki, *rest = fields
    if inner.raw != parts[1].raw:
        raise parts[1].fail("signature algorithms inside and outside differ")
    not_before, not_after = _read_validity(validity)
    wrapped = [one for one in rest if one.tag not in _UNIQUE_ID_TAGS]
    extensions = read_extensions(tbs, wrapped, _CONTEXT[3])
    is_ca, path_length = _read_basic_constraints(extensions, what)
    key, canonical = _read_key(spki, what)
    return Certificate(
        der=raw,
        tbs=tbs.raw,
        signature_algorithm=parts[1].raw,
        signature=der.bit_string(parts[2]),
        serial=der.any_integer(serial),
        issuer=issuer.expect(der.SEQUENCE).raw,
        subject=subject.expect(der.SEQUENCE).raw,
        not_before=not_before,
        not_after=not_after,
        key=key,
        spki=canonical,
        extensions=extensions,
        is_ca=is_ca,
        path_length=path_length,
        key_usage=_read_key_usage(extensions, what),
    )


_UNIQUE_ID_TAGS = frozenset({0x81, 0x82, 0xA1, 0xA2})


def _read_validity(validity: der.Value) -> tuple[datetime, datetime]:
    dates = validity.expect(der.SEQUENCE).members()
    if len(dates) != 2:  # noqa: PLR2004 - from, to
        raise validity.fail("validity dates are malformed")
    not_before, not_after = (der.time(one) for one in dates)
    if not_after < not_before:
        raise validity.fail("validity dates are malformed: they end before they begin")
    return not_before, not_after


def read_extensions(tbs: der.Value, rest: Sequence[der.Value], tag: int) -> dict[str, Extension]:
    """Return the extensions of a certificate or revocation list by dotted OID.

    Args:
        tbs: the signed part, for messages.
        rest: what follows the last other field; nothing, or the extensions alone.
        tag: under which they are wrapped.

    Raises:
        EncodingError: something else follows, malformed, or one extension twice.
    """
    found: dict[str, Extension] = {}
    if not rest:
        return found
    if len(rest) != 1 or rest[0].tag != tag:
        raise tbs.fail("unknown fields at the end")
    listed = der.read_all(rest[0].content, tbs.what, der.SEQUENCE)
    for entry in listed.members():
        parts = entry.expect(der.SEQUENCE).members()
        if len(parts) not in {2, 3}:
            raise entry.fail("extension is malformed")
        oid = der.oid(parts[0])
        critical = len(parts) == 3 and der.boolean(parts[1])  # noqa: PLR2004 - with the flag
        if oid in found:
            raise entry.fail(f"extension {oid} appears twice")
        found[oid] = Extension(critical, parts[-1].expect(der.OCTET_STRING).content)
    return found


def _read_basic_constraints(extensions: dict[str, Extension], what: str) -> tuple[bool, int | None]:
    extension = extensions.get(BASIC_CONSTRAINTS)
    return (False, None) if extension is None else _constraints_of(extension.value, what)


@lru_cache(maxsize=64)
def _constraints_of(value: bytes, what: str) -> tuple[bool, int | None]:
    outer = der.read_all(value, f"{what}: basic constraints", der.SEQUENCE)
    parts = outer.members()
    is_ca = False
    if parts and parts[0].tag == der.BOOLEAN:
        is_ca = der.boolean(parts.pop(0))
    path_length = der.integer(parts.pop(0)) if parts else None
    if parts or (path_length is not None and path_length < 0):
        raise outer.fail("malformed")
    return is_ca, path_length


def _read_key_usage(extensions: dict[str, Extension], what: str) -> KeyUsage | None:
    extension = extensions.get(KEY_USAGE)
    return None if extension is None else _usage_of(extension.value, what)


@lru_cache(maxsize=64)
def _usage_of(value: bytes, what: str) -> KeyUsage:
    bits = der.named_bits(der.read_all(value, f"{what}: key usage", der.BIT_STRING))
    return KeyUsage(bits & sum(KeyUsage))


def _read_key(spki: der.Value, what: str) -> tuple[PublicKey, bytes]:
    parts = spki.expect(der.SEQUENCE).members()
    if len(parts) != 2:  # noqa: PLR2004 - algorithm, key
        raise spki.fail("public key is malformed")
    algorithm = parts[0].expect(der.SEQUENCE).members()
    bits = der.bit_string(parts[1])
    kind = der.oid(algorithm[0]) if algorithm else ""
    if kind in {_RSA, _RSAES_OAEP}:
        if kind == _RSAES_OAEP:
            _check_oaep(algorithm, what)
        elif [one.raw for one in algorithm[1:]] not in ([b"\x05\x00"], []):
            raise spki.fail("public key is malformed")
        key = _read_rsa(bits, what)
        return key, spki_der(key)
    if kind == _EC and len(algorithm) == 2:  # noqa: PLR2004 - with the curve
        if algorithm[1].tag != der.OID:
            raise InvalidInputError(f"{what}: public key is not in canonical form: curve")
        curve = der.oid(algorithm[1])
        if curve not in _CURVES:
            raise InvalidInputError(f"{what}: key type is not supported: curve {curve}")
        return build_ecc_key(_CURVES[curve], bits, what)
    raise InvalidInputError(f"{what}: key type is not supported: {kind or 'none'}")


def _read_rsa(bits: bytes, what: str) -> rsa.RSAPublicKey:
    numbers = der.read_all(bits, f"{what}: RSA key", der.SEQUENCE).members()
    if len(numbers) != 2:  # noqa: PLR2004 - modulus, exponent
        raise EncodingError(f"{what}: RSA key", "malformed")
    modulus, exponent = (der.integer(one) for one in numbers)
    return build_rsa_key(modulus, exponent, what)


def _check_oaep(algorithm: Sequence[der.Value], what: str) -> None:
    """Accept OAEP identifiers whose parameters say nothing unusual: a known hash, no label."""
    unusual = InvalidInputError(f"{what}: RSAES-OAEP parameters are not supported")
    if len(algorithm) > 2:  # noqa: PLR2004 - with parameters
        raise unusual
    if len(algorithm) == 1 or algorithm[1].tag == der.NULL:
        return
    try:
        for part in algorithm[1].expect(der.SEQUENCE).members():
            inner = der.read_all(part.content, what, der.SEQUENCE).members()
            kind = der.oid(inner[0]) if inner else ""
            hashed = part.tag == _CONTEXT[0] and kind in HASH_OIDS
            masked = part.tag == _CONTEXT[1] and kind == MGF1 and mgf_hash(inner) is not None
            label = part.tag == _CONTEXT[2] and kind == _PSPECIFIED and inner[-1].raw == b"\x04\x00"
            if not (hashed or masked or label):
                raise unusual
    except EncodingError as e:
        raise unusual from e
