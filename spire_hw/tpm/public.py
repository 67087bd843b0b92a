"""Public areas: from TPMT_PUBLIC bytes to a key and its Name, and what each role demands of them.

Attributes are claims of the sender until the object's Name was proved by activation or by a
statement of a proved key; the checks here say what they must be, not that they are true.

Spec: TPM 2.0 Library, Part 1 "Names", Part 2 "TPMT_PUBLIC"; TCG EK Credential Profile, Annex B.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric import rsa

from spire_hw.errors import (
    AttestationError,
    EncodingError,
    ErrorKind,
    Finding,
    InvalidInputError,
    WeakKeyError,
)
from spire_hw.key import EC_SPKI_HEADS, PublicKey, fingerprint, load_point, spki_der
from spire_hw.roca import is_marked, primes
from spire_hw.tpm import wire
from spire_hw.tpm.wire import Reader

FIXED_TPM: Final = 1 << 1
ST_CLEAR: Final = 1 << 2
FIXED_PARENT: Final = 1 << 4
SENSITIVE_DATA_ORIGIN: Final = 1 << 5
USER_WITH_AUTH: Final = 1 << 6
ADMIN_WITH_POLICY: Final = 1 << 7
NO_DA: Final = 1 << 10
ENCRYPTED_DUPLICATION: Final = 1 << 11
RESTRICTED: Final = 1 << 16
DECRYPT: Final = 1 << 17
SIGN: Final = 1 << 18

_ORIGIN = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN
_AUTHORISATION = USER_WITH_AUTH | ADMIN_WITH_POLICY | NO_DA

# Curve number: name, coordinate size in bytes.
_CURVES: Final = {
    wire.CURVE_P256: ("secp256r1", 32),
    wire.CURVE_P384: ("secp384r1", 48),
    wire.CURVE_P521: ("secp521r1", 66),
}
# Name: coordinate size in bytes, p.
_FIELDS: Final[dict[str, tuple[int, int]]] = {
    "secp256r1": (32, 2**256 - 2**224 + 2**192 + 2**96 - 1),
    "secp384r1": (48, 2**384 - 2**128 - 2**96 + 2**32 - 1),
    "secp521r1": (66, 2**521 - 1),
}
_CURVE_WORDS: Final = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
_UNCOMPRESSED = 0x04
_RSA_BITS: Final = (2048, 3072, 4096)
_RSA_EXPONENT: Final = 65537
_STRONG_HASHES: Final = frozenset({wire.ALG_SHA256, wire.ALG_SHA384, wire.ALG_SHA512})
_TWO_FIELD_SCHEMES: Final = frozenset({wire.ALG_ECDAA})
_MAX_POLICY = 64


@dataclass(frozen=True, slots=True)
class Symmetric:
    """The cipher a storage or endorsement key protects its children with."""

    algorithm: int
    bits: int
    mode: int


@dataclass(frozen=True, slots=True)
class TpmPublic:
    """A parsed public area.

    Attributes:
        raw: the TPMT_PUBLIC bytes.
        type: `ALG_RSA` or `ALG_ECC`.
        name_alg: hash of the object's Name.
        attributes: TPMA_OBJECT bits.
        auth_policy: policy digest, may be empty.
        symmetric: child cipher, None for NULL.
        scheme: asymmetric scheme, `ALG_NULL` for none.
        scheme_hash: its hash, 0 without one.
        key: the public key; RSA-2048 to 4096 with exponent 65537, or a NIST curve.
        name: nameAlg (2 bytes, big-endian) and digest.
        spki: DER SubjectPublicKeyInfo of key, in its one canonical form.
    """

    raw: bytes = field(repr=False)
    type: int
    name_alg: int
    attributes: int
    auth_policy: bytes
    symmetric: Symmetric | None
    scheme: int
    scheme_hash: int
    key: PublicKey = field(repr=False)
    name: bytes
    spki: bytes = field(repr=False)

    def has(self, bits: int) -> bool:
        """Tell whether all the given attribute bits are set."""
        return self.attributes & bits == bits


def name_of(public: bytes) -> bytes:
    """Return the Name of an object: nameAlg and hash over its TPMT_PUBLIC bytes.

    Raises:
        EncodingError: too short, or the name algorithm is none we know.
    """
    r = Reader(public, "public area")
    r.u16()
    return _name(public, r.u16(), "public area")


def _name(public: bytes, name_alg: int, what: str) -> bytes:
    if name_alg not in wire.HASHES:
        raise EncodingError(what, f"name algorithm {name_alg:#06x} is not accepted", 2)
    digest = hashlib.new(wire.HASHES[name_alg][0], public).digest()
    return name_alg.to_bytes(2, "big") + digest


def qualified_name(parent: bytes, name: bytes) -> bytes:
    """Return the qualified name of an object.

    Args:
        parent: qualified name of its parent; the 4-byte handle for a primary of a hierarchy.
        name: the object's Name.

    Raises:
        EncodingError: the name's algorithm is none we know.

    Spec: TPM 2.0 Library, Part 1 "Names".
    """
    algorithm = int.from_bytes(name[:2], "big")
    if algorithm not in wire.HASHES:
        raise EncodingError("object name", f"algorithm {algorithm:#06x} is not accepted", 0)
    return name[:2] + hashlib.new(wire.HASHES[algorithm][0], parent + name).digest()


def ek_hash(key: PublicKey) -> str:
    """Return the hash that names a TPM: lower-case hex SHA-256 of the key's DER SPKI.

    It is the last segment of the agent ID and the entry of hash lists, as in the `tpm` plugin of
    the SPIFFE project.
    """
    return fingerprint(spki_der(key))


def parse_public(raw: bytes, what: str = "public area") -> TpmPublic:
    """Read a TPMT_PUBLIC (without size prefix) of an RSA or ECC key.

    Args:
        raw: exactly the bytes the TPM produced.
        what: how to call it in messages.

    Raises:
        EncodingError: malformed, bytes left over, coordinates not at field size.
        InvalidInputError: another key type, or a key that is weak or not on its curve.
    """
    r = Reader(raw, what)
    kind, name_alg = r.u16(), r.u16()
    if kind not in {wire.ALG_RSA, wire.ALG_ECC}:
        raise InvalidInputError(f"{what}: key type {kind:#06x} is not supported")
    name = _name(raw, name_alg, what)
    attributes, policy = r.u32(), r.sized(_MAX_POLICY)
    symmetric = _read_symmetric(r)
    scheme, scheme_hash = _read_scheme(r)
    key, spki = _read_rsa(r, what) if kind == wire.ALG_RSA else _read_ecc(r, what)
    r.end()
    return TpmPublic(
        raw=raw,
        type=kind,
        name_alg=name_alg,
        attributes=attributes,
        auth_policy=policy,
        symmetric=symmetric,
        scheme=scheme,
        scheme_hash=scheme_hash,
        key=key,
        name=name,
        spki=spki,
    )


def _read_symmetric(r: Reader) -> Symmetric | None:
    algorithm = r.u16()
    return None if algorithm == wire.ALG_NULL else Symmetric(algorithm, r.u16(), r.u16())


def _read_scheme(r: Reader) -> tuple[int, int]:
    scheme = r.u16()
    if scheme in {wire.ALG_NULL, wire.ALG_RSAES}:
        return scheme, 0
    scheme_hash = r.u16()
    if scheme in _TWO_FIELD_SCHEMES:
        r.u16()
    return scheme, scheme_hash


def _read_rsa(r: Reader, what: str) -> tuple[PublicKey, bytes]:
    bits, exponent = r.u16(), r.u32()
    modulus = r.sized(max(_RSA_BITS) // 8)
    if bits not in _RSA_BITS:
        raise InvalidInputError(f"{what}: RSA-{bits} is not supported")
    if len(modulus) * 8 != bits:
        raise InvalidInputError(f"{what}: RSA modulus has {len(modulus)} bytes, not {bits // 8}")
    key = build_rsa_key(int.from_bytes(modulus, "big"), exponent or _RSA_EXPONENT, what)
    return key, spki_der(key)


def _read_ecc(r: Reader, what: str) -> tuple[PublicKey, bytes]:
    curve_id = r.u16()
    if r.u16() != wire.ALG_NULL:
        raise r.fail("key derivation scheme is not accepted")
    if curve_id not in _CURVES:
        raise InvalidInputError(f"{what}: key type is not supported: curve {curve_id:#06x}")
    name, size = _CURVES[curve_id]
    x, y = r.sized(_MAX_POLICY + 2), r.sized(_MAX_POLICY + 2)
    if len(x) != size or len(y) != size:
        raise r.fail(f"coordinate must be {size} bytes")
    return build_ecc_key(name, b"\x04" + x + y, what)


def build_ecc_key(curve: str, point: bytes, what: str) -> tuple[PublicKey, bytes]:
    """Return an ECC key after checks that `cryptography` leaves to its caller.

    Args:
        curve: name of a NIST curve.
        point: uncompressed, coordinates at field size.
        what: how to call it in messages.

    Returns:
        The key and its DER SubjectPublicKeyInfo.

    Raises:
        InvalidInputError: compressed or of another length, a coordinate not below p, or not on
            the curve.
    """
    size, prime = _FIELDS[curve]
    if len(point) != 2 * size + 1 or point[0] != _UNCOMPRESSED:
        raise InvalidInputError(f"{what}: public key is not in canonical form: point")
    x, y = point[1 : size + 1], point[size + 1 :]
    if int.from_bytes(x, "big") >= prime or int.from_bytes(y, "big") >= prime:
        raise InvalidInputError(f"{what}: coordinate is not in range")
    try:
        return load_point(curve, point), EC_SPKI_HEADS[curve] + point
    except ValueError as e:
        raise InvalidInputError(f"{what}: point is not on {_CURVE_WORDS[curve]}") from e


def build_rsa_key(modulus: int, exponent: int, what: str) -> rsa.RSAPublicKey:
    """Return an RSA key after checks that `cryptography` leaves to its caller.

    Raises:
        InvalidInputError: size other than 2048, 3072 or 4096 bits, exponent other than 65537,
            modulus even or with a small factor.
        WeakKeyError: made by the faulty generator of CVE-2017-15361.
    """
    bits = modulus.bit_length()
    if modulus <= 0:
        raise InvalidInputError(f"{what}: RSA modulus is not acceptable: it is not positive")
    if bits not in _RSA_BITS:
        raise InvalidInputError(f"{what}: RSA-{bits} is not supported")
    if exponent != _RSA_EXPONENT:
        raise InvalidInputError(f"{what}: RSA exponent must be {_RSA_EXPONENT}")
    if math.gcd(modulus, _SMALL_PRIMES_PRODUCT) != 1:
        raise InvalidInputError(f"{what}: RSA modulus is not acceptable: it has a small factor")
    if is_marked(modulus):
        raise WeakKeyError(
            f"{what}: RSA modulus is not acceptable: it is from a faulty key generator "
            "(CVE-2017-15361)"
        )
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError as e:
        raise InvalidInputError(f"{what}: RSA key is not acceptable") from e


_SMALL_PRIMES_PRODUCT: Final = math.prod(primes(1000))


def check_ak(public: TpmPublic) -> None:
    """Demand that a public area is that of an attestation key.

    Raises:
        AttestationError: every fault found, codes `ak_attributes`, `ak_name_alg`, `ak_scheme`.
    """
    found = [Finding("ak_attributes", f"ak: {text}") for text in _ak_attribute_faults(public)]
    if public.name_alg not in _STRONG_HASHES:
        found.append(Finding("ak_name_alg", "ak: name algorithm is not accepted"))
    if not _is_signing_scheme(public):
        found.append(Finding("ak_scheme", "ak: signing scheme is not accepted"))
    if found:
        raise AttestationError(found)


def _ak_attribute_faults(public: TpmPublic) -> list[str]:
    faults = []
    if not public.has(RESTRICTED):
        faults.append("key is not restricted")
    if not public.has(FIXED_TPM | SENSITIVE_DATA_ORIGIN):
        faults.append("key was not made in this TPM")
    if not public.has(FIXED_PARENT):
        faults.append("key can leave its TPM")
    known = _ORIGIN | _AUTHORISATION | RESTRICTED | SIGN
    if not public.has(SIGN) or public.attributes & ~known:
        faults.append(f"attributes {public.attributes:#010x} are not those of an AK")
    return faults


def _is_signing_scheme(public: TpmPublic) -> bool:
    schemes = {wire.ALG_RSA: (wire.ALG_RSASSA, wire.ALG_RSAPSS), wire.ALG_ECC: (wire.ALG_ECDSA,)}
    return (
        public.scheme in schemes[public.type]
        and public.scheme_hash in _STRONG_HASHES
        and public.symmetric is None
    )


def check_svid_key(public: TpmPublic) -> None:
    """Demand that a public area is that of a signing key that was made in its TPM and stays there.

    Raises:
        AttestationError: code `key_attributes` or `key_name_alg`.
    """
    found = []
    required = _ORIGIN | SIGN
    if not public.has(required) or public.attributes & ~(required | _AUTHORISATION):
        text = f"certify: attributes {public.attributes:#010x} are not acceptable"
        found.append(Finding("key_attributes", text))
    if public.name_alg not in _STRONG_HASHES:
        found.append(Finding("key_name_alg", "certify: name algorithm is not accepted"))
    if found:
        raise AttestationError(found)


_LOW, _HIGH = 0x000300B2, 0x000300F2
_POLICY_A_SHA256 = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
_POLICY_B_SHA256 = bytes.fromhex("ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0")
_POLICY_B_SHA384 = bytes.fromhex(
    "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419ca"
    "cb47ba09699646150f9fc000f3f80e12"
)
_POLICY_B_SHA512 = bytes.fromhex(
    "b8221ca69e8550a4914de3faa6a18c072cc01208073a928d5d66d59ef79e49a4"
    "29c41a6b269571d57edb25fbdb1838425608b413cd616a5f6db5b6071af99bea"
)


@dataclass(frozen=True, slots=True)
class EkTemplate:
    """One of the endorsement key templates of the TCG, without its `unique` field."""

    label: str
    key_type: str
    name_alg: int
    aes_bits: int
    attributes: int
    auth_policy: bytes


EK_TEMPLATES: Final = (
    EkTemplate("L-1", "rsa2048", wire.ALG_SHA256, 128, _LOW, _POLICY_A_SHA256),
    EkTemplate("L-2", "secp256r1", wire.ALG_SHA256, 128, _LOW, _POLICY_A_SHA256),
    EkTemplate("H-1", "rsa2048", wire.ALG_SHA256, 128, _HIGH, _POLICY_B_SHA256),
    EkTemplate("H-2", "secp256r1", wire.ALG_SHA256, 128, _HIGH, _POLICY_B_SHA256),
    EkTemplate("H-3", "secp384r1", wire.ALG_SHA384, 256, _HIGH, _POLICY_B_SHA384),
    EkTemplate("H-4", "secp521r1", wire.ALG_SHA512, 256, _HIGH, _POLICY_B_SHA512),
    EkTemplate("H-6", "rsa3072", wire.ALG_SHA384, 256, _HIGH, _POLICY_B_SHA384),
    EkTemplate("H-7", "rsa4096", wire.ALG_SHA384, 256, _HIGH, _POLICY_B_SHA384),
)


def key_label(key: PublicKey) -> str:
    """Return `rsa2048` and the like, or the curve's name."""
    return f"rsa{key.key_size}" if isinstance(key, rsa.RSAPublicKey) else key.curve.name


def check_ek(public: TpmPublic) -> EkTemplate:
    """Return the TCG template a public area was made from.

    Raises:
        AttestationError: `ek_signing_key` for a signing key, `ek_template` for any other.

    Spec: TCG EK Credential Profile, Annex B.
    """
    if public.has(SIGN):
        text = "ek: this is a signing key, not an endorsement key"
        raise AttestationError([Finding("ek_signing_key", text)])
    for template in EK_TEMPLATES:
        cipher = Symmetric(wire.ALG_AES, template.aes_bits, wire.ALG_CFB)
        if (
            template.key_type == key_label(public.key)
            and template.name_alg == public.name_alg
            and template.attributes == public.attributes
            and template.auth_policy == public.auth_policy
            and public.symmetric == cipher
            and public.scheme == wire.ALG_NULL
        ):
            return template
    raise AttestationError([Finding("ek_template", "ek: public area matches no EK template")])


def hierarchy_of(signer: bytes, name: bytes, parents: tuple[bytes, ...] = ()) -> str:
    """Tell from a qualified name which hierarchy a key lives in.

    Args:
        signer: qualified name the TPM reported.
        name: the key's Name.
        parents: Names of its ancestors, the primary first; empty for a primary.

    Returns:
        `endorsement` or `owner`.

    Raises:
        AttestationError: `ak_hierarchy` for the null or platform hierarchy, `ak_qualified_name`
            when no hierarchy yields this qualified name.
    """
    places = {
        "endorsement": wire.RH_ENDORSEMENT,
        "owner": wire.RH_OWNER,
        "null": wire.RH_NULL,
        "platform": wire.RH_PLATFORM,
    }
    for place, handle in places.items():
        qualified = handle.to_bytes(4, "big")
        for ancestor in (*parents, name):
            qualified = qualified_name(qualified, ancestor)
        if qualified == signer:
            if place in {"endorsement", "owner"}:
                return place
            text = f"ak: key is in the {place} hierarchy"
            raise AttestationError([Finding("ak_hierarchy", text, ErrorKind.PERMISSION_DENIED)])
    text = "ak: qualified name does not match the parent"
    raise AttestationError([Finding("ak_qualified_name", text)])
