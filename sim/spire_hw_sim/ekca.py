"""Certificates of TPM vendors built in DER by hand, so that any of them can be odd or wrong.

`cryptography` refuses to make most of what tests need: sets out of order, OAEP key identifiers,
negative serials, weak keys, malformed dates.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding

from spire_hw.key import PrivateKey, PublicKey, spki_der

_SERIALS = itertools.count(1000)

SAN: Final = "2.5.29.17"
BASIC_CONSTRAINTS: Final = "2.5.29.19"
KEY_USAGE: Final = "2.5.29.15"
EKU: Final = "2.5.29.37"
EK_PURPOSE: Final = "2.23.133.8.1"
KEY_ENCIPHERMENT, KEY_AGREEMENT, DIGITAL_SIGNATURE, KEY_CERT_SIGN, CRL_SIGN = 2, 4, 0, 5, 6
DELTA_CRL: Final = "2.5.29.27"
CRL_SCOPE: Final = "2.5.29.28"
CRL_POINTS: Final = "2.5.29.31"
RSAES_OAEP: Final = "1.2.840.113549.1.1.7"

_SIGNATURE: Final[dict[tuple[str, str], str]] = {
    ("rsa", "sha256"): "1.2.840.113549.1.1.11",
    ("rsa", "sha384"): "1.2.840.113549.1.1.12",
    ("rsa", "sha1"): "1.2.840.113549.1.1.5",
    ("ec", "sha256"): "1.2.840.10045.4.3.2",
    ("ec", "sha384"): "1.2.840.10045.4.3.3",
    ("ec", "sha512"): "1.2.840.10045.4.3.4",
    ("ec", "sha1"): "1.2.840.10045.4.1",
}
_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "sha1": hashes.SHA1(),  # noqa: S303 - verifiers must refuse it
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}


def tlv(tag: int, *parts: bytes) -> bytes:
    """Return one DER value."""
    content = b"".join(parts)
    size = len(content)
    if size < 0x80:  # noqa: PLR2004 - short form
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


def integer(value: int) -> bytes:
    """Return an INTEGER, negative ones too."""
    size = value.bit_length() // 8 + 1
    return tlv(0x02, value.to_bytes(size, "big", signed=True))


def oid(dotted: str) -> bytes:
    """Return an OBJECT IDENTIFIER."""
    first, second, *arcs = map(int, dotted.split("."))
    out = b""
    for arc in (40 * first + second, *arcs):
        digits = [arc & 0x7F]
        while arc := arc >> 7:
            digits.append(0x80 | arc & 0x7F)
        out += bytes(reversed(digits))
    return tlv(0x06, out)


def name(*pairs: tuple[str, str], one_set: bool = False) -> bytes:
    """Return a Name with UTF8String values; `one_set` puts all into one SET, in this order."""
    attributes = [tlv(0x30, oid(kind), tlv(0x0C, value.encode())) for kind, value in pairs]
    if one_set:
        return tlv(0x30, tlv(0x31, *attributes))
    return tlv(0x30, *(tlv(0x31, attribute) for attribute in attributes))


def common_name(text: str) -> bytes:
    """Return a Name with one common name."""
    return name(("2.5.4.3", text))


def tpm_name(
    manufacturer: str = "id:4E544300",
    model: str = "NPCT75x",
    version: str = "id:00070002",
    *,
    one_set: bool = False,
) -> bytes:
    """Return the Name that tells manufacturer, model and version."""
    return name(
        ("2.23.133.2.1", manufacturer),
        ("2.23.133.2.2", model),
        ("2.23.133.2.3", version),
        one_set=one_set,
    )


def san(*directory_names: bytes) -> bytes:
    """Return a subject alternative name of directory names."""
    return tlv(0x30, *(tlv(0xA4, one) for one in directory_names))


def extension(kind: str, value: bytes, *, critical: bool = False) -> bytes:
    """Return one Extension."""
    flag = tlv(0x01, b"\xff") if critical else b""
    return tlv(0x30, oid(kind), flag, tlv(0x04, value))


def basic_constraints(*, ca: bool, path_length: int | None = None) -> bytes:
    """Return a critical basic constraints extension."""
    parts = [tlv(0x01, b"\xff")] if ca else []
    if path_length is not None:
        parts.append(integer(path_length))
    return extension(BASIC_CONSTRAINTS, tlv(0x30, *parts), critical=True)


def key_usage(*bits: int) -> bytes:
    """Return a critical key usage extension with these bits of the standard."""
    number = sum(0x80 >> bit for bit in bits)
    spare = 7 - max(bits)
    return extension(KEY_USAGE, tlv(0x03, bytes((spare, number))), critical=True)


def eku(*purposes: str) -> bytes:
    """Return an extended key usage extension."""
    return extension(EKU, tlv(0x30, *(oid(one) for one in purposes)))


def oaep_spki(key: PublicKey, parameters: bytes = b"\x30\x00") -> bytes:
    """Return an RSA key under the RSAES-OAEP identifier, as older vendors have it."""
    plain = spki_der(key)
    bits = plain[plain.index(b"\x03\x82") :]
    return tlv(0x30, tlv(0x30, oid(RSAES_OAEP), parameters), bits)


def utc(text: str) -> bytes:
    """Return a GeneralizedTime from YYYYMMDD."""
    return tlv(0x18, f"{text}000000Z".encode())


@dataclass(slots=True)
class Spec:
    """What a certificate should say; every field may be replaced.

    `serial` in bytes is the whole INTEGER; `null_parameters` puts a NULL behind an ECDSA identifier.
    """

    spki: bytes
    subject: bytes = b"\x30\x00"
    not_before: bytes = field(default_factory=lambda: utc("20200101"))
    not_after: bytes = field(default_factory=lambda: tlv(0x18, b"99991231235959Z"))
    serial: int | bytes = field(default_factory=lambda: next(_SERIALS))
    extensions: list[bytes] = field(default_factory=list)
    hash: str = "sha256"
    inner_algorithm: bytes | None = None
    null_parameters: bool = False


def ca_spec(text: str, key: PublicKey, path_length: int | None = None) -> Spec:
    """Return what a CA certificate says."""
    usage = key_usage(KEY_CERT_SIGN, CRL_SIGN)
    extensions = [basic_constraints(ca=True, path_length=path_length), usage]
    return Spec(spki_der(key), subject=common_name(text), extensions=extensions)


def ek_spec(key: PublicKey) -> Spec:
    """Return what an endorsement certificate says."""
    is_ec = isinstance(key, ec.EllipticCurvePublicKey)
    return Spec(
        spki_der(key),
        extensions=[
            extension(SAN, san(tpm_name()), critical=True),
            basic_constraints(ca=False),
            key_usage(KEY_AGREEMENT if is_ec else KEY_ENCIPHERMENT),
            eku(EK_PURPOSE),
        ],
    )


def crl_points(*urls: str) -> bytes:
    """Return a certificate's extension that names where its revocation lists are."""
    points = (tlv(0x30, tlv(0xA0, tlv(0xA0, tlv(0x86, url.encode())))) for url in urls)
    return extension(CRL_POINTS, tlv(0x30, *points))


@dataclass(slots=True)
class CrlSpec:
    """What a revocation list should say; every field may be replaced.

    Attributes:
        serials: of revoked certificates.
        this_update: when it was made.
        next_update: when it runs out, b"" for no word about it.
        extensions: of the list.
        entry_extensions: of every entry.
        hash: what is signed.
    """

    serials: list[int] = field(default_factory=list)
    this_update: bytes = field(default_factory=lambda: utc("20250101"))
    next_update: bytes = field(default_factory=lambda: utc("20990101"))
    extensions: list[bytes] = field(default_factory=list)
    entry_extensions: list[bytes] = field(default_factory=list)
    hash: str = "sha256"


@dataclass(frozen=True, slots=True)
class EkCa:
    """A CA of a vendor.

    Attributes:
        subject: its raw Name.
        key: what it signs with.
        certificate: its DER.
    """

    subject: bytes
    key: PrivateKey
    certificate: bytes

    @classmethod
    def root(cls, text: str, key: PrivateKey, spec: Spec | None = None) -> EkCa:
        """Return a self-signed CA."""
        chosen = spec or ca_spec(text, key.public_key())
        unsigned = cls(chosen.subject, key, b"")
        return cls(chosen.subject, key, unsigned.issue(chosen))

    def child(self, text: str, key: PrivateKey, spec: Spec | None = None) -> EkCa:
        """Return a CA below this one."""
        chosen = spec or ca_spec(text, key.public_key())
        return EkCa(chosen.subject, key, self.issue(chosen))

    def issue(self, spec: Spec) -> bytes:
        """Return a signed certificate."""
        algorithm = self._algorithm(spec.hash, with_null=spec.null_parameters)
        tbs = tlv(
            0x30,
            tlv(0xA0, integer(2)),
            spec.serial if isinstance(spec.serial, bytes) else integer(spec.serial),
            spec.inner_algorithm or algorithm,
            self.subject,
            tlv(0x30, spec.not_before, spec.not_after),
            spec.subject,
            spec.spki,
            tlv(0xA3, tlv(0x30, *spec.extensions)) if spec.extensions else b"",
        )
        return tlv(0x30, tbs, algorithm, self._signature(tbs, spec.hash))

    def issue_crl(self, spec: CrlSpec) -> bytes:
        """Return a signed revocation list."""
        extra = tlv(0x30, *spec.entry_extensions) if spec.entry_extensions else b""
        entries = [tlv(0x30, integer(n), utc("20250101"), extra) for n in spec.serials]
        tbs = tlv(
            0x30,
            integer(1),
            self._algorithm(spec.hash),
            self.subject,
            spec.this_update,
            spec.next_update,
            tlv(0x30, *entries) if entries else b"",
            tlv(0xA0, tlv(0x30, *spec.extensions)) if spec.extensions else b"",
        )
        algorithm = self._algorithm(spec.hash)
        return tlv(0x30, tbs, algorithm, self._signature(tbs, spec.hash))

    def _algorithm(self, hash_name: str, *, with_null: bool = False) -> bytes:
        is_ec = isinstance(self.key, ec.EllipticCurvePrivateKey)
        kind = oid(_SIGNATURE["ec" if is_ec else "rsa", hash_name])
        return tlv(0x30, kind, b"" if is_ec and not with_null else b"\x05\x00")

    def _signature(self, tbs: bytes, hash_name: str) -> bytes:
        return tlv(0x03, b"\x00" + self._sign(tbs, hash_name))

    def _sign(self, data: bytes, hash_name: str) -> bytes:
        algorithm = _HASHES[hash_name]
        if isinstance(self.key, ec.EllipticCurvePrivateKey):
            return self.key.sign(data, ec.ECDSA(algorithm))
        return self.key.sign(data, padding.PKCS1v15(), algorithm)
